//! A fork while another thread installs: the child has none of that thread's work to wait for.

use crate::child::alone;
use crate::log::Watch;
use crate::pages::{map, unmap};
use mmu_notifier::Event;
use mmu_source::hook::Hook;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, thread};

/// Forks a child that installs a hook and hears its own `munmap`.
fn fork() -> libc::pid_t {
    // SAFETY: glibc makes its allocator and its loader usable in the child, and the child ends without running the parent's exit
    // handlers.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: no preconditions.
            unsafe { libc::alarm(120) };
            let watch = Watch::new();
            let pages = map(1, 7);
            watch.listen(pages, 4096);
            unmap(pages, 1);
            let heard = watch.heard();
            let is_good = heard.len() == 2 && heard.iter().all(|heard| heard.event == Event::Unmap);
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!is_good)) }
        }
        child => {
            assert!(child > 0, "fork");
            child
        }
    }
}

/// Tells whether a child has heard it in time.
fn has_heard(child: libc::pid_t) -> bool {
    let mut status = 0;
    // SAFETY: writes one int to a local.
    let reaped = unsafe { libc::waitpid(child, &mut status, 0) };
    reaped == child && status == 0
}

/// Whether libc's file is open: reading it is the beginning of an installation's work, and not a tenth of it.
fn is_reading_libc() -> bool {
    let entries = fs::read_dir("/proc/self/fd").expect("/proc is there");
    let links = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    links.into_iter().any(|link| link.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libc.so")))
}

/// Installs in another thread, and forks amid that. `None` if this thread did not get to run in time.
fn fork_amid() -> Option<libc::pid_t> {
    let installed = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let hook = Hook::install().expect("the hook works on this machine");
            installed.store(true, Ordering::Relaxed);
            drop(hook);
        });
        while !is_reading_libc() && !installed.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
        let child = fork();
        if installed.load(Ordering::Relaxed) {
            has_heard(child);
            return None;
        }
        Some(child)
    })
}

#[test]
fn a_child_forked_while_another_thread_installs_can_install() {
    alone("forks::a_child_forked_while_another_thread_installs_can_install", || {
        const TOO_LATE: i32 = 2;
        // The first installation of a process is the one that takes its time: each attempt has a process of its own.
        let attempt = || {
            // SAFETY: as in `fork`.
            let middle = unsafe { libc::fork() };
            if middle == 0 {
                let is_good = fork_amid().map(|child| has_heard(child) && has_heard(fork()));
                // SAFETY: ends the child.
                unsafe { libc::_exit(is_good.map_or(TOO_LATE, |is_good| i32::from(!is_good))) }
            }
            let mut status = 0;
            // SAFETY: writes one int to a local.
            assert_eq!(unsafe { libc::waitpid(middle, &mut status, 0) }, middle);
            assert!(libc::WIFEXITED(status), "{status}");
            libc::WEXITSTATUS(status)
        };
        let outcome = (0..100).map(|_| attempt()).find(|outcome| *outcome != TOO_LATE);
        assert_eq!(outcome, Some(0));
    });
}
