//! `mmun run` hands signals on: before the program is there, while it runs, and not afterwards.

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use testkit::{Cap, require};

use crate::run::{run, sh};
use crate::support::{Fifo, kill, scratch, text, within};

#[test]
fn signals_that_are_sent_to_it_reach_the_program() {
    for (name, signal) in [
        ("TERM", libc::SIGTERM),
        ("USR1", libc::SIGUSR1),
        ("INT", libc::SIGINT),
        ("HUP", libc::SIGHUP),
    ] {
        let ready = Fifo::new("ready");
        // A shell runs its trap between two commands. If it checked for signals just before a
        // blocking command, it would then wait for ever.
        let script = format!(
            "trap 'exit 9' {name}; echo > {}; while :; do :; done",
            ready.0.display()
        );
        let mut child = sh(&script).stderr(Stdio::null()).spawn().unwrap();
        assert_eq!(ready.read(), "\n");
        kill(child.id(), signal);
        let status = within("mmun run", move || child.wait().unwrap());
        assert_eq!(status.code(), Some(9), "{name}");
    }
}

#[test]
fn a_signal_before_the_program_is_there_is_not_lost() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let (source, library) = (
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/early_signal.c"),
        scratch("early_signal.so"),
    );
    let mut gcc = Command::new("gcc");
    gcc.args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(source);
    assert!(gcc.status().unwrap().success());
    for (which, signal) in [("kernel", libc::SIGINT), ("sent", libc::SIGTERM)] {
        let mut command = sh("exec sleep 60");
        command
            .env("LD_PRELOAD", &library)
            .env("BEFORE_FORK", which)
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let status = within("mmun run", move || child.wait().unwrap());
        assert_eq!(status.signal(), Some(signal), "{which}: {status}");
    }
    // Without a folder for reports there is no fork: `mmun` becomes the program.
    let mut command = sh("exit 4");
    command.env("LD_PRELOAD", &library).env("IN_MKDIR", "1");
    let output = within("mmun run", move || command.output().unwrap());
    assert_eq!(output.status.signal(), Some(libc::SIGTERM), "{output:?}");
    assert!(text(&output.stderr).contains("no report: "), "{output:?}");
    fs::remove_file(library).unwrap();
}

#[test]
fn a_signal_after_the_program_has_ended_is_its_own() {
    let ready = Fifo::new("ready");
    // `mmun` blocks in writing the report, because the pipe is full and this test does not read it.
    let (_reader, mut full) = std::io::pipe().unwrap();
    let number = full.as_raw_fd();
    let set = |flags: i32| {
        // SAFETY: `fcntl` with `F_SETFL` takes an integer.
        assert_eq!(unsafe { libc::fcntl(number, libc::F_SETFL, flags) }, 0);
    };
    set(libc::O_NONBLOCK);
    for part in [4096, 1] {
        while full.write(&vec![0; part]).is_ok() {}
    }
    set(0);
    let script = format!("echo > {}", ready.0.display());
    let mut child = run()
        .args(["-o", "-", "--", "sh", "-c", &script])
        .stdout(full)
        .spawn()
        .unwrap();
    assert_eq!(ready.read(), "\n");
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    while !fs::read_to_string(&children).unwrap().is_empty() {
        std::thread::yield_now();
    }
    kill(child.id(), libc::SIGTERM);
    let status = within("mmun run", move || child.wait().unwrap());
    assert_eq!(status.signal(), Some(libc::SIGTERM));
}
