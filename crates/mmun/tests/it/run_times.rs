//! Programs in languages that have a run time and stacks of their own.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use testkit::{Cap, has_optional_program, require};

use crate::odd::{Program, SIZE, functions, give, traced, unmaps};
use crate::support::{of_kind, scratch};

#[test]
fn programs_with_run_times_of_their_own_are_traced() {
    let script = "const f = n => n < 2 ? n : f(n - 1) + f(n - 2); f(25); Buffer.alloc(64 << 20); process.exit(0)";
    if has_optional_program("node") {
        holds(&traced(&["node", "-e", script]));
    }
    if has_optional_program("java") {
        holds(&traced(&["java", "-Xmx64m", "-version"]));
    }
}

/// Checks that calls have stacks, and that most stacks have more than one frame.
fn holds(records: &[Value]) {
    let stacks: Vec<&Value> = of_kind(records, "stack").collect();
    assert!(stacks.len() > 3);
    let deep = stacks
        .iter()
        .filter(|stack| stack["frames"].as_array().unwrap().len() > 2)
        .count();
    assert!(deep * 2 > stacks.len(), "{deep} of {}", stacks.len());
    assert!(Path::new(records[0]["program"].as_str().unwrap()).is_absolute());
}

/// `munmap` runs on the stack of the goroutine. The heap grows on the stack of the thread, to which
/// `runtime.systemstack` switches.
const GO: &str = r#"package main

import "syscall"

//go:noinline
func giveBack(memory []byte) error { return syscall.Munmap(memory) }

//go:noinline
func recurse(n int, memory []byte) error {
	if n > 0 {
		return recurse(n-1, memory)
	}
	return giveBack(memory)
}

var large []byte

func main() {
	memory, err := syscall.Mmap(-1, 0, 123<<16, syscall.PROT_READ, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		panic(err)
	}
	if err := recurse(3, memory); err != nil {
		panic(err)
	}
	large = make([]byte, 64<<20)
}
"#;

#[test]
fn the_stack_of_a_go_program_has_its_names_up_to_the_stack_switch() {
    if !has_optional_program("go") {
        return;
    }
    let folder = scratch("go");
    fs::create_dir(&folder).unwrap();
    let (source, program) = (folder.join("odd.go"), folder.join("odd"));
    fs::write(&source, GO).unwrap();
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&program).arg(&source);
    let output = build.env("GO111MODULE", "off").output().unwrap();
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        println!("SKIP run_times::the_stack_of_a_go_program: go cannot build here: {why}");
        return;
    }
    let records = traced(&[program.to_str().unwrap()]);
    fs::remove_dir_all(&folder).unwrap();
    holds(&records);
    let [start] = unmaps(&records, 123 << 16)[..] else {
        panic!("one call")
    };
    let found = functions(&records, start);
    let own: Vec<&str> = found
        .iter()
        .copied()
        .filter(|name| name.starts_with("main."))
        .collect();
    let again = "main.recurse";
    assert_eq!(
        own,
        ["main.giveBack", again, again, again, again, "main.main"],
        "{found:?}"
    );
    for stack in of_kind(&records, "stack") {
        let frames = stack["frames"].as_array().unwrap();
        assert!(
            frames.iter().all(|frame| frame["named"] != false),
            "{stack}"
        );
        let is_switch = |frame: &Value| {
            let name = frame["function"].as_str().unwrap();
            name.starts_with("runtime.systemstack")
        };
        if let Some(at) = frames.iter().position(is_switch) {
            let callers = &frames[at + 1..];
            let reaches_main = callers.iter().any(|frame| frame["function"] == "main.main");
            assert!(callers.is_empty() || reaches_main, "{stack}");
        }
    }
}

/// Python 3.12 writes a perf map of its functions with `-X perf`.
const PYTHON: &str = "
import mmap
def give_back(memory):
    memory.close()
give_back(mmap.mmap(-1, 123 << 16))
";

#[test]
fn a_python_function_has_the_name_in_its_perf_map() {
    let is_able = |python: &&str| {
        let script = "import sys; sys.exit(not sys.is_stack_trampoline_active())";
        let mut probe = Command::new(python);
        probe.args(["-X", "perf", "-c", script]);
        let probe = probe.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        probe.is_ok_and(|mut probe| {
            let is_able = probe.wait().unwrap().success();
            let _ = fs::remove_file(format!("/tmp/perf-{}.map", probe.id()));
            is_able
        })
    };
    let Some(python) = ["python3.12", "python3.13"].into_iter().find(is_able) else {
        println!("SKIP run_times::a_python_function: no Python of 3.12 or later is installed");
        return;
    };
    let records = traced(&[python, "-X", "perf", "-c", PYTHON]);
    let [start] = unmaps(&records, 123 << 16)[..] else {
        panic!("one call")
    };
    let found = functions(&records, start);
    // Python leaves the file.
    let _ = fs::remove_file(format!("/tmp/perf-{}.map", start["pid"]));
    // The innermost Python function, its caller, and the program around both.
    let mut outwards = found.iter();
    for begin in ["py::give_back:", "py::<module>:", "Py_RunMain"] {
        assert!(
            outwards.any(|name| name.starts_with(begin)),
            "{begin}: {found:?}"
        );
    }
}

/// Calls itself through code that is made at run time and has no frame pointer, as with Python's
/// `-X perf`. The register of the frame pointer has another value.
const TRAMPOLINE: &str = "\
static char *jit;
static __attribute__((noinline)) int evaluate(long depth) {
    int result;
    if (depth == 0) return give_back(make(PROT_READ));
    __asm__ volatile(\"\" ::: \"rbp\");
    result = ((int (*)(long, long, long, int (*)(long)))(jit + 64 * depth))(depth - 1, 0, 0, evaluate);
    return result + 1;
}
int main(void) {
    /* sub $8,%rsp; mov $1,%ebp; call *%rcx; add $8,%rsp; pop %rbp; ret, after push %rbp */
    static const unsigned char code[] = {
        0x55, 0x48, 0x83, 0xec, 8, 0xbd, 1, 0, 0, 0, 0xff, 0xd1, 0x48, 0x83, 0xc4, 8, 0x5d, 0xc3 };
    jit = make(PROT_READ | PROT_WRITE | PROT_EXEC);
    for (int i = 0; i < 64; i++) memcpy(jit + 64 * i, code, sizeof code);
    return evaluate(5) != 5;
}
";

#[test]
fn a_stack_leads_through_code_that_has_no_frame_pointer() {
    if cfg!(target_arch = "aarch64") || !require(Cap::Program("gcc")) {
        return;
    }
    let flags = ["-O2", "-fomit-frame-pointer"];
    let records = Program::new(&give(TRAMPOLINE), &flags).traced(&[]);
    let [start] = unmaps(&records, SIZE)[..] else {
        panic!("one call")
    };
    let found = functions(&records, start);
    assert_eq!(found[..2], ["munmap", "give_back"], "{found:?}");
    for pair in found[2..12].chunks(2) {
        assert!(pair[0].starts_with("[anon]+"), "{found:?}");
        assert_eq!(pair[1], "evaluate", "{found:?}");
    }
    assert!(
        found[12] == "main" && found.ends_with(&["_start"]),
        "{found:?}"
    );
}
