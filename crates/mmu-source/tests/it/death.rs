//! Tasks that die in the middle of a call, and address spaces that exit with subscribers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use mmu_notifier::{InvalidateRange, Mm, MmWithUser, Notifier, Registration};
use mmu_source::process::{ExitStatus, Observer, Options, Task, TaskEvent, Tracer, current};
use testkit::{Cap, require, rounds};

use crate::log::{Record, Recorder, page_size, trace, trace_with, tracee, with_stdout};

/// Kills a process.
fn kill(pid: i32) {
    // SAFETY: `kill` takes integers; the process is a child of the test.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

#[test]
fn a_task_killed_in_its_call_closes_its_bracket_and_leaves() {
    if !require(Cap::Ptrace) {
        return;
    }
    let killed = AtomicBool::new(false);
    let recorder = Recorder::with(Box::new(move |part| {
        // Only calls of the threads count: the loader may unmap a range of the same size while
        // there is one task.
        let is_threads =
            part.task.tid != part.task.pid && part.end - part.start == 37 * page_size();
        if part.cause == "munmap" && is_threads && !killed.swap(true, Ordering::Relaxed) {
            kill(part.task.pid);
        }
    }));
    let trace = trace_with(Options::default(), recorder, &["threads", "4", "100"]);
    assert_eq!(trace.status, ExitStatus::Signal(libc::SIGKILL));
    // The recorder has checked that every start has an end. Calls that did not return because of
    // the kill have no result.
    let died: Vec<_> = trace
        .ends()
        .filter(|(_, result)| result.is_none())
        .collect();
    assert!(
        died.iter().any(|(part, _)| part.cause == "munmap"),
        "{died:?}"
    );
    let exits = trace
        .records
        .iter()
        .filter(|record| matches!(record, Record::Exit { .. }));
    assert!(exits.clone().count() > 1);
    for exit in exits {
        assert!(
            matches!(
                exit,
                Record::Exit {
                    status: ExitStatus::Signal(libc::SIGKILL),
                    ..
                }
            ),
            "{exit:?}"
        );
    }
}

#[test]
fn a_parent_killed_while_it_forks_leaves_no_child_behind() {
    if !require(Cap::Ptrace) {
        return;
    }
    for _ in 0..rounds(25) {
        // If a child stayed stopped because no parent named it, the run would not end.
        let trace = trace(&["forks-and-dies", "20"]);
        assert_eq!(trace.status, ExitStatus::Signal(libc::SIGKILL));
    }
}

#[test]
fn a_thread_killed_before_it_was_named_is_not_waited_for() {
    if !require(Cap::Ptrace) {
        return;
    }
    // If such a thread stayed stopped, the run would not end: the kernel reports the end of the
    // leader only after that of the thread.
    assert_eq!(
        trace(&["killed-cloning", &rounds(300).to_string()]).status,
        ExitStatus::Code(0)
    );
}

#[test]
fn a_target_that_dies_in_the_call_of_another_does_not_wait_for_it() {
    if !require(Cap::Ptrace) {
        return;
    }
    let child = Arc::new(Mutex::new(0));
    let of_probe = Arc::clone(&child);
    let recorder = Recorder::with(Box::new(move |part| {
        if matches!(part.cause, "fork" | "clone") {
            *of_probe.lock().expect("not poisoned") = part.task.pid;
        }
        if part.cause == "process_madvise" {
            // The caller is the parent of the only other process.
            let children =
                std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", part.task.pid));
            let children = children.expect("the kernel lists children");
            kill(children.trim().parse().expect("one child"));
        }
    }));
    let trace = trace_with(Options::default(), recorder, &["other"]);
    assert_ne!(*child.lock().expect("not poisoned"), 0);
    // The case asserts that its child exits. The child was killed, so the assertion fails.
    assert_eq!(trace.status, ExitStatus::Code(101));
    assert!(
        trace
            .ends()
            .any(|(part, _)| part.cause == "process_madvise")
    );
}

/// Counts the callbacks of one address space.
#[derive(Debug, Default)]
struct Counts {
    released: AtomicUsize,
    starts: AtomicUsize,
    ends: AtomicUsize,
}

#[derive(Debug)]
struct Counter(Arc<Counts>, &'static str);

impl Notifier for Counter {
    fn release(&self, _: &Mm) {
        let current = current().expect("release runs on behalf of the last task");
        assert_eq!(current.cause, self.1);
        self.0.released.fetch_add(1, Ordering::Relaxed);
    }

    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
        assert_eq!(self.0.released.load(Ordering::Relaxed), 0);
        self.0.starts.fetch_add(1, Ordering::Relaxed);
    }

    fn invalidate_range_end(&self, _: &InvalidateRange<'_>) {
        self.0.ends.fetch_add(1, Ordering::Relaxed);
    }
}

/// Registers on every address space, and stays registered after the address space has exited.
#[derive(Default)]
struct Keeps {
    registered: HashMap<u64, (Registration<Counter>, Arc<Counts>)>,
    /// The expected cause of each address space's exit, in order of appearance.
    causes: Vec<&'static str>,
    tasks: usize,
}

impl Observer for Keeps {
    type Held = u64;

    fn enter(&mut self, _: Task, mm: &MmWithUser) -> u64 {
        self.tasks += 1;
        if !self.registered.contains_key(&mm.id()) {
            let counts = Arc::new(Counts::default());
            let counter = Counter(Arc::clone(&counts), self.causes.remove(0));
            let registration = Registration::new(mm, counter).expect("no bracket is open here");
            self.registered.insert(mm.id(), (registration, counts));
        }
        mm.id()
    }

    fn leave(&mut self, _: Task, _: u64) {
        self.tasks -= 1;
    }

    fn event(&mut self, event: &TaskEvent<'_>) {
        if let TaskEvent::Exec { old_mm, .. } = event {
            let (_, counts) = &self.registered[&old_mm.id()];
            assert_eq!(
                counts.released.load(Ordering::Relaxed),
                1,
                "execve is the end of the old address space"
            );
        }
    }
}

fn keep(args: &[&str], causes: &[&'static str]) -> Vec<Arc<Counts>> {
    let observer = Keeps {
        causes: causes.to_vec(),
        ..Keeps::default()
    };
    let mut tracer = Tracer::new(Options::default(), observer).expect("a tracer");
    let (_stdout, command) = with_stdout(tracee(args));
    tracer.spawn(command).expect("it starts");
    tracer.run(&AtomicBool::new(false)).expect("it runs");
    let observer = tracer.detach().0;
    assert_eq!(observer.tasks, 0);
    assert!(
        observer.causes.is_empty(),
        "fewer address spaces than expected"
    );
    observer
        .registered
        .into_values()
        .map(|(registration, counts)| {
            registration.unregister().expect("no bracket is open here");
            counts
        })
        .collect()
}

#[test]
fn the_end_of_an_address_space_releases_each_subscriber_once() {
    if !require(Cap::Ptrace) {
        return;
    }
    let all = [
        keep(&["exec"], &["execve", "exit"]),
        keep(&["threads", "8", "5"], &["exit"]),
    ]
    .concat();
    assert_eq!(all.len(), 3);
    for counts in all {
        // `unregister` calls `release` if the exit has not done so. But then no task is current,
        // and `Counter` panics. So a count of one means that the exit has called `release`, once.
        assert_eq!(counts.released.load(Ordering::Relaxed), 1);
        let [starts, ends] =
            [&counts.starts, &counts.ends].map(|count| count.load(Ordering::Relaxed));
        assert!(starts == ends && starts > 0);
    }
}
