//! The thread that makes libfabric drop stale registrations before the next look-up, so that their
//! pinned memory is released early.
//!
//! A callback only wakes the thread. The thread sleeps on a futex, so there is no descriptor that a
//! daemon could close.

#![allow(unsafe_code, reason = "futex calls; see the crate's Safety section")]

use crate::counts;
use crate::ranges::Ranges;
use crate::wait::wait_until;
use srcu::Thread;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// Wakes the thread of one address space.
#[derive(Debug)]
pub(crate) struct Reaper {
    /// [`IDLE`], [`ASKED`] or [`ASLEEP`].
    word: AtomicU32,
    is_started: AtomicBool,
}

/// The thread is at work, or about to sleep.
const IDLE: u32 = 0;
/// The thread must look again before it sleeps.
const ASKED: u32 = 1;
/// The thread sleeps, or is about to, and must be woken.
const ASLEEP: u32 = 2;

/// How long stale registrations stay pinned if the program does not look them up.
const NAP: Duration = Duration::from_millis(1);

/// Makes libfabric drop every registration that overlaps the range of a start and a length.
///
/// # Blocking
/// Takes the lock of all caches.
pub(crate) type Notify = fn(u64, u64);

/// Set when the process exits: libfabric's destructors may be running.
static EXITING: AtomicBool = AtomicBool::new(false);
/// The process whose thread is about to call `notify`, or is in it; 0 if none. The child of a fork
/// inherits the parent's value, and has no such thread.
static NOTIFYING: AtomicU32 = AtomicU32::new(0);

impl Reaper {
    pub(crate) const fn new() -> Reaper {
        Reaper {
            word: AtomicU32::new(IDLE),
            is_started: AtomicBool::new(false),
        }
    }

    /// Starts the thread, once. Returns false if it cannot be started.
    pub(crate) fn start(&'static self, ranges: &'static Ranges, notify: Notify) -> bool {
        // Relaxed: the flag publishes no data.
        if self.is_started.load(Ordering::Relaxed) || self.is_started.swap(true, Ordering::Relaxed)
        {
            return true;
        }
        let made =
            Thread::spawn(c"mmun-dropin", move || self.serve(ranges, notify)).map(Thread::detach);
        if made.is_err() {
            self.is_started.store(false, Ordering::Relaxed);
            return false;
        }
        // A new thread maps and unmaps memory, and Open MPI may patch the functions for that as
        // soon as this returns. So wait until the thread sleeps, for a second at most.
        wait_until(Duration::from_secs(1), || {
            self.word.load(Ordering::Relaxed) != IDLE
        });
        // The caller may hold the lock of all caches, so the new thread drops the parent's
        // registrations later.
        if ranges.has_parents() {
            self.wake();
        }
        true
    }

    /// Makes the thread look for stale ranges. Callbacks may call this.
    pub(crate) fn wake(&self) {
        // ORDER(dropin-reaper): Release, for the marks. Partner: the swap in `serve`.
        if self.word.swap(ASKED, Ordering::AcqRel) == ASLEEP {
            // SAFETY: a futex call on a live word; `FUTEX_WAKE` does not access the word.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    &raw const self.word,
                    libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                    1,
                )
            };
        }
    }

    fn serve(&self, ranges: &'static Ranges, notify: Notify) {
        loop {
            // ORDER(dropin-reaper): Acquire, for the marks. Partner: the swap in `wake`.
            if self.word.swap(IDLE, Ordering::AcqRel) != ASKED {
                self.sleep();
                continue;
            }
            // If the program registers the memory anew in this time, libfabric drops the stale
            // registration itself. Further changes in this time need no futex call to wake this
            // thread.
            std::thread::sleep(NAP);
            // ORDER(dropin-reaper): Acquire, as above.
            self.word.swap(IDLE, Ordering::AcqRel);
            for stale in ranges.stale() {
                // ORDER(dropin-exit): SeqCst: either this load sees `EXITING`, or `stop_all` sees
                // `NOTIFYING` and waits. Partner: the store and the load there.
                NOTIFYING.store(std::process::id(), Ordering::SeqCst);
                if EXITING.load(Ordering::SeqCst) {
                    NOTIFYING.store(0, Ordering::Relaxed);
                    return;
                }
                counts::REAPED.add(u64::from(!stale.is_everything()));
                notify(stale.start, stale.len);
                NOTIFYING.store(0, Ordering::Release);
                ranges.dropped(stale);
            }
        }
    }

    /// Sleeps until `wake` is called.
    fn sleep(&self) {
        // Relaxed: the swap in `serve` acquires the marks.
        if self
            .word
            .compare_exchange(IDLE, ASLEEP, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
        {
            let none = ptr::null::<libc::timespec>();
            // SAFETY: a futex call on a live word, without a timeout. It returns at once if the
            // word has changed.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    &raw const self.word,
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    ASLEEP,
                    none,
                )
            };
        }
    }
}

/// After this, the thread makes no further call of `notify`. Waits for a call that runs, for a
/// second at most: the call may itself wait for a lock that the exiting thread holds.
pub(crate) fn stop_all() {
    // ORDER(dropin-exit): SeqCst, as in `serve`.
    EXITING.store(true, Ordering::SeqCst);
    wait_until(Duration::from_secs(1), || {
        NOTIFYING.load(Ordering::SeqCst) != std::process::id()
    });
}
