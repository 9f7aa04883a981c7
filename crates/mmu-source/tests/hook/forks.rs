//! A fork while another thread installs the hook or holds a lock of the loader: the child must not
//! wait for that thread, which does not exist in the child.

use crate::child::alone;
use crate::log::Watch;
use crate::pages::{map, unmap};
use mmu_notifier::Event;
use mmu_source::hook::Hook;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Forks a child that installs a hook and checks that it sees the child's own `munmap`.
fn fork() -> libc::pid_t {
    // SAFETY: glibc makes its allocator and its loader usable in the child. The child ends without
    // the parent's exit handlers.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: takes an integer. It ends a child that hangs after 120 seconds.
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

/// Tells whether the child succeeded in time.
fn has_heard(child: libc::pid_t) -> bool {
    let mut status = 0;
    // SAFETY: writes one int to a local.
    let reaped = unsafe { libc::waitpid(child, &mut status, 0) };
    reaped == child && status == 0
}

/// Installs the hook on another thread and forks after `delay`. Returns `None` if the installation
/// was complete by then.
fn fork_amid(delay: Duration) -> Option<libc::pid_t> {
    let (begun, installed) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            begun.store(true, Ordering::Relaxed);
            let hook = Hook::install().expect("the hook works on this machine");
            installed.store(true, Ordering::Relaxed);
            drop(hook);
        });
        while !begun.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        while start.elapsed() < delay && !installed.load(Ordering::Relaxed) {
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
    alone(
        "forks::a_child_forked_while_another_thread_installs_can_install",
        || {
            const TOO_LATE: i32 = 2;
            const ATTEMPTS: u32 = 12;
            /// Spreads the forks over one installation, which takes milliseconds.
            const STEP: Duration = Duration::from_micros(500);
            // Only the first installation in a process is slow, so each attempt has a process of
            // its own.
            let attempt = |number: u32| {
                // SAFETY: glibc makes its allocator and its loader usable in the child. The child
                // ends without the parent's exit handlers.
                let middle = unsafe { libc::fork() };
                if middle == 0 {
                    let is_good =
                        fork_amid(STEP * number).map(|child| has_heard(child) && has_heard(fork()));
                    // SAFETY: ends the child.
                    unsafe { libc::_exit(is_good.map_or(TOO_LATE, |is_good| i32::from(!is_good))) }
                }
                let mut status = 0;
                // SAFETY: writes one int to a local.
                assert_eq!(unsafe { libc::waitpid(middle, &mut status, 0) }, middle);
                assert!(libc::WIFEXITED(status), "{status}");
                libc::WEXITSTATUS(status)
            };
            let outcomes: Vec<i32> = (0..ATTEMPTS)
                .map(attempt)
                .filter(|outcome| *outcome != TOO_LATE)
                .collect();
            assert!(
                !outcomes.is_empty() && outcomes.iter().all(|outcome| *outcome == 0),
                "{outcomes:?}"
            );
        },
    );
}

/// If a thread holds glibc's lock of `dl_iterate_phdr` during a fork, the lock stays locked in the
/// child.
#[test]
fn a_child_forked_while_another_thread_asks_the_loader_can_install() {
    extern "C" fn hold(_: *mut libc::dl_phdr_info, _: usize, gates: *mut libc::c_void) -> i32 {
        // SAFETY: the test passes a pointer to its two barriers, which outlive the call.
        let [inside, over] = unsafe { &*gates.cast_const().cast::<[Barrier; 2]>() };
        inside.wait();
        over.wait();
        1
    }
    alone(
        "forks::a_child_forked_while_another_thread_asks_the_loader_can_install",
        || {
            let gates = [const { Barrier::new(2) }; 2];
            thread::scope(|scope| {
                scope.spawn(|| {
                    let gates = std::ptr::from_ref(&gates).cast_mut().cast();
                    // SAFETY: the callback has the right signature, and gets a pointer to the
                    // barriers that it expects.
                    unsafe { libc::dl_iterate_phdr(Some(hold), gates) };
                });
                gates[0].wait();
                let child = fork();
                gates[1].wait();
                assert!(has_heard(child), "it installs and hears its own call");
            });
        },
    );
}
