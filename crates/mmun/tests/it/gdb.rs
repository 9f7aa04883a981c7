//! The names in the stacks of a trace, compared with those of gdb.

use std::process::Command;

use serde_json::Value;
use testkit::{Cap, has_optional_program, require};

use crate::odd::{Program, unmaps};
use crate::support::{of_kind, text, within};

/// A call below recursion, an inlined function and a callback of the C library.
const NESTED: &str = r#"
#include <stdlib.h>
#include <sys/mman.h>
#define KEEP __asm__ volatile ("" : "+r" (result))
static char *memory;
static __attribute__((noinline)) int give_back(char *at) {
    int result = munmap(at, 123 << 16);
    KEEP;
    return result;
}
static inline __attribute__((always_inline)) int inlined(char *at) {
    int result = give_back(at) + 1;
    KEEP;
    return result;
}
static __attribute__((noinline, noclone)) int recurse(int n, char *at) {
    int result = n ? recurse(n - 1, at) + n : inlined(at);
    KEEP;
    return result;
}
static int compare(const void *a, const void *b) {
    int result = recurse(3, memory);
    KEEP;
    return result + *(const int *)a - *(const int *)b;
}
int main(void) {
    int pair[2] = {2, 1};
    memory = mmap(0, 123 << 16, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    qsort(pair, 2, sizeof pair[0], compare);
    return pair[0] > 2;
}
"#;

/// The program's own functions.
const OWN: &[&str] = &[
    "give_back",
    "inlined",
    "recurse",
    "compare",
    "main",
    "_start",
];

/// The functions of the program itself on the stack of its `munmap`, the innermost first.
fn of_trace(program: &Program) -> Vec<String> {
    let records = program.traced(&[]);
    let [start] = unmaps(&records, 123 << 16)[..] else {
        panic!("one call")
    };
    let stack = of_kind(&records, "stack")
        .find(|stack| stack["site"] == start["site"])
        .unwrap();
    let file = program.0.file_name().unwrap().to_str().unwrap();
    let frames = stack["frames"].as_array().unwrap();
    frames
        .iter()
        .filter(|frame| frame["module"] == file)
        .map(|frame| name(&frame["function"]))
        .collect()
}

fn name(function: &Value) -> String {
    function.as_str().unwrap().to_owned()
}

/// The same functions, as gdb sees them. `None` if gdb cannot run a program here.
fn of_gdb(program: &Program) -> Option<Vec<String>> {
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-ex", "set startup-with-shell off"])
        .args(["-ex", "break give_back", "-ex", "run", "-ex", "bt"])
        .args(["-ex", "kill"])
        .arg(&program.0)
        .env_remove("DEBUGINFOD_URLS")
        .env("LC_ALL", "C");
    let output = within("gdb", move || gdb.output().unwrap());
    let lines = text(&output.stdout).lines();
    let frames: Vec<&str> = lines.filter(|line| line.starts_with('#')).collect();
    if frames.is_empty() {
        println!(
            "SKIP gdb: it cannot run a program here: {}",
            text(&output.stderr)
        );
        return None;
    }
    // `#1  0x000055... in recurse (n=0) at odd.c:12`, or without the address.
    let function = |line: &&str| {
        let (before, _) = line.split_once(" (")?;
        Some(before.rsplit(' ').next()?.to_owned())
    };
    let functions = frames.iter().filter_map(function);
    Some(functions.filter(|name| OWN.contains(&&**name)).collect())
}

#[test]
fn functions_have_the_names_that_gdb_gives_them() {
    if !require(Cap::Program("gcc")) || !require(Cap::Ptrace) || !has_optional_program("gdb") {
        return;
    }
    for (flags, depth) in [
        (&["-g", "-O2"][..], 9),
        (&["-O1", "-fomit-frame-pointer"], 8),
    ] {
        let program = Program::new(NESTED, flags);
        let mut found = of_trace(&program);
        assert_eq!(found.len(), depth, "{flags:?}: {found:?}");
        // gdb ends at `main`.
        assert_eq!(found.pop().as_deref(), Some("_start"));
        let Some(expected) = of_gdb(&program) else {
            return;
        };
        assert_eq!(found, expected, "{flags:?}");
    }
}
