//! An output that would destroy an input is refused, whatever the names of the file are.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{by_default, scratch, text, trace, within};

/// Runs a command, which must refuse with one line and change nothing.
fn must_refuse(mut command: Command, file: &Path, status: i32, says: &str) {
    let before = fs::read(file).unwrap();
    let what = format!("{command:?}");
    let output = within("mmun", move || command.output().unwrap());
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{what}: {said}");
    assert!(
        said.contains(says) && said.lines().count() == 1,
        "{what}: {said}"
    );
    assert!(fs::read(file).unwrap() == before, "{what}");
}

/// Further names of a file: a hard link and a symbolic link.
fn links(file: &Path) -> [PathBuf; 2] {
    let links = ["hard", "soft"].map(scratch);
    fs::hard_link(file, &links[0]).unwrap();
    symlink(file, &links[1]).unwrap();
    links
}

#[test]
fn a_report_does_not_overwrite_its_trace() {
    let file = scratch("trace.jsonl");
    let mut command = trace();
    command.args(["--json", "-o"]).arg(&file).arg("true");
    assert!(command.status().unwrap().success());
    let [hard, soft] = links(&file);
    let report = || {
        let mut command = by_default(env!("CARGO_BIN_EXE_mmun"));
        command.arg("report").stdin(File::open(&file).unwrap());
        command
    };
    let says = "it is the trace";
    for output in [
        &file,
        &hard,
        &soft,
        Path::new("/dev/stdin"),
        Path::new("/proc/self/fd/0"),
    ] {
        for input in [Path::new("-"), &file] {
            let mut command = report();
            command.arg("-o").arg(output).arg(input);
            must_refuse(command, &file, 2, says);
        }
    }
    for input in [Path::new("-"), &file] {
        let mut command = report();
        command
            .arg(input)
            .stdout(File::options().append(true).open(&file).unwrap());
        must_refuse(command, &file, 2, says);
    }
    for path in [file, hard, soft] {
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn a_trace_and_a_run_do_not_overwrite_a_file_of_the_program() {
    let file = scratch("script");
    fs::write(&file, "#!/bin/sh\nexit 3\n").unwrap();
    let [hard, soft] = links(&file);
    let mmun = |words: &[&str], output: &Path| {
        let mut command = by_default(env!("CARGO_BIN_EXE_mmun"));
        command.args(words).arg(output);
        command
    };
    for words in [&["trace", "-o"][..], &["trace", "--report"], &["run", "-o"]] {
        for output in [&file, &hard, &soft] {
            let mut command = mmun(words, output);
            command.arg("--").args(["sh".as_ref(), file.as_os_str()]);
            must_refuse(
                command,
                &file,
                125,
                "the program's command line names it as well",
            );
            let mut command = mmun(words, output);
            command
                .arg("--")
                .arg("cat")
                .stdin(File::open(&file).unwrap());
            must_refuse(command, &file, 125, "it is the program's standard input");
            let mut command = mmun(words, output);
            let stdout = File::options().append(true).open(&file).unwrap();
            command.arg("--").arg("true").stdout(stdout);
            must_refuse(command, &file, 125, "it is the program's standard output");
        }
    }
    // An empty file has nothing to lose.
    let empty = scratch("empty");
    File::create(&empty).unwrap();
    let mut command = mmun(&["trace", "-o"], &empty);
    command.args(["--", "cat"]).arg(&empty);
    assert!(command.status().unwrap().success());
    for path in [file, hard, soft, empty] {
        fs::remove_file(path).unwrap();
    }
}
