//! Attaching to running processes, and detaching from processes that continue to run.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, Write, pipe};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mmu_notifier::MmWithUser;
use mmu_source::process::{Done, Error, ExitStatus, Observer, Options, Task, Tracer};
use testkit::{Cap, Cgroup, require, within};

use crate::log::{Record, Recorder, hex, tracee};

const THREADS: usize = 4;

/// A process with threads that follows orders.
struct Server<I, O> {
    to: I,
    from: O,
}

impl<I: Write, O: BufRead> Server<I, O> {
    fn say(&mut self, word: &str) {
        writeln!(self.to, "{word}").expect("the server listens");
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.from.read_line(&mut line).expect("the server answers");
        line.trim().to_owned()
    }

    /// Makes every thread unmap a page, and returns the addresses.
    fn go(&mut self) -> Vec<u64> {
        self.say("go");
        let answer = self.hear();
        let words: Vec<&str> = answer.split_whitespace().collect();
        assert_eq!(words[..2], ["did", "0"], "an munmap failed: {answer}");
        assert_eq!(words.len(), 2 + THREADS);
        words[2..].iter().map(|word| hex(word)).collect()
    }
}

fn start() -> (Child, Server<ChildStdin, BufReader<ChildStdout>>) {
    start_case("serve")
}

/// Starts the tracee on another thread, so that it is not a child of the thread that traces it.
fn start_case(case: &'static str) -> (Child, Server<ChildStdin, BufReader<ChildStdout>>) {
    let started = thread::spawn(move || {
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_tracee"))
            .args([case, &THREADS.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let to = child.stdin.take().expect("piped");
        let from = BufReader::new(child.stdout.take().expect("piped"));
        (child, Server { to, from })
    });
    let (child, mut server) = started.join().expect("no panic");
    assert_eq!(server.hear(), "ready");
    (child, server)
}

fn unmapped(records: &[Record]) -> Vec<u64> {
    let start = |record: &Record| match record {
        Record::Start(part) if part.cause == "munmap" => Some(part.start),
        _ => None,
    };
    records.iter().filter_map(start).collect()
}

#[test]
fn a_process_with_threads_is_attached_to_and_lives_on_after_it_is_let_go() {
    if !require(Cap::Ptrace) {
        return;
    }
    let (mut child, mut server) = start();
    let pid = child.id() as i32;
    let mut tracer = Tracer::new(Options::default(), Recorder::new()).expect("a tracer");
    tracer.attach(pid).expect("it can be attached to");
    let stop = AtomicBool::new(false);
    let (seen, done) = thread::scope(|scope| {
        let driver = scope.spawn(|| {
            let seen: Vec<u64> = (0..3).flat_map(|_| server.go()).collect();
            server.say("fork");
            assert_eq!(server.hear(), "forked 0");
            stop.store(true, Ordering::Relaxed);
            // The server's calls wake the tracer. The tracer then sees `stop` and detaches.
            server.go();
            seen
        });
        let done = tracer.run(&stop).expect("it runs");
        let (recorder, keeper) = tracer.detach();
        assert!(!keeper.is_needed(), "no tracee has a filter");
        let seen = driver.join().expect("the server still works");
        let records = recorder.finish();
        let mut told = unmapped(&records);
        for address in &seen {
            let at = told.iter().position(|start| start == address);
            told.remove(at.unwrap_or_else(|| panic!("{address:#x} was not told")));
        }
        assert_eq!(
            records
                .iter()
                .filter(|record| matches!(record, Record::New { .. }))
                .count(),
            2
        );
        (seen, done)
    });
    assert_eq!((seen.len(), done), (3 * THREADS, Done::Stopped));
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    assert!(status.contains("TracerPid:\t0\n"), "{status}");
    server.go();
    server.say("quit");
    assert_eq!(child.wait().expect("a status").code(), Some(0));
}

/// Returns the `/proc` status of those children of the process `pid` that this thread still traces.
fn traced_children(pid: u32) -> Vec<String> {
    // SAFETY: takes nothing.
    let this_thread = unsafe { libc::gettid() };
    let tracer = format!("TracerPid:\t{this_thread}\n");
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it lives");
    let children =
        threads.map(|thread| fs::read_to_string(thread.expect("an entry").path().join("children")));
    let children = children
        .map(|list| list.expect("the kernel lists children"))
        .collect::<String>();
    // A child that has ended is not traced any more either.
    let status = |child| fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
    let is_traced = |status: &String| status.contains(&tracer) && !status.contains("State:\tZ");
    children
        .split_whitespace()
        .map(status)
        .filter(is_traced)
        .collect()
}

#[test]
fn a_child_that_is_made_while_its_parent_is_let_go_of_is_let_go_of() {
    if !require(Cap::Ptrace) {
        return;
    }
    const ROUNDS: usize = 50;
    let (mut child, server) = start_case("fork-loop");
    let mut late = 0;
    for _ in 0..ROUNDS {
        let stop = Arc::new(AtomicBool::new(false));
        let on_fork = Arc::clone(&stop);
        let recorder = Recorder::with(Box::new(move |_| on_fork.store(true, Ordering::Relaxed)));
        let mut tracer = Tracer::new(Options::default(), recorder).expect("a tracer");
        tracer
            .attach(child.id() as i32)
            .expect("it can be attached to");
        assert_eq!(tracer.run(&stop).expect("it runs"), Done::Stopped);
        let (recorder, keeper) = tracer.detach();
        // `detach` gives a task up that stays in uninterruptible sleep, as a fork on a slow machine
        // does. The keeper detaches from it as soon as it stops.
        late += usize::from(keeper.is_needed());
        keeper.serve();
        assert_eq!(traced_children(child.id()), [""; 0]);
        recorder.finish();
    }
    println!("{late} of {ROUNDS} times a task was left to the keeper");
    drop(server);
    assert_eq!(child.wait().expect("a status").code(), Some(0));
}

#[test]
fn processes_with_a_filter_are_kept_alive_after_they_are_let_go() {
    if !require(Cap::Ptrace) || !require(Cap::SeccompTrace) {
        return;
    }
    let (stdin, to) = pipe().expect("a pipe");
    let (from, stdout) = pipe().expect("a pipe");
    let mut tracer = Tracer::new(Options::default(), Recorder::new()).expect("a tracer");
    let command = tracee(&["serve", &THREADS.to_string()])
        .stdin(stdin)
        .stdout(stdout);
    tracer.spawn(command).expect("it starts");
    let mut server: Server<_, BufReader<PipeReader>> = Server {
        to,
        from: BufReader::new(from),
    };
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let driver = scope.spawn(|| {
            assert_eq!(server.hear(), "ready");
            server.go();
            stop.store(true, Ordering::Relaxed);
            // The first of these calls make the tracer stop. The keeper serves the others,
            // including those of children.
            for _ in 0..20 {
                server.go();
            }
            server.say("fork");
            assert_eq!(server.hear(), "forked 0");
            server.say("quit");
        });
        assert_eq!(tracer.run(&stop).expect("it runs"), Done::Stopped);
        let (recorder, keeper) = tracer.detach();
        assert!(keeper.is_needed());
        assert!(unmapped(&recorder.finish()).len() >= THREADS);
        keeper.serve();
        driver.join().expect("every munmap worked");
    });
}

