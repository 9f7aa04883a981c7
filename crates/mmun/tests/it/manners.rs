//! The traced program runs as if it were untraced, and `mmun` ends with the program's status.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use testkit::{Cap, require};

use crate::support::{
    Fifo, by_default, check, dropin, kill, kind, of_kind, scratch, take_records, text, trace,
    traced, within,
};

#[test]
fn the_exit_status_is_the_programs() {
    for code in [0, 1, 42, 125, 126, 127, 128, 255] {
        let (output, records) = traced(&[], &format!("exit {code}"));
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(of_kind(&records, "exit").last().unwrap()["code"], code);
    }
}

#[test]
fn mmun_dies_of_the_signal_that_killed_the_program() {
    for signal in [
        libc::SIGTERM,
        libc::SIGKILL,
        libc::SIGSEGV,
        libc::SIGABRT,
        libc::SIGPIPE,
        libc::SIGUSR1,
    ] {
        let (output, records) = traced(&[], &format!("kill -{signal} $$"));
        assert_eq!(output.status.signal(), Some(signal), "{output:?}");
        assert!(!output.status.core_dumped());
        assert_eq!(of_kind(&records, "exit").last().unwrap()["signal"], signal);
    }
}

#[test]
fn a_program_killed_from_outside_leaves_a_complete_trace() {
    let path = scratch("trace.json");
    let mut command = trace();
    command.args(["--json", "-o"]).arg(&path);
    command
        .args(["sh", "-c", "echo $$; while :; do (:); done"])
        .stdout(Stdio::piped());
    let mut mmun = command.spawn().unwrap();
    let mut stdout = BufReader::new(mmun.stdout.take().unwrap());
    let mut pid = String::new();
    stdout.read_line(&mut pid).unwrap();
    kill(pid.trim().parse().unwrap(), libc::SIGKILL);
    let status = within("mmun trace", move || mmun.wait().unwrap());
    assert_eq!(status.signal(), Some(libc::SIGKILL));
    let records = take_records(&path);
    crate::support::check(&records);
    let exits: Vec<_> = of_kind(&records, "exit")
        .filter(|record| record["signal"] == libc::SIGKILL)
        .collect();
    assert_eq!(exits.len(), 1);
}

#[test]
fn a_reader_who_reads_nothing_does_not_keep_an_interrupt_waiting() {
    if !require(Cap::Ptrace) {
        return;
    }
    let fifo = Fifo::new("stuck");
    // Opened for reading and writing, so that the open does not wait for the other side.
    let reader = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&fifo.0)
        .unwrap();
    let mut command = trace();
    command.args(["--json", "-o"]).arg(&fifo.0).args([
        "sh",
        "-c",
        "echo $$; while :; do (:); done",
    ]);
    let mut mmun = command.stdout(Stdio::piped()).spawn().unwrap();
    let pid = mmun.id();
    let mut program = String::new();
    BufReader::new(mmun.stdout.take().unwrap())
        .read_line(&mut program)
        .unwrap();
    within("filling a fifo", move || {
        // A pipe's capacity is counted in pages: a write that does not fit into the last page takes
        // a new page.
        let mut writable = libc::pollfd {
            fd: reader.as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: the array has one live element.
        while unsafe { libc::poll(&mut writable, 1, 0) } != 0 {
            std::thread::yield_now();
        }
        kill(pid, libc::SIGINT);
        let status = mmun.wait().unwrap();
        // The program was detached, and still runs.
        kill(program.trim().parse().unwrap(), libc::SIGKILL);
        assert_eq!(status.code(), Some(125), "{status:?}");
        drop(reader);
    });
}

#[test]
fn standard_streams_are_the_programs_own() {
    let path = scratch("trace");
    let mut command = trace();
    command
        .arg("-o")
        .arg(&path)
        .args(["--summary", "sh", "-c", "cat; echo out; echo err >&2"])
        .stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut mmun = command.spawn().unwrap();
    std::io::Write::write_all(&mut mmun.stdin.take().unwrap(), b"in\n").unwrap();
    let output = within("mmun trace", move || mmun.wait_with_output().unwrap());
    assert_eq!(
        (text(&output.stdout), text(&output.stderr)),
        ("in\nout\n", "err\n")
    );
    std::fs::remove_file(path).unwrap();
}

