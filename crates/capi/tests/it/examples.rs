//! Builds the examples as a user of the library would, and runs them.

use crate::support::{STRICT, compile, libraries, root, scratch};
use std::path::PathBuf;
use std::process::Command;
use testkit::{Cap, require};

/// Runs an example. An example may end with a line `SKIP` because the machine lacks a source. The
/// tests of that source then report the lack as well.
fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    if output.status.code() == Some(77) && stderr.contains("SKIP ") {
        let name = std::thread::current()
            .name()
            .unwrap_or("an example")
            .to_owned();
        println!("SKIP {name}: {}", stderr.trim().trim_start_matches("SKIP "));
        return;
    }
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stdout}\n{stderr}",
        output.status
    );
}

fn example(name: &str, compiler: &'static str, standard: &str) {
    let sources: Vec<PathBuf> = vec![root().join("examples").join(name)];
    if let Some(program) = compile(
        &format!("example-{name}"),
        compiler,
        &[&[standard, "-O2"], STRICT].concat(),
        &sources,
    ) {
        run(&mut Command::new(program));
    }
}

#[test]
fn a_registration_cache_over_mlock() {
    example("regcache_mlock.c", "gcc", "-std=gnu11");
}

#[test]
fn a_shadow_page_table() {
    example("shadow_table.c", "gcc", "-std=gnu11");
}

#[test]
fn a_driver_in_the_style_of_the_kernel() {
    example("two_devices.c", "gcc", "-std=gnu11");
}

#[test]
fn handles_of_cpp() {
    example("raii.cpp", "g++", "-std=c++11");
}

#[test]
fn a_stale_hit_in_python() {
    if require(Cap::Program("python3")) {
        run(Command::new("python3")
            .arg(root().join("examples/stale.py"))
            .arg(libraries().join("libmmun.so")));
    }
}

/// The program that `README.md` begins with.
#[test]
fn the_first_program() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("it is there");
    let program = readme
        .split("```c\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .expect("a program in C");
    let source = scratch("programs").join("first.c");
    std::fs::write(&source, program).expect("a file below target");
    if let Some(program) = compile("first", "gcc", &[&["-std=c99"], STRICT].concat(), &[source]) {
        let output = Command::new(program).output().expect("it runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() || stderr.contains(" lacks "),
            "{stderr}"
        );
    }
}