#[test]
fn a_program_that_was_spawned_and_never_run_is_let_go_too() {
    if !require(Cap::Ptrace) {
        return;
    }
    let mut options = Options::default();
    options.seccomp = false;
    let mut tracer = Tracer::new(options, Recorder::new()).expect("a tracer");
    let (from, stdout) = pipe().expect("a pipe");
    tracer
        .spawn(tracee(&["signals", "3"]).stdout(stdout))
        .expect("it starts");
    let (recorder, keeper) = tracer.detach();
    assert!(!keeper.is_needed());
    keeper.serve();
    assert_eq!(
        BufReader::new(from)
            .lines()
            .next()
            .expect("output")
            .expect("text"),
        "3"
    );
    assert!(recorder.finish().iter().any(|record| matches!(
        record,
        Record::Put {
            cause: "detach",
            ..
        }
    )));
}

#[test]
fn a_process_that_another_thread_takes_over_by_execve_is_traced_no_more() {
    if !require(Cap::Ptrace) {
        return;
    }
    let (mut child, mut server) = start();
    let mut options = Options::default();
    options.follow = false;
    let mut tracer = Tracer::new(options, Recorder::new()).expect("a tracer");
    tracer
        .attach(child.id() as i32)
        .expect("it can be attached to");
    server.say("exec");
    assert_eq!(
        tracer.run(&AtomicBool::new(false)).expect("it runs"),
        Done::AllExited
    );
    let records = tracer.detach().0.finish();
    let exits = records
        .iter()
        .filter(|record| matches!(record, Record::Exit { .. }));
    assert_eq!(exits.count(), THREADS + 1, "none is left in the table");
    assert_eq!(child.wait().expect("a status").code(), Some(8));
}

