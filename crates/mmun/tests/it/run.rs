//! `mmun run`: the program runs as if `mmun` were not there, with the drop-in preloaded.

use std::fs;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};

use testkit::{Cap, PYTHON, require};

use crate::support::{Fifo, by_default, dropin, kill, scratch, text, within};

pub(crate) fn run() -> Command {
    let mut command = by_default(env!("CARGO_BIN_EXE_mmun"));
    command.arg("run").env("MMUN_DROPIN", dropin());
    for own in ["MMUN", "MMUN_REPORT", "MMUN_STRICT"] {
        command.env_remove(own);
    }
    command
}

pub(crate) fn sh(script: &str) -> Command {
    let mut command = run();
    command.args(["--", "sh", "-c", script]);
    command
}

#[test]
fn it_ends_as_the_program_did() {
    let code = |script| sh(script).output().unwrap().status;
    assert_eq!(code("exit 0").code(), Some(0));
    assert_eq!(code("exit 7").code(), Some(7));
    assert_eq!(code("exit 125").code(), Some(125));
    assert_eq!(code("kill -TERM $$").signal(), Some(libc::SIGTERM));
    assert_eq!(code("kill -KILL $$").signal(), Some(libc::SIGKILL));
}

#[test]
fn it_runs_where_the_session_is_of_another_pid_namespace() {
    if !require(Cap::MountNamespace) {
        return;
    }
    // `unshare` stays outside the new namespace, and it or its caller leads the session and the
    // group.
    let mut command = by_default("unshare");
    command
        .args(["--pid", "--fork", "--mount-proc"])
        .args([
            env!("CARGO_BIN_EXE_mmun"),
            "run",
            "--",
            "sh",
            "-c",
            "(kill -STOP $$; kill -CONT $$) & wait; exit 7",
        ])
        .env("MMUN_DROPIN", dropin());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
}

#[test]
fn a_program_that_cannot_be_run_is_reported_in_one_line() {
    for (program, code) in [("/nonexistent", 127), ("/etc/passwd", 126)] {
        for option in ["--source=auto", "--no-report"] {
            let output = run().args([option, "--", program]).output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{program}");
            let error = text(&output.stderr);
            assert!(
                error.starts_with(&format!("mmun: execve on {program}: "))
                    && error.lines().count() == 1,
                "{error}"
            );
        }
    }
    let output = run()
        .env("MMUN_DROPIN", "/nonexistent")
        .args(["--", "true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(
        text(&output.stderr),
        "mmun: MMUN_DROPIN=/nonexistent: no such file\n"
    );
    let output = run().output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stderr).lines().count()),
        (Some(125), 1)
    );
}

