//! Compares the binary interface (symbols, sizes and offsets) with lists that only grow.

use crate::support::{compile, libraries, root, scratch, succeed};
use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use testkit::{Cap, require};

fn list(name: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("abi").join(name)).expect("the list is there");
    text.lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_symbols_are_those_of_the_list() {
    if !require(Cap::Program("nm")) || !require(Cap::Program("gcc")) {
        return;
    }
    let library = libraries().join("libmmun.so");
    let output = succeed(
        Command::new("nm")
            .args(["-D", "--defined-only"])
            .arg(&library),
    );
    let found: BTreeSet<String> = output
        .lines()
        .filter_map(|line| line.split(' ').nth(2).map(str::to_owned))
        .collect();
    let found: BTreeSet<String> = found
        .into_iter()
        .filter(|symbol| symbol != "MMUN_0")
        .collect();
    assert_eq!(
        found,
        list("symbols.txt"),
        "abi/symbols.txt lists the symbols that programs were linked with: only add to it"
    );
    let dynamic = succeed(Command::new("readelf").arg("-d").arg(&library));
    assert!(dynamic.contains("[libmmun.so.0]"), "{dynamic}");
}

/// A line of the list is `size STRUCT SIZE` or `STRUCT.FIELD OFFSET`.
#[test]
fn sizes_and_offsets_are_those_of_the_list() {
    let list = list("layout.txt");
    let mut program = String::from(
        "#include <mmun/mmu_notifier.h>\n#include <mmun/mmun.h>\n#include <stdio.h>\nint main(void) {\n",
    );
    for line in &list {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["size", name, _] => {
                program += &format!("printf(\"size {name} %zu\\n\", sizeof(struct {name}));\n")
            }
            [field, _] => {
                let (name, field) = field.split_once('.').expect("STRUCT.FIELD");
                program += &format!(
                    "printf(\"{name}.{field} %zu\\n\", offsetof(struct {name}, {field}));\n"
                );
            }
            _ => panic!("abi/layout.txt: {line}"),
        }
    }
    program += "return 0; }\n";
    let source = scratch("programs").join("layout.c");
    fs::write(&source, program).expect("a file below target");
    if let Some(program) = compile("layout", "gcc", &["-std=c11"], &[source]) {
        let found: BTreeSet<String> = succeed(&mut Command::new(program))
            .lines()
            .map(str::to_owned)
            .collect();
        assert_eq!(found, list, "the header is not what abi/layout.txt says");
    }
}