#[test]
fn a_process_that_ends_while_it_is_attached_to_is_all_exited() {
    if !require(Cap::Ptrace) {
        return;
    }
    let (mut child, mut server) = start();
    let mut tracer = Tracer::new(Options::default(), Recorder::new()).expect("a tracer");
    tracer
        .attach(child.id() as i32)
        .expect("it can be attached to");
    server.say("quit");
    assert_eq!(
        tracer.run(&AtomicBool::new(false)).expect("it runs"),
        Done::AllExited
    );
    assert_eq!(tracer.exit_status(), None, "it was not spawned");
    let records = tracer.detach().0.finish();
    let ends = records.iter().filter(|record| {
        matches!(
            record,
            Record::Exit {
                status: ExitStatus::Code(0),
                ..
            }
        )
    });
    assert_eq!(ends.count(), THREADS + 1);
    // The tracer may have reaped the child already.
    drop(child.wait());
}

#[test]
fn a_process_that_is_not_there_or_refused_is_an_error_with_a_hint() {
    if !require(Cap::Ptrace) {
        return;
    }
    let mut tracer = Tracer::new(Options::default(), Recorder::new()).expect("a tracer");
    let mut refused = |pid: i32| match tracer.attach(pid) {
        Err(error @ Error::Attach { .. }) => {
            assert!(error.hint().is_some(), "{error}");
            let Error::Attach { source, .. } = error else {
                unreachable!()
            };
            source.raw_os_error()
        }
        other => panic!("{pid}: {other:?}"),
    };
    assert_eq!(refused(1 << 30), Some(libc::ESRCH));
    assert_eq!(refused(0), Some(libc::ESRCH));
    assert_eq!(refused(-1), Some(libc::ESRCH));
    assert_eq!(
        refused(std::process::id() as i32),
        Some(libc::EPERM),
        "a process cannot trace itself"
    );
    let (mut child, mut server) = start();
    let pid = child.id() as i32;
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it lives");
    let tids = threads.map(|entry| {
        entry
            .expect("an entry")
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
    });
    let tid: i32 = tids
        .flatten()
        .find(|tid| *tid != pid)
        .expect("it has threads");
    match tracer.attach(tid) {
        Err(Error::Attach { source, .. }) => {
            assert_eq!(
                source.to_string(),
                format!("{tid} is a thread of process {pid}")
            );
        }
        other => panic!("{other:?}"),
    }
    let mut first = Tracer::new(Options::default(), Recorder::new()).expect("a tracer");
    first.attach(pid).expect("it can be attached to");
    let second = thread::spawn(move || {
        let mut second = Tracer::new(Options::default(), Recorder::new()).expect("a tracer");
        matches!(second.attach(pid), Err(Error::Attach { source, .. }) if source.raw_os_error() == Some(libc::EPERM))
    });
    assert!(second.join().expect("no panic"), "it has a tracer");
    server.say("quit");
    first.run(&AtomicBool::new(false)).expect("it runs");
    drop(child.wait());
}

#[test]
fn a_parent_that_waits_in_vfork_is_let_go_of_without_waiting_for_its_child() {
    if !require(Cap::Ptrace) {
        return;
    }
    let path = std::env::temp_dir().join(format!("vfork-{}", std::process::id()));
    let c_path = CString::new(path.as_os_str().as_encoded_bytes()).expect("a path");
    // SAFETY: a live string.
    assert_eq!(unsafe { libc::mkfifo(c_path.as_ptr(), 0o600) }, 0);
    let argument = path.clone();
    let started = thread::spawn(move || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tracee"));
        command
            .arg("waits-in-vfork")
            .arg(argument)
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let from = BufReader::new(child.stdout.take().expect("piped"));
        (child, from)
    });
    let (mut child, mut from) = started.join().expect("no panic");
    let mut line = String::new();
    from.read_line(&mut line).expect("it says so");
    let pid = child.id();
    // While a parent waits in `vfork`, its sleep is uninterruptible: its state is `D`.
    while !fs::read_to_string(format!("/proc/{pid}/status"))
        .expect("it lives")
        .contains("State:\tD")
    {
        thread::yield_now();
    }
    // The tracer waits two seconds for a task that does not stop, and not at all for one that waits
    // in `vfork`. A busy machine may delay one attempt, but not all of them.
    let is_at_once = (0..20).any(|_| {
        let (records, took) = within("letting go", move || {
            let mut tracer = Tracer::new(Options::default(), Recorder::new()).expect("a tracer");
            tracer.attach(pid as i32).expect("it can be attached to");
            let begun = Instant::now();
            let (recorder, _keeper) = tracer.detach();
            (recorder.finish(), begun.elapsed())
        });
        assert!(
            records
                .iter()
                .any(|record| matches!(record, Record::Detach { .. }))
        );
        took < Duration::from_secs(1)
    });
    if !is_at_once {
        // The child still holds the write end of this output pipe. Let the child end.
        drop(
            File::options()
                .write(true)
                .open(&path)
                .expect("the child reads"),
        );
        panic!("it waits for the child");
    }
    // The tracing thread has ended, and so has its tracing.
    drop(
        File::options()
            .write(true)
            .open(&path)
            .expect("the child reads"),
    );
    line.clear();
    from.read_line(&mut line).expect("it still works");
    assert_eq!(line, "waited 0\n");
    assert_eq!(child.wait().expect("a status").code(), Some(0));
    fs::remove_file(path).expect("removed");
}

