//! Unusual programs: the trace of each is complete, and its stacks have all names that can be
//! known.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use testkit::{Cap, has_optional_program, require};

use crate::assembly;
use crate::support::{check, of_kind, scratch, take_records, text, trace, within};

/// A program of a test, removed when this is dropped.
pub(crate) struct Program(pub(crate) PathBuf);

impl Program {
    /// `None` if the compiler cannot make it.
    pub(crate) fn try_new(
        compiler: &str,
        source: &str,
        name: &str,
        flags: &[&str],
    ) -> Option<Program> {
        let (file, program) = (scratch(name), Program(scratch("odd")));
        fs::write(&file, source).unwrap();
        let output = Command::new(compiler)
            .arg("-o")
            .arg(&program.0)
            .arg(&file)
            .args(flags)
            .output()
            .unwrap();
        fs::remove_file(file).unwrap();
        if !output.status.success() {
            eprintln!("{}", text(&output.stderr));
            return None;
        }
        Some(program)
    }

    pub(crate) fn new(source: &str, flags: &[&str]) -> Program {
        Program::try_new("gcc", source, "odd.c", flags).expect("it compiles")
    }

    pub(crate) fn traced(&self, args: &[&str]) -> Vec<Value> {
        let mut words = vec![self.0.to_str().unwrap()];
        words.extend(args);
        traced(&words)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Traces a program that must succeed, and returns its records.
pub(crate) fn traced(words: &[&str]) -> Vec<Value> {
    let path = scratch("odd.json");
    let mut command = trace();
    command.args(["-k", "--json", "-o"]).arg(&path).args(words);
    let output = within("mmun trace", move || command.output().unwrap());
    assert!(
        output.status.success(),
        "{words:?}: {} {}",
        output.status,
        text(&output.stderr)
    );
    let records = take_records(&path);
    check(&records);
    records
}

/// The calls that unmap `bytes` bytes.
pub(crate) fn unmaps(records: &[Value], bytes: u64) -> Vec<&Value> {
    of_kind(records, "start")
        .filter(|start| start["cause"] == "munmap" && start["bytes"] == bytes)
        .collect()
}

/// The functions of the stack of a call, the innermost first.
pub(crate) fn functions<'a>(records: &'a [Value], start: &Value) -> Vec<&'a str> {
    let stack = of_kind(records, "stack").find(|stack| stack["site"] == start["site"]);
    let frames = stack.unwrap_or_else(|| panic!("no stack: {start}"))["frames"]
        .as_array()
        .unwrap();
    frames
        .iter()
        .map(|frame| frame["function"].as_str().unwrap())
        .collect()
}

/// Unmaps 123 times 64 KiB, which are whole pages under every kernel, in a function of its own.
const GIVE: &str = "\
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#define SIZE (123 << 16)
static char *make(int prot) {
    char *at = mmap(0, SIZE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) exit(1);
    return at;
}
static __attribute__((noinline)) int give_back(char *at) {
    int result = munmap(at, SIZE);
    __asm__ volatile(\"\");
    return result;
}
";
pub(crate) const SIZE: u64 = 123 << 16;

pub(crate) fn give(rest: &str) -> String {
    format!("{GIVE}{rest}")
}

const MAIN: &str = "int main(void) { return give_back(make(PROT_READ)); }\n";

#[test]
fn a_stripped_program_has_offsets_and_a_static_one_names() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    for flags in [
        &["-s"][..],
        &["-s", "-static"],
        &["-static-pie"],
        &["-static", "-g"],
        &["-O2", "-flto"],
    ] {
        let Some(program) = Program::try_new("gcc", &give(MAIN), "odd.c", flags) else {
            println!("SKIP odd::a_stripped_program: gcc cannot do {flags:?}");
            continue;
        };
        let records = program.traced(&[]);
        let [start] = unmaps(&records, SIZE)[..] else {
            panic!("one call")
        };
        let found = functions(&records, start);
        if flags.contains(&"-s") {
            let module = program.0.file_name().unwrap().to_str().unwrap();
            assert!(
                found
                    .iter()
                    .any(|name| name.starts_with(&format!("{module}+0x"))),
                "{flags:?} {found:?}"
            );
        } else {
            assert!(found.contains(&"give_back"), "{flags:?} {found:?}");
        }
    }
}

