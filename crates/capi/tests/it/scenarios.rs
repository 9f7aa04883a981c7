//! The scenarios of the contract that can be written in C, as one program.

use crate::support::{compile, sources, succeed};
use std::path::PathBuf;
use std::process::Command;

fn program(name: &str, flags: &[&str]) -> Option<PathBuf> {
    let flags = [
        &[
            "-std=gnu11",
            "-g",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-missing-field-initializers",
        ],
        flags,
    ]
    .concat();
    compile(name, "gcc", &flags, &sources("tests/c"))
}

fn all_passed(output: &str) {
    let passed = output
        .lines()
        .filter(|line| line.starts_with("ok "))
        .count();
    assert!(passed >= 40, "only {passed} scenarios ran:\n{output}");
}

#[test]
fn the_scenarios_in_c() {
    if let Some(program) = program("scenarios", &[]) {
        all_passed(&succeed(&mut Command::new(program)));
    }
}

#[test]
fn the_scenarios_in_c_under_the_address_sanitizer() {
    if let Some(program) = program(
        "scenarios-asan",
        &["-fsanitize=address,undefined", "-fno-sanitize-recover"],
    ) {
        all_passed(&succeed(&mut Command::new(program)));
    }
}

/// Leaks are the sanitizer's: here the children of a fork would have leaks of their own.
#[test]
fn the_scenarios_in_c_under_valgrind() {
    if !testkit::has_optional_program("valgrind") {
        return;
    }
    if let Some(program) = program("scenarios-valgrind", &[]) {
        let valgrind = [
            "-q",
            "--fair-sched=yes",
            "--error-exitcode=9",
            "--leak-check=no",
        ];
        all_passed(&succeed(
            Command::new("valgrind").args(valgrind).arg(program),
        ));
    }
}
