//! Incomplete information: a `/proc` that hides processes or is missing, and programs that may not
//! be read.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use testkit::{Cap, require};

use crate::support::{Public, check, of_kind, parse, text, within};

const NOBODY: &str = "65534";

fn can_hide_proc() -> bool {
    require(Cap::Root)
        && require(Cap::MountNamespace)
        && require(Cap::Ptrace)
        && require(Cap::Program("unshare"))
}

/// A folder that every user can enter, with a copy of `mmun` and a shell that may be executed but
/// not read.
struct Open(Public);

impl Open {
    fn new() -> Open {
        let copy = Public::new();
        let shell = copy.folder().join("sh");
        testkit::copy_program(Path::new("/bin/sh"), &shell, 0o711);
        Open(copy)
    }

    /// Changes the mounts with `setup`, then runs `mmun trace` of the shell as the user `nobody`.
    fn trace(&self, setup: &str, script: &str) -> (Output, Vec<Value>) {
        let [path, shell] = ["trace.json", "sh"].map(|name| self.0.folder().join(name));
        let mut command = Command::new("unshare");
        let nobody = "exec setpriv --reuid=$0 --regid=$0 --clear-groups -- \"$@\"";
        command
            .args(["-m", "sh", "-c", &format!("{setup} && {nobody}"), NOBODY])
            .arg(self.0.mmun());
        command
            .args(["trace", "--json", "-o"])
            .arg(&path)
            .arg("--")
            .arg(shell)
            .args(["-c", script]);
        let output = stopping_all("mmun trace", command);
        let records = parse(&fs::read_to_string(&path).unwrap());
        check(&records);
        (output, records)
    }
}

/// Runs a command in a process group of its own, which is killed if it does not end.
fn stopping_all(what: &str, mut command: Command) -> Output {
    let child = command
        .process_group(0)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let group = child.id();
    let ended =
        std::panic::catch_unwind(|| within(what, move || child.wait_with_output().unwrap()));
    ended.unwrap_or_else(|panic| {
        // SAFETY: `kill` takes any integers; the group is this test's own.
        unsafe { libc::kill(-(group as i32), libc::SIGKILL) };
        std::panic::resume_unwind(panic)
    })
}

/// Four shells that each make 40 children, and print how many succeeded.
const FORKS: &str =
    "w() { n=0; i=0; while [ $i -lt 40 ]; do (exit 3); [ $? = 3 ] && n=$((n+1)); i=$((i+1)); done; echo $n; }
w & w & w & w & wait";

#[test]
fn every_child_runs_and_is_recorded_whatever_proc_shows() {
    if !can_hide_proc() || !require(Cap::Program("setpriv")) {
        return;
    }
    let open = Open::new();
    let hide = |option: &str| format!("mount -t proc -o hidepid={option} proc /proc");
    for setup in [
        "umount -l /proc",
        "mount -t tmpfs none /proc",
        &hide("1"),
        &hide("2"),
        &hide("4"),
        "true",
    ] {
        let (output, records) = open.trace(setup, FORKS);
        assert_eq!(
            (text(&output.stdout), output.status.code()),
            ("40\n40\n40\n40\n", Some(0)),
            "{setup}"
        );
        // The first shell forks four times, and each of the four shells forks 40 times.
        assert_eq!(of_kind(&records, "fork").count(), 164, "{setup}");
        // Each process has an address space of its own: the four shells, their children, and the
        // first program.
        assert_eq!(of_kind(&records, "mm_new").count(), 165, "{setup}");
    }
}

#[test]
fn without_proc_unknown_numbers_are_not_shown_as_zero() {
    if !can_hide_proc() {
        return;
    }
    let copy = Public::new();
    let mut command = Command::new("unshare");
    command
        .args([
            "-m",
            "sh",
            "-c",
            "mount -t tmpfs none /proc && exec \"$0\" \"$@\"",
        ])
        .arg(copy.mmun())
        .args(["trace", "--summary-only", "--", "sh", "-c", ":"])
        .stderr(std::process::Stdio::piped());
    let output = stopping_all("mmun trace", command);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let unmaps: Vec<&str> = said
        .lines()
        .find(|line| line.starts_with("unmap "))
        .unwrap()
        .split_whitespace()
        .collect();
    assert_eq!(unmaps[4], "?", "resident: {said}");
    assert!(!said.contains("removed nothing"), "{said}");
    let place = said
        .lines()
        .any(|line| line.trim_end().ends_with("?  (not known)"));
    assert!(place && said.contains("  where\n"), "{said}");
    assert!(said.contains("mmun: /proc did not show "), "{said}");
    // The tracer runs `mmun` itself to measure how long a stop takes.
    assert!(!said.contains("could not be measured"), "{said}");
}

#[test]
fn without_proc_doctor_says_what_works_and_coverage_what_it_needs() {
    if !can_hide_proc() {
        return;
    }
    let copy = Public::new();
    // One /proc may lie above another.
    let unmount = "while umount -l /proc 2>/dev/null; do :; done";
    for hide in [unmount, "mount -t tmpfs none /proc"] {
        // The second name of the program is relative, and is found in PATH.
        for program in [copy.mmun().to_str().unwrap(), "mmun"] {
            let script =
                format!("{hide}; PATH=.:$PATH; \"$0\" doctor --json; \"$0\" coverage; echo $?");
            let mut command = Command::new("unshare");
            command
                .args(["-m", "sh", "-c", &script, program])
                .current_dir(copy.folder())
                .stderr(std::process::Stdio::piped());
            let output = stopping_all("mmun doctor", command);
            let said = text(&output.stdout);
            let (rows, status) = said.trim_end().rsplit_once('\n').unwrap();
            let row = &parse(rows)[3];
            assert_eq!(
                (&row["source"], &row["usable"]),
                (&"process".into(), &true.into()),
                "{row}"
            );
            assert!(row["features"].to_string().contains("no-proc"), "{row}");
            assert_eq!(status, "2");
            let error = text(&output.stderr);
            assert!(
                error.contains("mount /proc") && error.lines().count() == 1,
                "{error}"
            );
        }
    }
}

#[test]
fn a_proc_of_another_pid_namespace_is_reported() {
    if !require(Cap::MountNamespace) {
        return;
    }
    let run = |options: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(options)
            .arg(env!("CARGO_BIN_EXE_mmun"))
            .args(["trace", "-o", "/dev/null", "sh", "-c", FORKS])
            .stderr(std::process::Stdio::piped());
        let output = stopping_all("mmun trace", command);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(text(&output.stdout), "40\n40\n40\n40\n");
        text(&output.stderr).to_owned()
    };
    assert!(run(&["--pid", "--fork"]).contains("another pid namespace's"));
    assert_eq!(run(&["--pid", "--fork", "--mount-proc"]), "");
}
