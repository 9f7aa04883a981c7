//! Each failure prints one line, and the exit status identifies the kind of failure.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, ExitStatus, Stdio};

use testkit::rounds;

use crate::support::{Fifo, kill, scratch, text, trace, within};

/// Runs `mmun trace ARGS`, which must print one line and nothing else.
fn refused(args: &[&str]) -> (Option<i32>, String) {
    let mut command = trace();
    command.args(args);
    let output = within("mmun trace", move || command.output().unwrap());
    let line = text(&output.stderr);
    assert!(
        line.starts_with("mmun: ") && line.ends_with('\n') && line.lines().count() == 1,
        "{args:?}: {line:?}"
    );
    assert!(output.stdout.is_empty());
    (output.status.code(), line.to_owned())
}

#[test]
fn a_program_that_does_not_exist_is_127() {
    for args in [
        &["no-such-program-anywhere"][..],
        &["/no/such/file"],
        &["./missing"],
        &["--no-seccomp", "/no/such/file"],
    ] {
        let (code, line) = refused(&[&["-o", "/dev/null"], args].concat());
        assert_eq!(code, Some(127), "{line}");
        assert!(
            line.contains(args.last().unwrap()) && line.contains("No such file"),
            "{line}"
        );
    }
}

#[test]
fn a_process_that_traces_mmun_itself_is_refused() {
    let mut command = trace();
    let script = "\"$0\" trace -o /dev/null -p $PPID; echo $?";
    command.args(["-o", "/dev/null", "--", "sh", "-c", script, command_path()]);
    let output = within("two tracers of each other", move || {
        command.output().unwrap()
    });
    let line = text(&output.stderr);
    assert!(
        line.contains(" traces this one: each would wait for the other\n"),
        "{line}"
    );
    assert_eq!(
        (text(&output.stdout), output.status.code()),
        ("125\n", Some(0))
    );
}

#[test]
fn a_tracer_in_a_trace_reports_that_it_is_traced_itself() {
    let (code, line) = refused(&[
        "-o",
        "/dev/null",
        "--",
        command_path(),
        "trace",
        "-o",
        "/dev/null",
        "--",
        "true",
    ]);
    assert_eq!(code, Some(125));
    assert!(line.contains("; this process is itself traced"), "{line}");
}

fn command_path() -> &'static str {
    env!("CARGO_BIN_EXE_mmun")
}

#[test]
fn a_script_without_its_interpreter_is_127_as_in_bash_with_a_hint() {
    let file = scratch("script");
    testkit::write_program("#!/no/such/interpreter\n", &file);
    let (code, line) = refused(&["-o", "/dev/null", file.to_str().unwrap()]);
    assert_eq!(code, Some(127));
    assert!(
        line.ends_with("; the file is there, its interpreter is not\n"),
        "{line}"
    );
    fs::remove_file(&file).unwrap();
}

#[test]
fn a_thread_is_refused_with_its_process() {
    let (tid, done) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // SAFETY: `gettid` has no preconditions.
            tid.0.send(unsafe { libc::gettid() }).unwrap();
            done.1.recv().unwrap_err();
        });
        let thread = tid.1.recv().unwrap();
        let (code, line) = refused(&["-o", "/dev/null", "-p", &thread.to_string()]);
        drop(done.0);
        assert_eq!(code, Some(125));
        assert!(
            line.contains(&format!(
                "{thread} is a thread of process {}",
                std::process::id()
            )),
            "{line}"
        );
    });
}

#[test]
fn a_program_that_cannot_be_run_is_126() {
    let file = scratch("not-a-program");
    fs::write(&file, "neither script nor binary\n").unwrap();
    let name = file.to_str().unwrap();
    assert_eq!(
        refused(&["-o", "/dev/null", name]).0,
        Some(126),
        "not executable"
    );
    fs::remove_file(&file).unwrap();
    testkit::write_program("neither script nor binary\n", &file);
    assert_eq!(
        refused(&["-o", "/dev/null", name]).0,
        Some(126),
        "not a format"
    );
    assert_eq!(
        refused(&["-o", "/dev/null", "/"]).0,
        Some(126),
        "a directory"
    );
    fs::remove_file(&file).unwrap();
}

