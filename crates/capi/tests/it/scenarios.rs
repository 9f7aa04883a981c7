//! Runs the scenarios of the contract that C can express, as one program.

use crate::support::{compile, root, sources, succeed};
use std::collections::BTreeMap;
use std::fs;
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
    let written = programs().len();
    assert_eq!(passed, written, "of {written} scenarios:\n{output}");
}

/// Returns the name of each scenario's function, and its file.
fn programs() -> BTreeMap<String, String> {
    let of_file = |path: &PathBuf| {
        let text = fs::read_to_string(path).expect("a source file");
        let file = path.file_name().expect("it has a name").to_string_lossy();
        let names = text.split("SCENARIO(").skip(1);
        let names = names.filter_map(|rest| rest.split_once(')').map(|(name, _)| name));
        names
            .filter(|name| *name != "name")
            .map(|name| (name.to_owned(), file.to_string()))
            .collect::<Vec<_>>()
    };
    sources("tests/c").iter().flat_map(of_file).collect()
}

/// Each line of the table is `ID FILE`, or `ID - REASON`. The test compares the lines with the
/// programs.
#[test]
fn every_scenario_of_the_contract_has_a_test_in_c_or_a_reason() {
    let table = fs::read_to_string(root().join("tests/c/scenarios.txt")).expect("the table");
    let mut ids = Vec::new();
    let programs = programs();
    for line in table.lines().filter(|line| !line.starts_with('#')) {
        let (id, rest) = line.split_once(' ').expect("an id and a word");
        let name = format!("_{}_", id.to_lowercase().replace('-', "_"));
        let found = programs
            .iter()
            .find(|(function, _)| format!("_{function}").contains(&name));
        match (found, rest.strip_prefix("- ")) {
            (None, Some(why)) => assert!(why.len() > 20, "{line}"),
            (Some((_, file)), None) => assert_eq!(rest, file, "{line}"),
            (found, _) => panic!("{line}: found {found:?}"),
        }
        ids.push(id);
    }
    for function in programs.keys() {
        let words: Vec<&str> = function.split('_').collect();
        for id in words.windows(2).filter(|id| ["s", "b"].contains(&id[0])) {
            if id[1].bytes().all(|byte| byte.is_ascii_digit()) {
                let id = format!("{}-{}", id[0].to_uppercase(), id[1]);
                assert!(
                    ids.contains(&id.as_str()),
                    "{function}: {id} is not in the table"
                );
            }
        }
    }
    let count = |letter| ids.iter().filter(|id| id.starts_with(letter)).count();
    assert_eq!(
        (count('S'), count('B')),
        (77, 43),
        "the number of scenarios in the contract"
    );
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

/// Valgrind does not check leaks here, because it would report leaks in the children of a fork. The
/// address sanitizer checks leaks.
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