/// The C library signs its return addresses on aarch64, and keeps its frame records below its
/// frames' other data: only its unwind tables lead through `qsort`.
const CALLED_BACK: &str = "\
static char *memory;
static __attribute__((noinline)) int compare(const void *a, const void *b) {
    if (memory) give_back(memory);
    memory = 0;
    return *(const int *)a - *(const int *)b;
}
static __attribute__((noinline)) int third(int *pair) { qsort(pair, 2, sizeof *pair, compare); return pair[0]; }
static __attribute__((noinline)) int second(int *pair) { return third(pair) + 1; }
static __attribute__((noinline)) int first(int *pair) { return second(pair) + 1; }
int main(void) {
    int pair[2] = {2, 1};
    memory = make(PROT_READ);
    return first(pair) != 3;
}
";

#[test]
fn a_stack_leads_through_a_callback_of_the_c_library() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let mut variants = vec![vec!["-g", "-O2", "-fno-optimize-sibling-calls"]];
    if cfg!(target_arch = "aarch64") {
        variants.push([&variants[0][..], &["-mbranch-protection=standard"]].concat());
    }
    for flags in &variants {
        let records = Program::new(&give(CALLED_BACK), flags).traced(&[]);
        let [start] = unmaps(&records, SIZE)[..] else {
            panic!("one call")
        };
        let found = functions(&records, start);
        let own = [
            "give_back",
            "compare",
            "third",
            "second",
            "first",
            "main",
            "_start",
        ];
        let mut outwards = found.iter();
        assert!(
            own.iter().all(|name| outwards.any(|found| found == name)),
            "{flags:?} {found:?}"
        );
    }
}

/// Copies a function to anonymous memory and calls it there. The function unmaps memory.
const JIT: &str = "\
int main(int argc, char **argv) {
    /* munmap; return */
#ifdef __aarch64__
    static const unsigned code[] = { 0xd2801ae8, 0xd4000001, 0xd65f03c0 };
#else
    static const unsigned char code[] = { 0xb8, 11, 0, 0, 0, 0x0f, 0x05, 0xc3 };