#[test]
fn no_such_process_is_125() {
    let (code, line) = refused(&["-o", "/dev/null", "-p", "4194303"]);
    assert_eq!(code, Some(125));
    assert!(
        line.contains("4194303") && line.to_lowercase().matches("no such process").count() == 1,
        "{line}"
    );
    assert!(line.contains("ps -e"), "a hint: {line}");
}

#[test]
fn a_process_that_may_not_be_traced_is_125() {
    // The process has a tracer already.
    let gate = Fifo::new("gate");
    let ready = Fifo::new("ready");
    let script = format!(
        "echo $$ > {}; read x < {}",
        ready.0.display(),
        gate.0.display()
    );
    let mut first = trace();
    first.args(["-o", "/dev/null", "--", "sh", "-c", &script]);
    let mut first = first.spawn().unwrap();
    let pid = ready.read();
    let (code, line) = refused(&["-o", "/dev/null", "-p", pid.trim()]);
    gate.write("go\n");
    within("the first mmun", move || first.wait().unwrap());
    assert_eq!(code, Some(125), "{line}");
    assert!(
        line.contains(pid.trim()) && line.contains("not permitted"),
        "{line}"
    );
    assert!(line.contains("traces it already"), "a hint: {line}");
}

#[test]
fn a_trace_that_does_not_begin_leaves_the_output_as_it_was() {
    let file = scratch("earlier");
    fs::write(&file, "an earlier trace\n").unwrap();
    let name = file.to_str().unwrap();
    let mut idle = std::process::Command::new("cat")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    for args in [
        &["--summary", "-p", &idle.id().to_string(), "-p", "4194303"][..],
        &["/no/such/file"],
    ] {
        refused(&[&["-o", name], args].concat());
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            "an earlier trace\n",
            "{args:?}"
        );
    }
    drop(idle.stdin.take());
    assert!(idle.wait().unwrap().success());
    // A file that did not exist is not made.
    let fresh = scratch("fresh");
    refused(&["-o", fresh.to_str().unwrap(), "/no/such/file"]);
    assert!(!fresh.exists());
    // A trace that does begin replaces the file.
    assert!(
        trace()
            .args(["-o", name, "true"])
            .output()
            .unwrap()
            .status
            .success()
    );
    assert!(!fs::read_to_string(&file).unwrap().contains("earlier"));
    fs::remove_file(&file).unwrap();
}

#[test]
fn an_unwritable_output_is_refused_before_anything_starts() {
    let started = scratch("started");
    let (code, line) = refused(&[
        "-o",
        "/no/such/dir/file",
        "--",
        "touch",
        started.to_str().unwrap(),
    ]);
    assert_eq!(code, Some(125));
    assert!(line.contains("/no/such/dir/file"), "{line}");
    assert!(!started.exists());
}

#[test]
fn an_unknown_event_or_option_is_refused_before_anything_starts() {
    let started = scratch("started");
    let touch = ["touch", started.to_str().unwrap()];
    for (options, word) in [
        (&["-e", "unmap,nonsense"][..], "protection_vma"),
        (&["--nonsense"], "--nonsense"),
        (&["-p", "1"], "cannot be used with"),
        (&["-p", "many"], "many"),
    ] {
        let (code, line) = refused(&[options, &touch].concat());
        assert_eq!(code, Some(125));
        assert!(line.contains(word), "{line}");
    }
    assert_eq!(refused(&[]).0, Some(125));
    assert!(!started.exists());
}

#[test]
fn a_full_disk_is_reported_once_and_the_program_continues() {
    let done = Fifo::new("done");
    let script = format!(
        "for i in $(seq {}); do ls / > /dev/null; done; echo fine > {}",
        rounds(60),
        done.0.display()
    );
    let mut command = trace();
    command
        .args(["--json", "-o", "/dev/full", "sh", "-c", &script])
        .stderr(Stdio::piped());
    let mut mmun = command.spawn().unwrap();
    assert_eq!(done.read(), "fine\n");
    let output = within("mmun trace", move || {
        let mut line = String::new();
        std::io::Read::read_to_string(&mut mmun.stderr.take().unwrap(), &mut line).unwrap();
        (mmun.wait().unwrap(), line)
    });
    assert_eq!(output.0.code(), Some(125));
    must_be_one_line(&output.1, "/dev/full: No space left on device");
}

