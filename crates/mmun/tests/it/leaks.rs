//! Programs that look for leaks at their end.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process_group};
use testkit::{Cap, require};

use crate::odd::Program;
use crate::support::{text, trace, within};

/// A program under LeakSanitizer traces itself to look for leaks, but a program can have only one
/// tracer. The help names the remedy.
#[test]
fn a_program_that_looks_for_leaks_fails_under_a_trace_unless_told_not_to() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let source = "int main() { return 7; }";
    let Some(program) = Program::try_new("gcc", source, "odd.c", &["-fsanitize=address"]) else {
        println!("SKIP leaks::a_program_that_looks_for_leaks: gcc has no AddressSanitizer");
        return;
    };
    let ends = |mut command: Command, options: &str| {
        command.env("LSAN_OPTIONS", options).arg(&program.0);
        within("the program", move || command.output().unwrap())
    };
    let traced = || {
        let mut command = trace();
        command.args(["-o", "/dev/null"]);
        command
    };
    if ends(Command::new("env"), "").status.code() != Some(7) {
        // In a container that forbids ptrace, or under a tracer.
        println!("SKIP leaks::a_program_that_looks_for_leaks: it fails untraced");
        return;
    }
    let mut command = traced();
    let mut group = command
        .env("LSAN_OPTIONS", "")
        .arg(&program.0)
        .process_group(0)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(group.stderr.take().unwrap()).lines();
    let (said, hangs) = within("its message", move || {
        let mut said = String::new();
        for line in lines.map_while(Result::ok) {
            said += &line;
            // The task that looks for leaks is untraced, so the filter refuses its `munmap`. With
            // GCC 14 the task ends there, and the program waits for it.
            if line.contains("Sanitizer failed to deallocate") {
                return (said, true);
            }
        }
        (said, false)
    });
    if hangs {
        kill_process_group(Pid::from_child(&group), Signal::KILL).unwrap();
    }
    let status = within("the program", move || group.wait().unwrap());
    assert!(hangs || status.code() == Some(1), "{status}: {said}");
    assert!(hangs || said.contains("LeakSanitizer"), "{said}");
    let output = ends(traced(), "detect_leaks=0");
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
}