#[test]
fn the_program_sees_no_descriptor_mask_or_disposition_of_ours() {
    let script = "cd /proc/self/fd; echo *; grep -E '^Sig(Blk|Ign|Cgt)|^NoNewPrivs' /proc/self/status; ulimit -c";
    let bare = by_default("sh").args(["-c", script]).output().unwrap();
    let (output, _) = traced(&["--no-seccomp"], script);
    assert_eq!(ours(&output.stdout), ours(&bare.stdout));
    let (output, _) = traced(&[], script);
    let without = |text: String| {
        text.lines()
            .filter(|line| !line.starts_with("NoNewPrivs"))
            .collect::<Vec<_>>()
            .join("\n")
    };
    assert_eq!(without(ours(&output.stdout)), without(ours(&bare.stdout)));
}

#[test]
fn an_ignored_sigpipe_stays_ignored() {
    let folder = scratch("no-folder");
    for (words, folder) in [
        (&["trace", "-o", "/dev/null"][..], std::env::temp_dir()),
        (&["run", "-o", "/dev/null"], std::env::temp_dir()),
        (&["run"], folder),
        (&["run", "--no-report"], std::env::temp_dir()),
    ] {
        for (ignore, expected) in [("trap '' PIPE; ", Some(7)), ("", None)] {
            let script = format!("{ignore}exec \"$0\" \"$@\"");
            let mut command = by_default("sh");
            command.args(["-c", &script, env!("CARGO_BIN_EXE_mmun")]);
            command
                .args(words)
                .args(["--", "sh", "-c", "kill -PIPE $$; exit 7"]);
            command.env("TMPDIR", &folder).env("MMUN_DROPIN", dropin());
            let output = within("mmun", move || command.output().unwrap());
            assert_eq!(output.status.code(), expected, "{words:?}: {output:?}");
        }
    }
}