/// The tracer cannot stop a task that cgroup v1 has frozen, and must not wait for it.
#[test]
fn a_process_that_is_frozen_is_let_go_of_at_once() {
    if !require(Cap::Ptrace) {
        return;
    }
    let Some(group) = Cgroup::new_v1_or_skip() else {
        return;
    };
    let (mut child, mut server) = start();
    let pid = child.id();
    group.add(pid).expect("it is moved");
    group.freeze().expect("it is asked for");
    let group = within("freezing", move || {
        while !group.is_frozen() {
            thread::yield_now();
        }
        group
    });
    // A busy machine may delay one attempt, but not all of them.
    let is_at_once = (0..20).any(|_| {
        let took = within("letting go", move || {
            let mut tracer = Tracer::new(Options::default(), Recorder::new()).expect("a tracer");
            tracer.attach(pid as i32).expect("it can be attached to");
            let begun = Instant::now();
            let (_recorder, _keeper) = tracer.detach();
            begun.elapsed()
        });
        took < Duration::from_secs(1)
    });
    // The process still runs, untraced.
    group.thaw().expect("it is let run");
    server.go();
    server.say("end");
    assert!(child.wait().expect("a status").success());
    assert!(is_at_once, "it waits for what is frozen");
}

#[test]
fn a_process_that_executes_itself_again_and_again_is_attached_to_or_has_ended() {
    if !require(Cap::Ptrace) {
        return;
    }
    let started = thread::spawn(|| {
        let itself = env!("CARGO_BIN_EXE_tracee");
        std::process::Command::new(itself)
            .args(["exec-loop", "60"])
            .stdout(Stdio::null())
            .spawn()
            .expect("it starts")
    });
    let mut child = started.join().expect("no panic");
    let pid = child.id() as i32;
    let attached = within("attaching again and again", move || {
        let mut attached = 0;
        loop {
            let mut tracer = Tracer::new(Options::default(), Recorder::new()).expect("a tracer");
            match tracer.attach(pid) {
                Ok(()) => attached += 1,
                Err(Error::Attach { source, .. }) => {
                    assert_eq!(source.raw_os_error(), Some(libc::ESRCH), "{source}");
                    return attached;
                }
                Err(other) => panic!("{other}"),
            }
            let (recorder, keeper) = tracer.detach();
            keeper.serve();
            recorder.finish();
        }
    });
    assert!(attached > 0);
    // The tracer may have reaped the child already.
    drop(child.wait());
}

/// The state of each process, as `/proc` shows it when the process's leader leaves the address
/// space.
struct States(Vec<String>);

impl Observer for States {
    type Held = ();

    fn enter(&mut self, _: Task, _: &MmWithUser) {}

    fn leave(&mut self, task: Task, (): ()) {
        let status = fs::read_to_string(format!("/proc/{}/status", task.tid)).unwrap_or_default();
        let state = status
            .lines()
            .find_map(|line| line.strip_prefix("State:\t"));
        if task.tid == task.pid {
            self.0.push(state.unwrap_or("gone").to_owned());
        }
    }
}

#[test]
fn a_task_that_was_attached_to_leaves_its_memory_before_it_ends() {
    if !require(Cap::Ptrace) {
        return;
    }
    let (mut child, mut server) = start();
    let mut tracer = Tracer::new(Options::default(), States(Vec::new())).expect("a tracer");
    tracer
        .attach(child.id() as i32)
        .expect("it can be attached to");
    let driver = thread::spawn(move || {
        // The first thread writes the answer, so the tracer has seen that thread before it ends the
        // process.
        server.go();
        server.say("quit");
    });
    tracer.run(&AtomicBool::new(false)).expect("it runs");
    driver.join().expect("no panic");
    assert_eq!(tracer.detach().0.0, ["t (tracing stop)"]);
    // The tracer may have reaped the child already.
    drop(child.wait());
}