#[test]
fn without_proc_a_variable_names_the_library() {
    if !require(Cap::MountNamespace) || !require(Cap::Program("unshare")) {
        return;
    }
    let with = |variable: &str| {
        let mut command = by_default("unshare");
        let script = "mount -t tmpfs none /proc && exec \"$0\" run -- sh -c 'exit 7'";
        command.args(["-m", "sh", "-c", script, env!("CARGO_BIN_EXE_mmun")]);
        command.env(variable, dropin()).output().unwrap()
    };
    let output = with("UNUSED");
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let error = text(&output.stderr);
    assert!(error.contains("MMUN_DROPIN=FILE must name"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    let output = with("MMUN_DROPIN");
    assert_eq!(output.status.code(), Some(7), "{output:?}");
}

#[test]
fn input_output_and_arguments_pass_through() {
    let mut command = run();
    command.args([
        "--",
        "sh",
        "-c",
        "cat; echo $# \"$2\" >&2",
        "sh",
        "--json",
        "a  b",
    ]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"through").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "through");
    assert_eq!(
        text(&output.stderr),
        "2 a  b\nmmun: no use of UCX or libfabric came through the drop-in\n"
    );
}

#[test]
fn the_program_has_the_library_and_its_settings() {
    let script = "echo $LD_PRELOAD; echo $MMUN; echo $MMUN_STRICT; echo $MMUN_REPORT; grep -c mmun_dropin /proc/self/maps";
    let output = run()
        .env("LD_PRELOAD", "")
        .args(["--source=hook", "--strict", "--", "sh", "-c", script])
        .output()
        .unwrap();
    let lines: Vec<&str> = text(&output.stdout).lines().collect();
    assert_eq!(Path::new(lines[0]), dropin().canonicalize().unwrap());
    assert_eq!((lines[1], lines[2]), ("hook", "1"));
    assert!(
        lines[3].ends_with('/') && !fs::exists(lines[3]).unwrap(),
        "the directory is gone: {}",
        lines[3]
    );
    assert!(
        lines[4].parse::<u32>().unwrap() > 2,
        "grep itself has it too: {}",
        lines[4]
    );
    let output = run()
        .args(["--no-report", "--", "sh", "-c", "echo $$ $MMUN_REPORT"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = output.id();
    let output = output.wait_with_output().unwrap();
    assert_eq!(
        text(&output.stdout),
        format!("{pid}\n"),
        "without a report it is the program"
    );
}

#[test]
fn a_check_is_printed_before_the_program_runs() {
    let mut command = run();
    command.args(["--check", "--source=hook", "-o", "/dev/null"]);
    let output = command.args(["--", "sh", "-c", "echo it ran; exit 3"]);
    let output = output.output().unwrap();
    let lines: Vec<&str> = text(&output.stdout).lines().collect();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let row = |name: &str| {
        let mut rows = lines.iter().filter(|line| line.starts_with(name));
        rows.next().and_then(|row| row.split(' ').next_back())
    };
    assert_eq!(row("operation"), Some("hook"), "{lines:?}");
    assert_eq!(row("munmap (libc)"), Some("before"), "{lines:?}");
    assert_eq!(row("munmap (raw instruction)"), Some("missed"), "{lines:?}");
    assert_eq!(lines.last(), Some(&"it ran"));
    let output = run().arg("--check").output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let error = text(&output.stderr);
    assert!(error.contains("'mmun run --check -- ./app'"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[test]
fn without_a_folder_for_reports_the_program_runs_and_has_none() {
    let with = |options: &[&str]| {
        let mut command = run();
        command
            .env("TMPDIR", "/proc/self/nonexistent")
            .args(options);
        let output = command.args(["--", "sh", "-c", "exit 4"]).output();
        let output = output.unwrap();
        (output.status.code(), text(&output.stderr).to_owned())
    };
    let (code, said) = with(&[]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.starts_with("mmun: no report: mkdir in "), "{said}");
    let (code, said) = with(&["-o", "/dev/null"]);
    assert_eq!(code, Some(125), "{said}");
    assert!(said.contains("TMPDIR must name a folder"), "{said}");
}

#[test]
fn a_relative_folder_for_reports_is_found_from_every_directory() {
    let folder = scratch("here");
    fs::create_dir_all(folder.join("tmp")).unwrap();
    let mut command = sh("cd /; echo $MMUN_REPORT; : > ${MMUN_REPORT}7-0-0");
    let output = command.current_dir(&folder).env("TMPDIR", "tmp").output();
    let output = output.unwrap();
    assert!(text(&output.stdout).starts_with('/'), "{output:?}");
    assert!(text(&output.stderr).contains("process 7"), "{output:?}");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn off_protects_nothing_and_cannot_be_strict() {
    let both: [(&[&str], &str, &str); 3] = [
        (&["--strict", "--source=off"], "", ""),
        (&["--strict"], "off", ""),
        (&["--source=off"], "auto", "1"),
    ];
    for (options, source, strict) in both {
        let mut command = run();
        command.env("MMUN", source).env("MMUN_STRICT", strict);
        command.args(options).args(["--", "echo", "it ran"]);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        assert_eq!(text(&output.stdout), "");
        let error = text(&output.stderr);
        assert!(error.contains("exclude each other"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let output = run().args(["--source=off", "--", "true"]).output().unwrap();
    assert_eq!(
        text(&output.stderr),
        "mmun: the source is off: no process was protected or observed\n"
    );
}

#[test]
fn a_dash_is_standard_output_and_a_fifo_without_a_reader_is_an_error() {
    let output = run().args(["-o", "-", "--", "true"]).output().unwrap();
    assert_eq!(
        (text(&output.stdout), text(&output.stderr)),
        (
            "mmun: no use of UCX or libfabric came through the drop-in\n",
            ""
        )
    );
    let fifo = Fifo::new("report");
    let mut command = run();
    command.arg("-o").arg(&fifo.0).args(["--", "true"]);
    let output = within("mmun run", move || command.output().unwrap());
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(
        text(&output.stderr).ends_with(": no process reads this FIFO\n"),
        "{output:?}"
    );
}

#[test]
fn a_script_whose_interpreter_is_missing_is_told_from_a_missing_script() {
    let script = scratch("script");
    testkit::write_program("#!/nonexistent/interpreter\n", &script);
    let output = run().arg("--").arg(&script).output().unwrap();
    assert_eq!(output.status.code(), Some(127), "{output:?}");
    assert!(
        text(&output.stderr).ends_with("; the file is there, its interpreter is not\n"),
        "{output:?}"
    );
    fs::remove_file(&script).unwrap();
}

#[test]
fn a_report_is_written_to_the_file_of_the_option() {
    let file = scratch("report");
    let output = run()
        .arg("-o")
        .arg(&file)
        .args(["--", "true"])
        .output()
        .unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        "mmun: no use of UCX or libfabric came through the drop-in\n"
    );
    fs::remove_file(file).unwrap();
}

#[test]
fn a_stopped_program_continues_whichever_of_the_two_is_continued() {
    for continues_mmun in [false, true] {
        let ready = Fifo::new("ready");
        let script = format!("echo $$ > {}; kill -STOP $$; exit 6", ready.0.display());
        let mut command = sh(&script);
        // In a new process group, no shell waits for a stop.
        let child = command.process_group(0).stderr(Stdio::null()).spawn();
        let pid = child.unwrap().id();
        let program: u32 = ready.read().trim().parse().unwrap();
        within("the stop", move || {
            while !state_of(program).starts_with('T') {
                std::thread::yield_now();
            }
        });
        kill(if continues_mmun { pid } else { program }, libc::SIGCONT);
        let status = within("mmun run", move || {
            let mut status = 0;
            // SAFETY: `waitpid` writes an int to a local variable.
            let ended = unsafe { libc::waitpid(pid as i32, &raw mut status, libc::WUNTRACED) };
            assert_eq!(ended, pid as i32);
            if libc::WIFSTOPPED(status) {
                kill(pid, libc::SIGKILL);
            }
            status
        });
        assert!(
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 6,
            "{status:#x}, {continues_mmun}"
        );
    }
}

/// The state of a process: `T` if it is stopped.
fn state_of(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(") ").next().unwrap().to_owned()
}

#[test]
fn a_shell_with_a_terminal_notices_the_stop_and_continues_both() {
    if !require(Cap::Program("python3")) || !require(Cap::Program("bash")) {
        return;
    }
    if !Path::new("/dev/tty").exists() {
        println!("SKIP: there is no /dev/tty");
        return;
    }
    // A new terminal; reading from it ends when no process has it open any more.
    const TERMINAL: &str =
        "import os, pty, sys\nsys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))";
    let job = format!(
        "set -m; {} run -- sh -c 'kill -STOP $$; exit 6'; echo first $?; fg; echo then $?",
        env!("CARGO_BIN_EXE_mmun")
    );
    let mut command = by_default("python3");
    command
        .args(["-c", TERMINAL, "bash", "-c", &job])
        .env("MMUN_DROPIN", dropin())
        .stdin(Stdio::null());
    let output = within("the shell", move || command.output().unwrap());
    let said = text(&output.stdout);
    assert!(
        said.contains(&format!("first {}", 128 + libc::SIGSTOP)),
        "{said}"
    );
    assert!(said.contains("then 6"), "{said}");
}

#[test]
fn options_win_over_the_environment_and_that_over_the_defaults() {
    let script = "echo $MMUN; echo $MMUN_STRICT";
    let said = |options: &[&str]| {
        let mut command = run();
        command.env("MMUN", "off").env("MMUN_STRICT", "0");
        let command = command
            .args(options)
            .args(["-o", "/dev/null", "--", "sh", "-c", script]);
        let output = command.output().unwrap();
        text(&output.stdout).to_owned()
    };
    assert_eq!(said(&[]), "off\n0\n");
    assert_eq!(said(&["--source=hook", "--strict"]), "hook\n1\n");
    let reports = |options: &[&str]| {
        let mut command = run();
        command.env("MMUN_REPORT", "/nonexistent/x.rep");
        let command = command
            .args(options)
            .args(["--", "sh", "-c", "echo $MMUN_REPORT"]);
        let output = command.output().unwrap();
        (
            text(&output.stdout).to_owned(),
            text(&output.stderr).to_owned(),
        )
    };
    assert_eq!(reports(&[]).0, "/nonexistent/x.rep\n");
    assert_eq!(reports(&[]).1, "");
    assert!(!reports(&["-o", "/dev/null"]).0.contains("x.rep"));
    assert_eq!(reports(&["--no-report"]).0, "\n");
}

#[test]
fn a_report_that_cannot_be_written_is_reported_before_the_program_starts() {
    let output = run()
        .args(["-o", "/nonexistent/report", "--", "echo", "it ran"])
        .output()
        .unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(125), "")
    );
    assert_eq!(
        text(&output.stderr),
        "mmun: open on /nonexistent/report: No such file or directory; the -o file must be writable\n"
    );
    // If writing fails only at the end, a successful run exits with 125.
    let output = run()
        .args(["-o", "/dev/full", "--", "sh", "-c", "exit 0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).starts_with("mmun: write on /dev/full: "));
}

#[test]
fn a_file_keeps_its_content_until_there_is_a_report() {
    let file = scratch("report");
    let with = |program: &[&std::ffi::OsStr]| {
        let mut command = run();
        let command = command.arg("-o").arg(&file).arg("--").args(program);
        command.output().unwrap()
    };
    let output = with(&["/nonexistent".as_ref()]);
    assert_eq!(output.status.code(), Some(127));
    assert!(!file.exists(), "no program, no report");
    fs::write(&file, "something long that was there before the report\n").unwrap();
    with(&["/nonexistent".as_ref()]);
    // The file is no word of the command line, which would be refused.
    let script = format!("cat {}", file.display());
    let output = with(&["sh".as_ref(), "-c".as_ref(), script.as_ref()]);
    assert_eq!(
        text(&output.stdout),
        "something long that was there before the report\n"
    );
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        "mmun: no use of UCX or libfabric came through the drop-in\n"
    );
    fs::remove_file(file).unwrap();
}

#[test]
fn the_program_does_not_outlive_it() {
    let (ready, gone) = (Fifo::new("ready"), Fifo::new("gone"));
    // Only the program has the write end of the second pipe.
    let script = format!(
        "exec 8>{}; echo > {}; exec sleep 1000",
        gone.0.display(),
        ready.0.display()
    );
    let mut child = sh(&script).stderr(Stdio::null()).spawn().unwrap();
    let reader = {
        let path = gone.0.clone();
        std::thread::spawn(move || fs::read_to_string(path).unwrap())
    };
    assert_eq!(ready.read(), "\n");
    kill(child.id(), libc::SIGKILL);
    child.wait().unwrap();
    assert_eq!(
        within("the end of the program", move || reader.join().unwrap()),
        ""
    );
}

#[test]
fn the_reports_of_all_ranks_are_one_table() {
    if !require(Cap::Program("mpirun.openmpi")) || !require(Cap::PythonModule("mpi4py")) {
        return;
    }
    let mut command = run();
    command.args([
        "--",
        "mpirun.openmpi",
        "--oversubscribe",
        "--allow-run-as-root",
        "-n",
        "2",
    ]);
    // Open MPI over libfabric.
    command.args([
        "--mca",
        "pml",
        "cm",
        "--mca",
        "mtl",
        "ofi",
        PYTHON,
        "-c",
        "from mpi4py import MPI",
    ]);
    let output = within("mmun run", move || command.output().unwrap());
    let report = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert!(
        report.contains("mmun: 2 processes used UCX or libfabric\n"),
        "{report}"
    );
    for rank in ["0", "1"] {
        let row = report
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = row.filter(|words| words.get(1) == Some(&rank) && words.last() == Some(&PYTHON));
        assert_eq!(
            row.map(|words| words[2] == "yes").collect::<Vec<_>>(),
            [true],
            "rank {rank}: {report}"
        );
    }
}