#endif
    char *jit = make(PROT_READ | PROT_WRITE | PROT_EXEC), name[64];
    memcpy(jit + 0x100, code, sizeof code);
    __builtin___clear_cache(jit + 0x100, jit + 0x100 + sizeof code);
    sprintf(name, \"/tmp/perf-%d.map\", getpid());
    if (!strcmp(argv[1], \"pipe\") && mkfifo(name, 0600)) return 2;
    if (!strcmp(argv[1], \"link\") && symlink(argv[2], name)) return 2;
    if (!strcmp(argv[1], \"file\")) {
        FILE *file = fopen(name, \"w\");
        fprintf(file, \"%lx 8 made at run time\\n\", (long)jit + 0x100);
        fclose(file);
    }
    int result = ((int (*)(char *, long))(jit + 0x100))(make(PROT_READ), SIZE);
    return result;
}
";

#[test]
fn code_made_at_run_time_is_named_by_a_file_and_by_nothing_else() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    // The last byte of the system call's instruction.
    let unnamed = if cfg!(target_arch = "aarch64") {
        "[anon]+0x107"
    } else {
        "[anon]+0x106"
    };
    let (program, other) = (Program::new(&give(JIT), &[]), scratch("perf.map"));
    fs::write(&other, "0 ffffffffffffffff a name that was not asked for\n").unwrap();
    for (kind, name) in [
        ("none", unnamed),
        ("file", "made at run time"),
        ("link", unnamed),
    ] {
        let records = program.traced(&[kind, other.to_str().unwrap()]);
        let [start] = unmaps(&records, SIZE)[..] else {
            panic!("one call")
        };
        let found = functions(&records, start);
        remove_perf_map(&records);
        assert_eq!(found[0], name, "{kind}: {found:?}");
        assert!(found.contains(&"main"), "{found:?}");
    }
    // If the pipe were opened, the trace would wait for a writer.
    let records = program.traced(&["pipe"]);
    remove_perf_map(&records);
    let [start] = unmaps(&records, SIZE)[..] else {
        panic!("one call")
    };
    assert_eq!(functions(&records, start)[0], unnamed);
    fs::remove_file(other).unwrap();
}

fn remove_perf_map(records: &[Value]) {
    let _ = fs::remove_file(format!("/tmp/perf-{}.map", records[0]["pid"]));
}

#[test]
fn a_program_whose_file_is_replaced_or_deleted_keeps_its_names() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let main = "\
int main(int argc, char **argv) {
    if (unlink(argv[0])) return 2;
    if (!strcmp(argv[1], \"pipe\") && mkfifo(argv[0], 0600)) return 3;
    if (!strcmp(argv[1], \"file\")) {
        FILE *file = fopen(argv[0], \"w\");
        fputs(\"no program\", file);
        fclose(file);
    }
    return give_back(make(PROT_READ));
}
";
    for kind in ["gone", "pipe", "file"] {
        let program = Program::new(&give(main), &["-g"]);
        let records = program.traced(&[kind]);
        let [start] = unmaps(&records, SIZE)[..] else {
            panic!("one call")
        };
        let found = functions(&records, start);
        assert!(
            found.contains(&"give_back") && found.contains(&"main"),
            "{kind}: {found:?}"
        );
    }
}

#[test]
fn a_program_of_32_bits_is_traced_without_stacks() {
    if !require(Cap::Program("gcc")) || !require(Cap::I386Calls) {
        return;
    }
    let source = "\
static int call(int number, int a, int b) {
    int result;
    __asm__ volatile(\"int $0x80\" : \"=a\"(result) : \"a\"(number), \"b\"(a), \"c\"(b) : \"memory\");
    return result;
}
void _start(void) {
    call(91, 0x40000000, 123 << 16);
    call(1, 0, 0);
}
";
    let flags = [
        "-m32",
        "-static",
        "-nostdlib",
        "-ffreestanding",
        "-fno-pie",
        "-no-pie",
        "-O1",
    ];
    let Some(program) = Program::try_new("gcc", source, "odd.c", &flags) else {
        println!("SKIP odd::a_program_of_32_bits: gcc cannot do -m32");
        return;
    };
    let records = program.traced(&[]);
    let [start] = unmaps(&records, SIZE)[..] else {
        panic!("one call")
    };
    assert!(
        start.get("site").is_none() && start["what"] == "nothing",
        "{start}"
    );
}

#[test]
fn a_stack_pointer_may_point_anywhere() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let records = Program::new(
        &give(assembly::STACK_ANYWHERE),
        &["-O1", "-fomit-frame-pointer"],
    )
    .traced(&[]);
    let starts = unmaps(&records, SIZE);
    assert_eq!(starts.len(), 12);
    assert!(
        starts[..11]
            .iter()
            .all(|start| functions(&records, start)[0] == "main")
    );
    assert!(functions(&records, starts[11]).contains(&"give_back"));
}

#[test]
fn a_program_may_unmap_its_own_text() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let program = Program::new(&give(assembly::UNMAPS_ITS_TEXT), &["-O1"]);
    let records = program.traced(&[]);
    let [start] = unmaps(&records, SIZE)[..] else {
        panic!("one call")
    };
    // The last byte of the second system call's instruction.
    let place = if cfg!(target_arch = "aarch64") {
        "[anon]+0x17"
    } else {
        "[anon]+0x13"
    };
    assert_eq!(functions(&records, start)[0], place);
    let path = program.0.to_str().unwrap();
    assert!(
        of_kind(&records, "start").any(|start| start["cause"] == "munmap" && start["what"] == path)
    );
}

#[test]
fn three_thousand_threads_are_traced_with_their_stacks() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let main = "\
#include <pthread.h>
static pthread_barrier_t all;
static void *work(void *unused) {
    pthread_barrier_wait(&all);
    return (void *)(long)give_back(make(PROT_READ));
}
int main(void) {
    enum { COUNT = 3000 };
    static pthread_t threads[COUNT];
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 1 << 16);
    pthread_barrier_init(&all, 0, COUNT);
    for (int i = 0; i < COUNT; i++)
        if (pthread_create(threads + i, &small, work, 0)) return 77;
    for (int i = 0; i < COUNT; i++) {
        void *result;
        pthread_join(threads[i], &result);
        if (result) return 1;
    }
    return 0;
}
";
    let program = Program::new(&give(main), &["-O1", "-pthread"]);
    let alone = Command::new(&program.0).status().unwrap();
    if alone.code() == Some(77) {
        println!("SKIP odd::three_thousand_threads: so many threads may not be made here");
        return;
    }
    let records = program.traced(&[]);
    let starts = unmaps(&records, SIZE);
    assert_eq!(starts.len(), 3000);
    let site = &starts[0]["site"];
    assert!(
        site.is_u64() && starts.iter().all(|start| start["site"] == *site),
        "one place in the code has one stack"
    );
    assert!(functions(&records, starts[0]).contains(&"work"));
    let ends: Vec<&Value> = of_kind(&records, "end")
        .filter(|end| end["bytes"] == SIZE)
        .collect();
    assert!(
        ends.iter().all(|end| end["self"].is_u64()),
        "more tasks than files that are kept open"
    );
}

#[test]
fn ten_thousand_modules_are_distinguished() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let module = "\
long call_from_module(long (*f)(char *), char *at) { long result = f(at); __asm__ volatile(\"\"); return result; }
";
    // The entry of this file is the function, and the file has one segment.
    let flags = [
        "-shared",
        "-fPIC",
        "-O1",
        "-nostdlib",
        "-Wl,-e,call_from_module,-z,noseparate-code,-z,norelro",
    ];
    let module = Program::try_new("gcc", module, "module.c", &flags).expect("it compiles");
    let main = "\
static long give_from(char *at) { return give_back(at); }
int main(int argc, char **argv) {
    static char bytes[1 << 20];
    FILE *file = fopen(argv[1], \"r\");
    size_t size = fread(bytes, 1, sizeof bytes, file);
    for (int i = 0; i < 10000; i++) {
        int copy = memfd_create(\"module\", 0);
        if (write(copy, bytes, size) != size) return 1;
        char *module = mmap(0, size, PROT_READ | PROT_EXEC, MAP_PRIVATE, copy, 0);
        if (module == MAP_FAILED) return 2;
        close(copy);
        long (*call)(long (*)(char *), char *) = (void *)(module + *(long *)(bytes + 24));
        if (call(give_from, make(PROT_READ))) return 3;
    }
    return 0;
}
";
    let program = Program::new(&give(main), &["-O1"]);
    let records = program.traced(&[module.0.to_str().unwrap()]);
    let starts = unmaps(&records, SIZE);
    assert_eq!(starts.len(), 10_000);
    let mut sites: Vec<u64> = starts
        .iter()
        .map(|start| start["site"].as_u64().unwrap())
        .collect();
    sites.sort_unstable();
    sites.dedup();
    assert_eq!(
        sites.len(),
        10_000,
        "each stack goes through another module"
    );
    for start in [starts[0], starts[9_999]] {
        let found = functions(&records, start);
        assert!(
            found.contains(&"call_from_module") && found.contains(&"main"),
            "{found:?}"
        );
    }
}

#[test]
fn a_rust_program_that_aborts_on_panic_has_stacks() {
    if !has_optional_program("rustc") {
        return;
    }
    let source = "\
extern \"C\" { fn mmap(a: *mut u8, n: usize, p: i32, f: i32, d: i32, o: i64) -> *mut u8; fn munmap(a: *mut u8, n: usize) -> i32; }
#[inline(never)]
fn give_back(at: *mut u8) -> i32 { let result = unsafe { munmap(at, 123 << 16) }; std::hint::black_box(result) }
fn main() { assert_eq!(give_back(unsafe { mmap(std::ptr::null_mut(), 123 << 16, 1, 0x22, -1, 0) }), 0); }
";
    for flags in [
        &["-Cpanic=abort", "-O"][..],
        &[
            "-Cpanic=abort",
            "-Cforce-unwind-tables=no",
            "-Cforce-frame-pointers",
        ],
    ] {
        let program = Program::try_new("rustc", source, "odd.rs", flags).expect("it compiles");
        let records = program.traced(&[]);
        let [start] = unmaps(&records, SIZE)[..] else {
            panic!("one call")
        };
        let found = functions(&records, start);
        assert!(
            found.iter().any(|name| name.ends_with("::give_back")),
            "{flags:?} {found:?}"
        );
    }
}

/// `docs/sources.md` must mention each of these limits of the tracer. The help and the manual, or
/// `doctor`, must mention the limits that a user can meet without a seccomp filter.
#[test]
fn limits_stand_in_the_help_in_doctor_and_in_the_documents() {
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_mmun")).args(args).output();
        text(&output.unwrap().stdout).to_owned()
    };
    let documents = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/sources.md");
    let documents = fs::read_to_string(documents).unwrap();
    let (help, man) = (run(&["trace", "--help"]), run(&["man"]));
    for limit in ["detect_leaks=0", "CLONE_PTRACE"] {
        assert!(help.contains(limit) && documents.contains(limit), "{limit}");
        assert!(man.contains(limit), "{limit}");
    }
    let doctor = run(&["doctor"]);
    for limit in ["detect_leaks=0", "a call splits a huge page"] {
        assert!(
            doctor.contains(limit) && documents.contains(limit),
            "{limit}"
        );
    }
    // The limit of a program's own filter that asks for a tracer (`SECCOMP_RET_TRACE`).
    assert!(documents.contains("SECCOMP_RET_TRACE"));
}