/// The lines of signals without 32 and 33: glibc reserves them, and its functions for starting a
/// process treat them differently.
fn ours(output: &[u8]) -> String {
    let line = |line: &str| match line
        .split_once(":\t")
        .filter(|(name, _)| name.starts_with("Sig"))
    {
        Some((name, set)) => format!(
            "{name} {:x}",
            u64::from_str_radix(set, 16).unwrap() & !(3 << 31)
        ),
        None => line.to_owned(),
    };
    text(output)
        .lines()
        .map(line)
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn a_program_that_begins_with_a_dash_follows_two() {
    let (code, stderr) = within("mmun trace", || {
        let output = trace()
            .args(["-o", "/dev/null", "--", "--no-such-program"])
            .output()
            .unwrap();
        (output.status.code(), text(&output.stderr).to_owned())
    });
    assert_eq!(code, Some(127));
    assert!(stderr.contains("--no-such-program"));
}

#[test]
fn a_closed_pipe_ends_quietly_and_the_program_lives_on() {
    let done = Fifo::new("done");
    let script = format!(
        "i=0; while [ $i -lt 60 ]; do ls / > /dev/null; i=$((i+1)); done; echo fine > {}",
        done.0.display()
    );
    let mut command = trace();
    command
        .args(["--json", "sh", "-c", &script])
        .stderr(Stdio::piped());
    let mut mmun = command.spawn().unwrap();
    let mut first = String::new();
    BufReader::with_capacity(64, mmun.stderr.take().unwrap())
        .read_line(&mut first)
        .unwrap();
    assert!(first.contains("\"kind\":\"mm_new\""), "{first}");
    assert_eq!(done.read(), "fine\n");
    let status = within("mmun trace", move || mmun.wait().unwrap());
    assert_eq!(status.signal(), Some(libc::SIGPIPE));
}

#[test]
fn a_stopped_program_returns_the_terminal_and_continues() {
    if !require(Cap::Program("python3")) {
        return;
    }
    // A terminal on which the inner process plays the shell: it starts a job in a new process
    // group, waits until the job is stopped, and continues the job.
    let script = r#"
import os, pty, signal, sys
shell, fd = pty.fork()
if shell == 0:
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    job = os.fork()
    if job == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        os.execv(sys.argv[1], [sys.argv[1], "trace", "-o", "/dev/null", "sh", "-c", "echo ready; read x; ls / > /dev/null; echo went on"])
    _, status = os.waitpid(job, os.WUNTRACED)
    print("job stopped", os.WIFSTOPPED(status), flush=True)
    os.killpg(job, signal.SIGCONT)
    print("continued", flush=True)
    _, status = os.waitpid(job, 0)
    os._exit(status)
seen = b""
def until(word):
    global seen
    while word not in seen:
        seen += os.read(fd, 1000)
until(b"ready")
os.write(fd, b"\x1a")
until(b"job stopped True")
until(b"continued")
os.write(fd, b"go\n")
until(b"went on")
_, status = os.waitpid(shell, 0)
assert status == 0, status
print("all well")
"#;
    let output = within("the terminal", move || {
        Command::new("python3")
            .args(["-c", script, env!("CARGO_BIN_EXE_mmun")])
            .output()
            .unwrap()
    });
    assert_eq!(
        text(&output.stdout),
        "all well\n",
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn an_attached_terminal_gets_colour_unless_told_not_to() {
    if !require(Cap::Program("python3")) {
        return;
    }
    let script = "import pty, sys; pty.spawn([sys.argv[1], 'trace', 'ls', '/'])";
    let run = |no_color: &'static str| {
        within("the terminal", move || {
            let mut command = Command::new("python3");
            command
                .args(["-c", script, env!("CARGO_BIN_EXE_mmun")])
                .stdin(Stdio::null())
                .env("TERM", "xterm");
            text(&command.env("NO_COLOR", no_color).output().unwrap().stdout).to_owned()
        })
    };
    assert!(run("").contains("\x1b[1munmap"));
    let plain = run("1");
    assert!(!plain.contains("\x1b[1m") && plain.contains("munmap = 0"));
}

#[test]
fn a_trace_that_writes_nothing_shows_on_a_terminal_that_it_is_alive() {
    if !require(Cap::Program("python3")) {
        return;
    }
    // The program waits until the line was seen.
    let script = r#"
import os, pty, sys, time
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], [sys.argv[1], "trace", "--summary-only"] + sys.argv[3:] + ["sh", "-c", "echo ready; read x; echo went on"])
seen = b""
def until(word):
    global seen
    while word not in seen:
        seen += os.read(fd, 1000)
until(b"ready")
if sys.argv[2] == "line":
    until(b"events, 1 task, 0:0")
else:
    time.sleep(1.5) # what must not come would have come by now
os.write(fd, b"go\n")
try:
    while True:
        more = os.read(fd, 1000)
        if not more:
            break
        seen += more
except OSError:
    pass
_, status = os.waitpid(pid, 0)
assert status == 0, status
sys.stdout.buffer.write(seen)
"#;
    let run = |kind: &'static str, options: &'static [&'static str], terminal: &'static str| {
        within("the terminal", move || {
            let mut command = Command::new("python3");
            command
                .args(["-c", script, env!("CARGO_BIN_EXE_mmun"), kind])
                .args(options)
                .env("TERM", terminal);
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stderr));
            text(&output.stdout).to_owned()
        })
    };
    let shown = run("line", &[], "xterm");
    let (_, after) = shown.rsplit_once("\r\x1b[K").expect("it is erased");
    assert!(
        !after.contains("events, ") && after.contains("removed nothing."),
        "{shown:?}"
    );
    for (options, terminal) in [
        (&["-q"][..], "xterm"),
        (&[], "dumb"),
        (&["-o", "/dev/null", "--json", "-q"], "xterm"),
    ] {
        let plain = run("none", options, terminal);
        assert!(
            !plain.contains("events, ") && !plain.contains('\x1b'),
            "{plain:?}"
        );
    }
}

#[test]
fn help_and_manual_name_every_record_and_option() {
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_mmun"))
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success());
        text(&output.stdout).to_owned()
    };
    let (help, man) = (run(&["trace", "--help"]), run(&["man"]));
    let (_, records) = traced(&["--summary"], "ls / > /dev/null");
    for record in &records {
        assert!(
            help.contains(&format!("\n  {}", kind(record)))
                || help.contains(&format!(", {}", kind(record))),
            "{record}"
        );
    }
    for option in [
        "--output",
        "--events",
        "--json",
        "--summary-only",
        "--no-follow",
        "--no-seccomp",
    ] {
        assert!(
            help.contains(option) && man.contains(&option.replace('-', "\\-")),
            "{option}"
        );
    }
    assert!(run(&["completions", "bash"]).contains("--no-seccomp"));
}

