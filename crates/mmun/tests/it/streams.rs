//! A program gets the standard streams of the caller; a closed stream stays closed.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use testkit::{Cap, require};

use crate::support::{dropin, text, within};

const OPEN: i32 = 3;
const CLOSED: i32 = 4;

/// Closes `stream` and runs `sh` behind the words `before`, such as `mmun run --`. Returns its exit
/// status, which says whether the stream is open in `sh`.
fn run(before: &[&str], stream: i32) -> Option<i32> {
    let script = format!("test -e /proc/self/fd/{stream} && exit {OPEN}; exit {CLOSED}");
    let words: Vec<&str> = [before, &["sh", "-c", &script]].concat();
    let mut command = Command::new(words[0]);
    command
        .args(&words[1..])
        .env("MMUN_DROPIN", dropin())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let close = move || {
        // SAFETY: the new process uses none of its standard streams before its program runs.
        unsafe { libc::close(stream) };
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, and makes one system call.
    unsafe { command.pre_exec(close) };
    within("a program without a stream", move || {
        command.status().unwrap().code()
    })
}

#[test]
fn a_closed_stream_is_closed_for_the_program_as_well() {
    if !require(Cap::Ptrace) {
        return;
    }
    let mmun = env!("CARGO_BIN_EXE_mmun");
    let ways: [&[&str]; 4] = [
        &[],
        &[mmun, "trace", "-o", "/dev/null", "--"],
        &[mmun, "run", "--"],
        &[mmun, "run", "--no-report", "--"],
    ];
    for before in ways {
        for stream in 0..3 {
            assert_eq!(run(before, stream), Some(CLOSED), "{before:?} {stream}");
        }
    }
}

#[test]
fn help_of_a_command_is_its_help_option() {
    let help = |words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_mmun"))
            .args(words)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{words:?}");
        text(&output.stdout).to_owned()
    };
    assert_eq!(help(&["help", "trace"]), help(&["trace", "--help"]));
    assert_eq!(help(&["help"]), help(&["--help"]));
}
