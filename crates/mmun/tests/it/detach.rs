//! The trace ends before the program: by a signal, by SIGKILL, or after an attach.

use std::ffi::CStr;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use serde_json::Value;
use testkit::Cgroup;

use crate::support::{
    Fifo, check, kill, kind, of_kind, parse, scratch, take_records, trace, within,
};

/// A traced shell that waits at a gate, then starts a program that maps, protects and unmaps, and
/// then reports.
struct Gated {
    ready: Fifo,
    gate: Fifo,
    done: Fifo,
}

impl Gated {
    fn new() -> Gated {
        Gated {
            ready: Fifo::new("ready"),
            gate: Fifo::new("gate"),
            done: Fifo::new("done"),
        }
    }

    fn script(&self) -> String {
        let [ready, gate, done] =
            [&self.ready, &self.gate, &self.done].map(|fifo| fifo.0.display());
        format!(
            "ls / > /dev/null; echo here > {ready}; read x < {gate}; ls / > /dev/null && echo alive > {done}"
        )
    }

    /// Opens the gate, and checks that all memory calls of the shell work.
    fn must_be_alive(&self) {
        self.gate.write("go\n");
        assert_eq!(self.done.read(), "alive\n");
    }
}

fn gated_trace(gated: &Gated, options: &[&str]) -> Child {
    let mut command = trace();
    command
        .args(["--json", "--summary"])
        .args(options)
        .args(["sh", "-c", &gated.script()]);
    command.stderr(Stdio::piped()).spawn().unwrap()
}

fn must_have_ended_early(records: &[Value]) {
    check(records);
    assert_eq!(kind(records.last().unwrap()), "summary");
    assert!(of_kind(records, "get").count() > 0);
}

#[test]
fn an_ending_signal_ends_the_trace_and_not_the_program() {
    for (signal, options) in [
        (libc::SIGINT, &[][..]),
        (libc::SIGTERM, &[]),
        (libc::SIGHUP, &[]),
        (libc::SIGINT, &["--no-seccomp"]),
        (libc::SIGINT, &["--no-follow"]),
    ] {
        let (gated, path) = (Gated::new(), scratch("trace.json"));
        let mut mmun = gated_trace(&gated, &[&["-o", path.to_str().unwrap()], options].concat());
        assert_eq!(gated.ready.read(), "here\n");
        kill(mmun.id(), signal);
        let status = within("mmun trace", move || mmun.wait().unwrap());
        assert_eq!(status.signal(), Some(signal));
        must_have_ended_early(&take_records(&path));
        gated.must_be_alive();
    }
}