#[test]
fn without_a_command_it_shows_its_help_and_fails() {
    let output = Command::new(env!("CARGO_BIN_EXE_mmun")).output().unwrap();
    let help = text(&output.stderr);
    assert!(
        help.contains("Usage: mmun") && help.contains("Examples:") && help.contains("coverage"),
        "{help}"
    );
    assert_eq!((output.status.code(), output.stdout.len()), (Some(125), 0));
}

#[test]
fn manual_pages_are_written_to_a_folder() {
    let (folder, mmun) = (scratch("man"), env!("CARGO_BIN_EXE_mmun"));
    let man =
        |folder: &std::path::Path| Command::new(mmun).arg("man").arg(folder).output().unwrap();
    let output = man(&folder.join("man1"));
    assert!(
        output.status.success() && output.stdout.is_empty(),
        "{}",
        text(&output.stderr)
    );
    let mut names: Vec<_> = std::fs::read_dir(folder.join("man1"))
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let help = Command::new(mmun).arg("--help").output().unwrap();
    let commands = text(&help.stdout)
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1);
    // A long description continues in a line with a deeper indent.
    let commands = commands
        .take_while(|line| !line.is_empty())
        .filter(|line| !line.starts_with("   "));
    let commands = commands.filter_map(|line| line.split_whitespace().next());
    let mut pages: Vec<_> = commands
        .map(|command| format!("mmun-{command}.1"))
        .chain(["mmun.1".to_owned()])
        .collect();
    pages.sort();
    assert!(names == pages && pages.len() > 5, "{names:?} {pages:?}");
    let page = |name: &str| std::fs::read_to_string(folder.join("man1").join(name)).unwrap();
    assert!(
        pages
            .iter()
            .all(|name| page(name).contains(&format!(".TH {} 1 ", name.trim_end_matches(".1"))))
    );
    // `man1/mmun.1` is a file, so no folder with this path can be made.
    let output = man(&folder.join("man1/mmun.1"));
    let line = text(&output.stderr);
    assert!(
        line.starts_with("mmun: write on ")
            && line.contains("mmun.1: ")
            && line.lines().count() == 1,
        "{line}"
    );
    assert_eq!(output.status.code(), Some(125));
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn events_are_chosen_by_options_that_add_up() {
    let kinds = |options: &[&str]| {
        let (_, records) = traced(options, "ls / > /dev/null");
        let mut events: Vec<String> = of_kind(&records, "start")
            .map(|record| record["event"].as_str().unwrap().to_owned())
            .collect();
        events.sort();
        events.dedup();
        events
    };
    assert_eq!(
        kinds(&["-e", "unmap", "-e", "protection_vma"]),
        ["protection_vma", "unmap"]
    );
    assert_eq!(
        kinds(&["-e", "unmap,protection_vma", "-e", "!unmap"]),
        ["protection_vma"]
    );
}

#[test]
fn a_reader_that_is_slow_loses_nothing() {
    let mut command = trace();
    command
        .args([
            "--json",
            "sh",
            "-c",
            "for i in 1 2 3 4 5; do ls / > /dev/null; done",
        ])
        .stderr(Stdio::piped());
    let mut mmun = command.spawn().unwrap();
    let mut pipe = mmun.stderr.take().unwrap();
    let text = within("reading byte by byte", move || {
        let (mut text, mut byte) = (Vec::new(), [0]);
        while pipe.read(&mut byte).unwrap() > 0 {
            text.push(byte[0]);
        }
        String::from_utf8(text).unwrap()
    });
    assert!(mmun.wait().unwrap().success());
    crate::support::check(&crate::support::parse(&text));
}

#[test]
fn records_are_written_while_the_program_is_idle() {
    let (path, gate) = (scratch("idle.json"), Fifo::new("gate"));
    let script = format!("ls / > /dev/null; read x < {}", gate.0.display());
    let mut command = trace();
    command.args([
        "--json",
        "-o",
        path.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        &script,
    ]);
    let mut mmun = command.spawn().unwrap();
    let written = path.clone();
    within("the records so far", move || {
        // The last record before the shell reads is the end of `ls`.
        while !std::fs::read_to_string(&written)
            .is_ok_and(|text| text.contains("\"kind\":\"exit\""))
        {
            std::thread::yield_now();
        }
    });
    gate.write("go\n");
    assert!(within("mmun trace", move || mmun.wait().unwrap()).success());
    check(&take_records(&path));
}