/// The program may have ended by the time of the message.
fn must_be_one_line(text: &str, failure: &str) {
    let begin = format!("mmun: write on {failure}; the trace ");
    assert!(text.starts_with(&begin), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

/// A traced shell makes so many calls that the output fails, then waits at a gate, then reports the
/// state of `mmun`. `output` gets the running `mmun` first.
fn must_outlast(
    options: &[&str],
    mut output: impl FnMut(&mut Child) -> Option<ChildStderr>,
) -> ExitStatus {
    let [ready, gate, done] = ["ready", "gate", "done"].map(Fifo::new);
    let script = format!(
        "exec 2> /dev/null; for i in $(seq {}); do ls / > /dev/null; done; echo here > {}; read front < {}; \
         ls / > /dev/null && grep State /proc/$front/status > {}",
        rounds(60),
        ready.0.display(),
        gate.0.display(),
        done.0.display()
    );
    let mut command = trace();
    command
        .arg("--json")
        .args(options)
        .args(["sh", "-c", &script]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut mmun = command.spawn().unwrap();
    let stderr = output(&mut mmun);
    assert_eq!(ready.read(), "here\n");
    if let Some(stderr) = stderr {
        let line = first_line(stderr);
        assert!(
            line.ends_with("; the trace ends here, and the program runs on untraced\n"),
            "{line}"
        );
    }
    let (front, gate) = (mmun.id(), gate.0.clone());
    within("the gate", move || {
        fs::write(gate, format!("{front}\n")).unwrap()
    });
    let state = done.read();
    assert!(state.contains("sleeping"), "mmun has not waited: {state}");
    within("mmun trace", move || mmun.wait().unwrap())
}

fn first_line(stream: ChildStderr) -> String {
    within("a line", move || {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line
    })
}

#[test]
fn mmun_waits_for_the_program_although_the_trace_has_ended() {
    for option in ["--follow", "--no-seccomp"] {
        let status = must_outlast(&[option, "-o", "/dev/full"], |mmun| mmun.stderr.take());
        assert_eq!(status.code(), Some(125), "{option}");
        let status = must_outlast(&[option, "-o", "-"], |mmun| {
            drop(mmun.stdout.take());
            None
        });
        assert_eq!(status.signal(), Some(libc::SIGPIPE), "{option}");
    }
}

#[test]
fn a_signal_ends_the_wait_for_a_program_whose_trace_has_ended() {
    for option in ["--follow", "--no-seccomp"] {
        let (ready, gate) = (Fifo::new("ready"), Fifo::new("gate"));
        let script = format!(
            "for i in $(seq {}); do ls / > /dev/null; done; exec 2> /dev/null; echo here > {}; read x < {}",
            rounds(60),
            ready.0.display(),
            gate.0.display()
        );
        let mut command = trace();
        command.args([option, "--json", "-o", "/dev/full", "sh", "-c", &script]);
        let mut mmun = command.stderr(Stdio::piped()).spawn().unwrap();
        assert_eq!(ready.read(), "here\n");
        let line = first_line(mmun.stderr.take().unwrap());
        assert!(line.ends_with(" runs on untraced\n"), "{line}");
        kill(mmun.id(), libc::SIGTERM);
        let status = within("mmun trace", move || mmun.wait().unwrap());
        assert_eq!(status.signal(), Some(libc::SIGTERM), "{option}");
        gate.write("go\n");
    }
}

#[test]
fn a_limit_of_file_size_is_reported_once_and_the_program_continues() {
    let done = Fifo::new("done");
    let records = scratch("file-size");
    let script = format!(
        "ulimit -f 8; exec {} trace --json -o {} sh -c \"for i in \\$(seq 20); do ls / > /dev/null; done; echo fine > {}\"",
        env!("CARGO_BIN_EXE_mmun"),
        records.display(),
        done.0.display()
    );
    let mut mmun = std::process::Command::new("sh")
        .args(["-c", &script])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(done.read(), "fine\n");
    let (status, line) = within("mmun trace", move || {
        let mut line = String::new();
        std::io::Read::read_to_string(&mut mmun.stderr.take().unwrap(), &mut line).unwrap();
        (mmun.wait().unwrap(), line)
    });
    assert_eq!(status.code(), Some(125));
    must_be_one_line(&line, &format!("{}: File too large", records.display()));
}
