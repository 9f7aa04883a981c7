//! Programs whose memory or `/proc` files the tracer may not read, and a program with a seccomp
//! filter of its own.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use mmu_source::process::{ExitStatus, Options};
use testkit::{Cap, require, rounds};

use crate::log::{Record, Recorder, Trace, hex, trace_with};

/// Runs `run` on a thread without the privilege to read other processes. Children of that thread
/// lack the privilege too.
fn without_privilege<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    let thread = thread::spawn(move || {
        give_up_ptrace();
        done.send(run()).expect("the test waits");
    });
    match result.recv() {
        Ok(value) => value,
        Err(_) => std::panic::resume_unwind(thread.join().expect_err("it sent nothing")),
    }
}

/// Removes `CAP_SYS_PTRACE` from this thread for good. An ordinary user does not have it.
fn give_up_ptrace() {
    const CAP_SYS_PTRACE: u32 = 19;
    const VERSION_3: u32 = 0x2008_0522;
    // `header`: the version, and the thread (0: this one). `sets`: the low 32 bits of the
    // effective, permitted and inheritable sets, then their high 32 bits.
    let header = [VERSION_3, 0];
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: this option takes integers. It fails without `CAP_SETPCAP`; an ordinary user does not
    // hold `CAP_SYS_PTRACE` anyway.
    unsafe {
        libc::prctl(
            libc::PR_CAPBSET_DROP,
            CAP_SYS_PTRACE as libc::c_ulong,
            0,
            0,
            0,
        )
    };
    assert_eq!(
        // SAFETY: the call reads the header and writes both sets, which have the layout of version
        // 3.
        unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) },
        0
    );
    for set in &mut sets[0] {
        *set &= !(1 << CAP_SYS_PTRACE);
    }
    assert_eq!(
        // SAFETY: the call reads the header and both sets, which have the layout of version 3.
        unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) },
        0
    );
}

fn trace_hidden(seccomp: bool, args: &'static [&'static str]) -> Trace {
    without_privilege(move || {
        let mut options = Options::default();
        options.seccomp = seccomp;
        trace_with(options, Recorder::new(), args)
    })
}

#[test]
fn children_of_a_program_that_cannot_be_read_are_in_address_spaces_of_their_own() {
    if !require(Cap::Ptrace) || !require(Cap::SeccompTrace) {
        return;
    }
    for seccomp in [true, false] {
        let trace = trace_hidden(seccomp, &["hidden-fork"]);
        assert_eq!(trace.status, ExitStatus::Code(0), "{}", trace.stdout);
        let forks = trace.records.iter().filter_map(|record| match record {
            Record::Fork {
                task,
                child,
                mm,
                child_mm,
            } => Some((task, child, mm, child_mm)),
            _ => None,
        });
        let forks: Vec<_> = forks.collect();
        assert_eq!(forks.len(), trace.said("child").len());
        // Not every processor has `fork`.
        assert!(forks.len() >= 3, "each call that forks was made");
        for (words, (_, child, mm, child_mm)) in trace.said("child").into_iter().zip(forks) {
            assert_eq!((words[0], words[1]), (child.tid.to_string().as_str(), "0"));
            assert_ne!(mm, child_mm, "{words:?}: nothing says that it shares");
            let told = |mm| {
                trace
                    .ends()
                    .any(|(part, _)| part.task == *child && part.cause == "munmap" && part.mm == mm)
            };
            assert!(told(*child_mm), "{words:?}");
            // These calls are known to have copied the memory. `clone3` has its flags in memory
            // that the tracer cannot read, so it may have shared the memory.
            assert_eq!(told(*mm), words[2] == "clone3", "{words:?}");
        }
    }
}

#[test]
fn unreadable_advice_is_reported_as_every_possible_change() {
    if !require(Cap::Ptrace) || !require(Cap::Numa) {
        return;
    }
    let trace = trace_hidden(true, &["hidden-advice"]);
    assert_eq!(trace.status, ExitStatus::Code(0), "{}", trace.stdout);
    for (cause, event) in [
        ("process_madvise", "clear"),
        ("move_pages", "migrate"),
        ("mmap", "unmap"),
    ] {
        let said = trace.said(cause);
        let Some(words) = said.first() else {
            assert_eq!(cause, "mmap", "only files of huge pages may be missing");
            continue;
        };
        let (start, end, result) = (hex(words[0]), hex(words[1]), words[2].parse().ok());
        let told = trace.ends().any(|(part, told)| {
            (part.cause, part.event, told) == (cause, event, result)
                && part.start <= start
                && (part.end == 0 || end <= part.end)
        });
        assert!(told, "{cause} {words:?}");
    }
}

#[test]
fn many_children_of_a_program_that_cannot_be_read_all_run() {
    if !require(Cap::Ptrace) {
        return;
    }
    for seccomp in [true, false] {
        let trace = trace_hidden(seccomp, &["hidden-storm", "100"]);
        assert_eq!(
            (trace.stdout.as_str(), trace.status),
            ("failed 0\n", ExitStatus::Code(0))
        );
    }
}

#[test]
fn a_filter_of_the_programs_own_that_asks_for_a_tracer_finds_none() {
    if !require(Cap::Ptrace) || !require(Cap::SeccompTrace) {
        return;
    }
    for seccomp in [true, false] {
        let mut options = Options::default();
        options.seccomp = seccomp;
        let trace = trace_with(options, Recorder::new(), &["own-filter"]);
        let refused = -libc::ENOSYS;
        assert_eq!(
            trace.stdout,
            format!("mprotect {refused}\ngetppid {refused}\n"),
            "with our filter: {seccomp}"
        );
        assert_eq!(trace.status, ExitStatus::Code(0));
    }
}

/// Hides `/proc` from this thread and its children.
fn give_up_proc() {
    // SAFETY: takes integers. From here on the thread has its own mount namespace.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0);
    let (none, private) = (std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE);
    assert_eq!(
        // SAFETY: live strings and null pointers, as the call requires for a change of propagation.
        unsafe { libc::mount(none, c"/".as_ptr(), none, private, none.cast()) },
        0
    );
    // Mount another file system over `/proc`. Unmounting could uncover the `/proc` of an outer pid
    // namespace.
    let (tmpfs, proc) = (c"tmpfs".as_ptr(), c"/proc".as_ptr());
    assert_eq!(
        // SAFETY: live strings, and no data.
        unsafe { libc::mount(tmpfs, proc, tmpfs, 0, std::ptr::null()) },
        0
    );
}

#[test]
fn a_parent_killed_while_it_forks_leaves_no_child_behind_without_proc() {
    if !require(Cap::Ptrace) || !require(Cap::MountNamespace) {
        return;
    }
    let (end, ended) = mpsc::channel();
    thread::spawn(move || {
        give_up_proc();
        for _ in 0..rounds(25) {
            // If a child stayed stopped because no parent named it, the run would not end.
            let trace = trace_with(
                Options::default(),
                Recorder::new(),
                &["forks-and-dies", "20"],
            );
            assert_eq!(trace.status, ExitStatus::Signal(libc::SIGKILL));
        }
        end.send(()).expect("the test waits");
    });
    assert_eq!(
        ended.recv_timeout(Duration::from_secs(240)),
        Ok(()),
        "a child stays stopped"
    );
}