/// A new terminal: the side that a terminal emulator holds, and the side of the programs. An error
/// where no `devpts` is mounted.
fn terminal() -> io::Result<(OwnedFd, fs::File)> {
    // Another test may start a program at any time, so the descriptor closes at `execve` from the
    // beginning. The terminal hangs up when no process has it.
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: takes an integer.
    let emulator = unsafe { libc::posix_openpt(flags) };
    if emulator < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nothing else owns it.
    let emulator = unsafe { OwnedFd::from_raw_fd(emulator) };
    let mut name = [0_u8; 64];
    let (fd, at) = (emulator.as_raw_fd(), name.as_mut_ptr().cast());
    // SAFETY: takes the descriptor of a terminal.
    if unsafe { libc::unlockpt(fd) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `name` has the length that the call is told.
    if unsafe { libc::ptsname_r(fd, at, name.len()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let name = CStr::from_bytes_until_nul(&name).unwrap().to_str().unwrap();
    let mut options = fs::File::options();
    let options = options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    Ok((emulator, options.open(name)?))
}

#[test]
fn a_terminal_that_hangs_up_ends_the_trace_and_leaves_no_task_stopped() {
    let (emulator, programs) = match terminal() {
        Ok(terminal) => terminal,
        Err(why) => return println!("SKIP detach::a_terminal_that_hangs_up: no terminal: {why}"),
    };
    let (gated, path) = (Gated::new(), scratch("trace.json"));
    let mut command = trace();
    // As under `nohup`: the hangup is for the program, too.
    let script = format!("trap '' HUP; {}", gated.script());
    command.args(["--json", "--summary", "-o"]).arg(&path);
    command.args(["sh", "-c", &script]);
    command.stdin(programs.try_clone().unwrap());
    command.stdout(programs.try_clone().unwrap());
    command.stderr(programs);
    let to_terminal = || {
        // SAFETY: takes no arguments.
        if unsafe { libc::setsid() } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: takes integers.
        match unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure runs between fork and exec and makes system calls only.
    unsafe { command.pre_exec(to_terminal) };
    let mut mmun = command.spawn().unwrap();
    // The command has the other side of the terminal open, too.
    drop(command);
    assert_eq!(gated.ready.read(), "here\n");
    drop(emulator);
    let status = within("mmun trace", move || mmun.wait().unwrap());
    assert_eq!(status.signal(), Some(libc::SIGHUP));
    must_have_ended_early(&take_records(&path));
    gated.must_be_alive();
}

/// `--summary-only` first measures a call that does nothing: a second thread of the tracer traces a
/// child of its own. An attempt in which the tracer was not stopped meanwhile is repeated.
#[test]
fn a_signal_before_the_program_starts_ends_both() {
    let children = |task: u32, thread: &str| -> Vec<u32> {
        let all = fs::read_to_string(format!("/proc/{task}/task/{thread}/children"));
        let pids = |all: String| all.split(' ').filter_map(|pid| pid.parse().ok()).collect();
        all.map(pids).unwrap_or_default()
    };
    if fs::metadata("/proc/thread-self/children").is_err() {
        println!("SKIP: this kernel does not list the children of a task");
        return;
    }
    // The state of a task; 'X' if it has ended.
    let state = |task: u32| {
        let stat = fs::read_to_string(format!("/proc/{task}/stat")).unwrap_or_default();
        let rest = stat.rsplit(") ").next().unwrap_or_default();
        rest.chars()
            .next()
            .map_or('X', |state| if state == 'Z' { 'X' } else { state })
    };
    for _ in 0..500 {
        let mut command = trace();
        command.args(["--summary-only", "sh", "-c", "echo started"]);
        let mut mmun = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (front, mut output) = (mmun.id(), mmun.stdout.take().unwrap());
        let is_early = within("the tracer", move || {
            let tracer = loop {
                match children(front, &front.to_string())[..] {
                    [tracer, ..] => break tracer,
                    [] if state(front) == 'X' => return false,
                    [] => thread::yield_now(),
                }
            };
            let threads = || {
                fs::read_dir(format!("/proc/{tracer}/task"))
                    .into_iter()
                    .flatten()
            };
            while threads().count() == 1 && state(tracer) != 'X' {
                thread::yield_now();
            }
            kill(tracer, libc::SIGSTOP);
            while !"TX".contains(state(tracer)) {
                thread::yield_now();
            }
            let mut parents = threads()
                .flatten()
                .map(|thread| thread.file_name().into_string().unwrap())
                .filter(|thread| !children(tracer, thread).is_empty());
            let is_early = parents
                .next()
                .is_some_and(|thread| thread != tracer.to_string());
            kill(front, libc::SIGINT);
            kill(tracer, libc::SIGCONT);
            is_early
        });
        let (status, text) = within("mmun trace", move || {
            let mut text = String::new();
            output.read_to_string(&mut text).unwrap();
            (mmun.wait().unwrap(), text)
        });
        if is_early {
            assert_eq!((status.signal(), text.as_str()), (Some(libc::SIGINT), ""));
            return;
        }
    }
    panic!("the tracer was never stopped in time");
}

#[test]
fn a_live_program_does_not_wait_for_the_page() {
    let (gated, page) = (Gated::new(), Fifo::new("page"));
    let mut command = trace();
    command.arg("--report").arg(&page.0);
    command.args(["sh", "-c", &gated.script()]);
    let mut mmun = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut page = fs::File::open(&page.0).unwrap();
    let holds = rustix::pipe::fcntl_setpipe_size(&page, 4096).unwrap();
    assert_eq!(gated.ready.read(), "here\n");
    kill(mmun.id(), libc::SIGINT);
    // The page is longer than the pipe's buffer, so from here on `mmun` is writing it.
    page.read_exact(&mut [0]).unwrap();
    within("the program", move || gated.must_be_alive());
    let mut rest = String::new();
    page.read_to_string(&mut rest).unwrap();
    assert!(rest.trim_end().ends_with("</html>"));
    if rest.len() <= holds {
        assert!(rustix::param::page_size() > 4096, "{} bytes", rest.len());
        println!("SKIP detach::a_live_program: a pipe holds the whole page, so nothing waited");
    }
    let status = within("mmun trace", move || mmun.wait().unwrap());
    assert_eq!(status.signal(), Some(libc::SIGINT));
}

#[test]
fn the_program_survives_the_death_of_mmun() {
    for options in [&[][..], &["--no-seccomp"]] {
        let gated = Gated::new();
        let mut mmun = gated_trace(&gated, options);
        assert_eq!(gated.ready.read(), "here\n");
        kill(mmun.id(), libc::SIGKILL);
        assert_eq!(mmun.wait().unwrap().signal(), Some(libc::SIGKILL));
        // The tracer writes the summary when it notices the death of the front. The pipe stays open
        // as long as the shell has it.
        let pipe = mmun.stderr.take().unwrap();
        let lines = within("the summary", move || {
            let mut text = String::new();
            let mut reader = BufReader::new(pipe);
            while !text.contains("\"kind\":\"summary\"") {
                assert_ne!(
                    reader.read_line(&mut text).unwrap(),
                    0,
                    "the trace ends without a summary: {text}"
                );
            }
            text
        });
        must_have_ended_early(&parse(&lines));
        gated.must_be_alive();
    }
}

#[test]
fn a_tracer_that_stays_keeps_no_inherited_descriptor() {
    let (ready, gate) = (Fifo::new("ready"), Fifo::new("gate"));
    // The program closes its copy of the inherited descriptor.
    let script = format!(
        "exec 9>&-; echo here > {}; read x < {}",
        ready.0.display(),
        gate.0.display()
    );
    let (mut reader, writer) = io::pipe().unwrap();
    let fd = writer.as_raw_fd();
    let mut command = trace();
    command
        .args(["-o", "/dev/null", "sh", "-c", &script])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let inherit = move || {
        // SAFETY: `dup2` takes integers; the program has no descriptor 9 yet.
        if unsafe { libc::dup2(fd, 9) } == 9 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    // SAFETY: the closure runs between fork and exec and makes one system call.
    unsafe { command.pre_exec(inherit) };
    let mut mmun = command.spawn().unwrap();
    drop(writer);
    assert_eq!(ready.read(), "here\n");
    kill(mmun.id(), libc::SIGINT);
    assert_eq!(
        within("mmun trace", move || mmun.wait().unwrap()).signal(),
        Some(libc::SIGINT)
    );
    // The shell still waits, and its tracer still serves it.
    let rest = within("the end of the pipe", move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).map(|_| text).unwrap()
    });
    assert_eq!(rest, "");
    gate.write("go\n");
}

/// An untraced shell, which runs a program for each line that it reads.
fn bystander() -> Child {
    let script = "echo ready; while read x; do ls / > /dev/null && echo $x; done";
    let mut command = Command::new("sh");
    command
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command.spawn().unwrap()
}

fn tracer_of(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"))
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

fn until(what: &str, condition: impl Fn() -> bool + Send + 'static) {
    within(what, move || {
        while !condition() {
            thread::yield_now();
        }
    });
}

#[test]
fn a_running_process_is_attached_to_and_detached() {
    for signal in [libc::SIGINT, libc::SIGKILL] {
        let mut shells = [bystander(), bystander()];
        let pids = shells.each_ref().map(|shell| shell.id());
        let mut streams = shells.each_mut().map(|shell| {
            (
                shell.stdin.take().unwrap(),
                BufReader::new(shell.stdout.take().unwrap()),
            )
        });
        let mut line = String::new();
        for (_, stdout) in &mut streams {
            stdout.read_line(&mut line).unwrap();
        }
        let path = scratch("trace.json");
        let mut command = trace();
        command.args(["--json", "--summary", "-o"]).arg(&path);
        command.args([
            "-p",
            &pids[0].to_string(),
            "-p",
            &pids[1].to_string(),
            "-p",
            &pids[0].to_string(),
        ]);
        let mut mmun = command.spawn().unwrap();
        until("attaching", move || {
            pids.iter().all(|pid| tracer_of(*pid) != 0)
        });
        let mut ask = |word: &str| {
            for (stdin, stdout) in &mut streams {
                writeln!(stdin, "{word}").unwrap();
                let mut answer = String::new();
                stdout.read_line(&mut answer).unwrap();
                assert_eq!(answer.trim(), word);
            }
        };
        ask("traced");
        // A stop that takes long causes this signal as well.
        kill(mmun.id(), libc::SIGALRM);
        ask("still traced");
        kill(mmun.id(), signal);
        assert_eq!(
            within("mmun trace", move || mmun.wait().unwrap()).signal(),
            Some(signal)
        );
        until("detaching", move || {
            pids.iter().all(|pid| tracer_of(*pid) == 0)
        });
        ask("free");
        drop(streams);
        for shell in &mut shells {
            assert!(shell.wait().unwrap().success());
        }
        if signal == libc::SIGINT {
            let records = take_records(&path);
            must_have_ended_early(&records);
            assert_eq!(
                of_kind(&records, "fork").count(),
                4,
                "each shell ran two programs while it was traced"
            );
        } else {
            fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn a_trace_of_attached_processes_ends_when_they_do() {
    let mut shell = bystander();
    let pid = shell.id();
    let mut line = String::new();
    BufReader::new(shell.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    let (mut mmun, path) = attached(pid);
    until("attaching", move || tracer_of(pid) != 0);
    drop(shell.stdin.take());
    assert!(shell.wait().unwrap().success());
    assert!(within("mmun trace", move || mmun.wait().unwrap()).success());
    let records = take_records(&path);
    check(&records);
    assert_eq!(of_kind(&records, "exit").count(), 1);
}

#[test]
fn a_parent_that_waits_in_vfork_is_detached_at_the_first_signal() {
    let gate = Fifo::new("gate");
    // A child of `vfork` opens the pipe before it executes its program. Its parent waits for it in
    // an uninterruptible sleep.
    let script = "import os, sys
print('ready', flush=True)
os.posix_spawn('/bin/true', ['true'], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 9, sys.argv[1], os.O_RDONLY, 0)])
print(os.wait()[1], flush=True)";
    let mut command = Command::new("python3");
    command
        .args(["-c", script])
        .arg(&gate.0)
        .stdout(Stdio::piped());
    let mut parent = command.spawn().unwrap();
    let mut lines = BufReader::new(parent.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let pid = parent.id();
    let status = move || fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    until("the parent to wait", move || status().contains("State:\tD"));
    let (mut mmun, path) = attached(pid);
    until("the tracer", move || tracer_of(pid) != 0);
    let written = path.clone();
    until("the record of the task", move || {
        fs::read_to_string(&written)
            .unwrap()
            .contains("\"kind\":\"get\"")
    });
    kill(mmun.id(), libc::SIGTERM);
    // The child still waits for this test.
    assert_eq!(
        within("mmun trace", move || mmun.wait().unwrap()).signal(),
        Some(libc::SIGTERM)
    );
    let records = take_records(&path);
    check(&records);
    let let_go: Vec<_> = of_kind(&records, "detach")
        .map(|record| record["tid"].as_u64())
        .collect();
    assert_eq!(let_go, [Some(u64::from(pid))]);
    assert_eq!(
        of_kind(&records, "mm_release").count(),
        0,
        "the address space lives on"
    );
    // The child opens its end when this end is opened, and may end before this test could write.
    let path = gate.0.clone();
    drop(within("the child's open", move || {
        fs::File::options().write(true).open(path).unwrap()
    }));
    assert_eq!(lines.next().unwrap().unwrap(), "0");
    assert!(parent.wait().unwrap().success());
}

/// Starts a trace of a running process into a file, and returns `mmun` and the file.
fn attached(pid: u32) -> (Child, PathBuf) {
    let path = scratch("trace.json");
    let mut command = trace();
    command
        .args(["--json", "-p", &pid.to_string(), "-o"])
        .arg(&path);
    (command.spawn().unwrap(), path)
}

/// The process is frozen before `mmun` attaches in one case, and after that in the other.
#[test]
fn a_frozen_process_is_detached_at_the_first_signal() {
    for frozen_first in [true, false] {
        let Some(group) = Cgroup::new_or_skip() else {
            return;
        };
        let mut shell = bystander();
        let (mut stdin, mut lines) = (
            shell.stdin.take().unwrap(),
            BufReader::new(shell.stdout.take().unwrap()).lines(),
        );
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let (pid, group) = (shell.id(), Arc::new(group));
        group.add(pid).unwrap();
        let freeze = || {
            group.freeze().unwrap();
            let group = Arc::clone(&group);
            until("the freeze", move || group.is_frozen());
        };
        if frozen_first {
            freeze();
        }
        let (mut mmun, path) = attached(pid);
        let written = path.clone();
        until("the record of the task", move || {
            fs::read_to_string(&written).is_ok_and(|text| text.contains("\"kind\":\"get\""))
        });
        if !frozen_first {
            freeze();
        }
        kill(mmun.id(), libc::SIGTERM);
        // The process is still frozen.
        assert_eq!(
            within("mmun trace", move || mmun.wait().unwrap()).signal(),
            Some(libc::SIGTERM)
        );
        until("detaching", move || tracer_of(pid) == 0);
        let refrozen = Arc::clone(&group);
        until("the freeze", move || refrozen.is_frozen());
        let records = take_records(&path);
        check(&records);
        let let_go: Vec<_> = of_kind(&records, "detach")
            .map(|record| record["tid"].as_u64())
            .collect();
        assert_eq!(let_go, [Some(u64::from(pid))]);
        group.thaw().unwrap();
        writeln!(stdin, "free").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "free");
        drop(stdin);
        assert!(shell.wait().unwrap().success());
    }
}

/// A program that `mmun` has started has a filter, so it keeps its tracer. `mmun` itself ends at
/// once.
#[test]
fn an_ending_signal_does_not_wait_for_a_frozen_program() {
    let Some(group) = Cgroup::new_or_skip() else {
        return;
    };
    let (gated, path) = (Gated::new(), scratch("trace.json"));
    let mut command = trace();
    command.args(["--json", "--summary", "-o"]).arg(&path);
    command.args(["sh", "-c", &gated.script().replace("echo here", "echo $$")]);
    let mut mmun = command.spawn().unwrap();
    let shell: u32 = gated.ready.read().trim().parse().unwrap();
    let group = Arc::new(group);
    group.add(shell).unwrap();
    group.freeze().unwrap();
    let frozen = Arc::clone(&group);
    until("the freeze", move || frozen.is_frozen());
    kill(mmun.id(), libc::SIGTERM);
    assert_eq!(
        within("mmun trace", move || mmun.wait().unwrap()).signal(),
        Some(libc::SIGTERM)
    );
    must_have_ended_early(&take_records(&path));
    group.thaw().unwrap();
    gated.must_be_alive();
    let gone = format!("/proc/{shell}");
    until("the end of the program", move || {
        !fs::exists(&gone).unwrap()
    });
}
