//! Programs that misuse the library.

use crate::support::{STRICT, compile, root, sources, succeed};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use testkit::{Cap, require};

/// Runs the hostile programs over one source: closed descriptors, signals, small stacks, forks,
/// cancelled threads, an empty root folder, an exit inside a callback. Each is a process of its
/// own.
fn hostile(source: &str) {
    let flags = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror"];
    let name = format!("hostile-{source}");
    let Some(program) = compile(&name, "gcc", &flags, &sources("tests/c/hostile")) else {
        return;
    };
    let output = succeed(Command::new(program).arg(source));
    for line in output.lines().filter(|line| line.starts_with("skipped ")) {
        println!("SKIP {line}: only root may change the root folder");
    }
    assert_eq!(output.lines().count(), 20, "{output}");
}

#[test]
fn hostile_programs_over_their_own_invalidations() {
    hostile("own");
}

#[test]
#[cfg(all(
    any(target_arch = "x86_64", target_arch = "aarch64"),
    target_env = "gnu"
))]
fn hostile_programs_over_the_hook() {
    hostile("hook");
}

#[test]
fn hostile_programs_over_the_kernel() {
    if require(Cap::Kvm) && require(Cap::Bpf) {
        hostile("kernel");
    }
}

#[test]
fn an_exception_that_leaves_a_callback_ends_the_process() {
    let sources = [root().join("tests/cpp/throws.cpp")];
    let Some(program) = compile(
        "throws",
        "g++",
        &[&["-std=c++11", "-g"], STRICT].concat(),
        &sources,
    ) else {
        return;
    };
    for which in [
        "start",
        "end",
        "register",
        "deregister",
        "notifier",
        "alloc",
        "free",
        "free at once",
        "interval",
    ] {
        let output = Command::new(&program)
            .arg(which)
            .output()
            .expect("the program runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.signal(),
            Some(libc::SIGABRT),
            "{which}: {}\n{stderr}",
            output.status
        );
        assert!(
            stderr.contains("libmmun: ") && stderr.contains("exception"),
            "{which}:\n{stderr}"
        );
    }
}
