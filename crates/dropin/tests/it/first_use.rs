//! The first use of a library while other threads fork, load libraries, or have a first use, too.

use crate::support::{build, library, output, text};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The program, and a stand-in of this test's own for `name`.
fn built(name: &str, scenario: &str) -> Option<(PathBuf, PathBuf)> {
    // `-rdynamic`, because the plugin calls a function of the program.
    let program = build("gcc", "first_use.c", "first", &["-rdynamic", "-ldl"])?;
    let stand_in = build("gcc", "stand_in.c", "shared", &["-shared", "-fPIC"])?;
    // The drop-in finds a library by the beginning of its file's name.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let file = folder.join(format!("{name}.so.{}-{scenario}", std::process::id()));
    std::fs::copy(stand_in, &file).unwrap();
    Some((program, file))
}

fn run(scenario: &str, source: &str, more: &[&Path]) {
    for (name, file) in [("ucx", "libucm"), ("libfabric", "libfabric")] {
        let Some((program, stand_in)) = built(file, scenario) else {
            return;
        };
        let mut command = Command::new(program);
        command
            .args([scenario, name])
            .arg(stand_in)
            .args(more)
            .env("LD_PRELOAD", library())
            .env("MMUN", source);
        let output = output(command);
        assert_eq!(
            (text(&output.stdout).as_str(), output.status.code()),
            ("done\n", Some(0)),
            "{scenario} {name} {source}: {}",
            text(&output.stderr)
        );
    }
}

#[test]
fn a_child_has_its_own_though_the_parent_was_inside_of_one() {
    run("inside", "auto", &[]);
    run("bound", "auto", &[]);
}

#[test]
fn a_child_is_served_though_the_parent_was_loading_a_library() {
    run("loader", "auto", &[]);
    run("served", "auto", &[]);
}

#[test]
fn a_constructor_and_another_thread_do_not_wait_for_each_other() {
    let Some(plugin) = build("gcc", "plugin.c", "shared", &["-shared", "-fPIC"]) else {
        return;
    };
    for _ in 0..5 {
        run("constructor", "auto", &[&plugin]);
    }
}

/// Python can load one UCX for mpi4py, and another one from a wheel.
#[test]
fn each_of_two_copies_of_ucx_gets_its_own_calls() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(stand_in) = build("gcc", "stand_in.c", "shared", &["-shared", "-fPIC"]) else {
        return;
    };
    let program = build("gcc", "copies.c", "copies", &["-ldl"]).expect("gcc was there");
    let plugins = ["a", "b"].map(|name| {
        let copy = folder.join(format!("libucs-{name}{}.so", std::process::id()));
        std::fs::copy(&stand_in, &copy).unwrap();
        let flags = ["-shared", "-fPIC", copy.to_str().unwrap()];
        build("gcc", "copy_plugin.c", name, &flags).expect("gcc was there")
    });
    let mut command = Command::new(program);
    command
        .args(&plugins)
        .env("LD_PRELOAD", library())
        .env("MMUN", "auto");
    let output = output(command);
    assert_eq!(
        (text(&output.stdout).as_str(), output.status.code()),
        ("own\nown\n", Some(0)),
        "{}",
        text(&output.stderr)
    );
}
