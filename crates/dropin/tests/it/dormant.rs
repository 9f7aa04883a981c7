//! A program that uses neither library is left alone.

use crate::support::{build, library, output, preloaded, text};
use std::process::Command;

/// The counts of a shell's threads and open descriptors, and its standard error, which would have a
/// report.
fn state(mut command: Command) -> (String, String) {
    command.args(["-c", "ls /proc/self/task | wc -l; ls /proc/self/fd | wc -l"]);
    let output = output(command);
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_shell_has_no_thread_no_descriptor_and_no_report() {
    assert_eq!(state(preloaded("sh", "both")), state(Command::new("sh")));
}

#[test]
fn libc_is_not_patched() {
    // libc's code is one mapping as long as the hook has replaced no page of it.
    let mut command = preloaded("grep", "both");
    command.args(["-c", "r-xp.*/libc.so", "/proc/self/maps"]);
    assert_eq!(text(&output(command).stdout), "1\n");
}

#[test]
fn it_needs_nothing_but_libc() {
    let output = output({
        let mut command = Command::new("ldd");
        command.arg(library());
        command
    });
    let needs = text(&output.stdout);
    for line in needs.lines() {
        let known = ["linux-vdso", "libc.so.6", "ld-linux", "libm.so.6"];
        assert!(
            known.iter().any(|name| line.contains(name)),
            "each further library slows the start of every program: {needs}"
        );
    }
}

/// Later, in a process with threads, each registration takes some 12 ms.
#[test]
fn a_process_is_registered_for_membarrier_while_it_has_one_thread() {
    let Some(program) = build("gcc", "registered.c", "registered", &[]) else {
        return;
    };
    // `PRIVATE_EXPEDITED` for the core, `PRIVATE_EXPEDITED_SYNC_CORE` for `hook`.
    let both = 1 << 4 | 1 << 6;
    match text(&output(preloaded(program.to_str().unwrap(), "both")).stdout).trim() {
        "-1" => println!("SKIP: the kernel does not say for what a process is registered"),
        known => assert_eq!(known, both.to_string()),
    }
}

#[test]
fn wrong_settings_are_reported_at_the_first_use_and_not_before() {
    assert_eq!(text(&output(preloaded("true", "nonsense")).stderr), "");
}
