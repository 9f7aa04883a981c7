//! A child that is forked while another thread of its parent starts or ends.
//!
//! A thread of the standard library takes a global lock of that library then, and a fork copies the
//! lock as it is. The lock guards a tree, whose nodes come from the allocator: so an allocator that
//! stops a starting or ending thread stops it with the lock held, sooner or later.
#![cfg(target_os = "linux")]

use mmu_source::kernel::Kernel;
use mmu_source::uffd::Uffd;
use srcu::Srcu;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use testkit::{Cap, in_child, require};

/// Stops each thread that starts or ends, in each call, until the turnstile lets it through.
struct Stops;

#[global_allocator]
static STOPS: Stops = Stops;

static TURNSTILE: AtomicU8 = AtomicU8::new(OPEN);
/// 1. No thread is stopped. 2. The next one is. 3. One is. 4. The threads have ended.
const OPEN: u8 = 1;
const CLOSED: u8 = 2;
const STOPPED: u8 = 3;
const OVER: u8 = 4;

thread_local! {
    /// Whether the thread is neither starting nor ending.
    static RUNS: Cell<bool> = const { Cell::new(false) };
}

fn pass() {
    let is_free = |now| TURNSTILE.load(Ordering::SeqCst) == now;
    while !RUNS.get() && !is_free(OPEN) && !is_free(OVER) {
        if TURNSTILE
            .compare_exchange(CLOSED, STOPPED, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
        {
            while is_free(STOPPED) {
                thread::yield_now();
            }
            return;
        }
        thread::yield_now();
    }
}

// SAFETY: all that the trait demands is the system's allocator's, which does the work.
unsafe impl GlobalAlloc for Stops {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        pass();
        // SAFETY: the caller's duty.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        pass();
        // SAFETY: the caller's duty.
        unsafe { System.dealloc(place, layout) }
    }
}

fn starts_everything() -> bool {
    // SAFETY: no preconditions. A child that hangs need not take two minutes.
    unsafe { libc::alarm(20) };
    let srcu = Srcu::new();
    srcu.call(|| ());
    srcu.barrier().is_ok() && Kernel::rehearse(4096).is_ok() && Uffd::start().is_ok()
}

#[test]
fn a_child_starts_every_source_whatever_threads_were_starting_in_the_parent() {
    const THREADS: usize = 40;
    if !(require(Cap::Bpf) && require(Cap::Userfaultfd)) {
        return;
    }
    RUNS.set(true);
    let together = Barrier::new(THREADS);
    thread::scope(|scope| {
        scope.spawn(|| {
            RUNS.set(true);
            let waits = || {
                RUNS.set(true);
                together.wait();
                RUNS.set(false);
            };
            TURNSTILE.store(CLOSED, Ordering::SeqCst);
            // All of them live at once, so that the tree has several nodes.
            thread::scope(|scope| (0..THREADS).for_each(|_| drop(scope.spawn(waits))));
            TURNSTILE.store(OVER, Ordering::SeqCst);
        });
        let mut forks = 0;
        let served = loop {
            match TURNSTILE.load(Ordering::SeqCst) {
                OVER => break true,
                STOPPED => {
                    forks += 1;
                    let child = || {
                        TURNSTILE.store(OPEN, Ordering::SeqCst);
                        starts_everything()
                    };
                    let served =
                        catch_unwind(AssertUnwindSafe(|| in_child(child))).unwrap_or(false);
                    if !served {
                        TURNSTILE.store(OPEN, Ordering::SeqCst);
                        break false;
                    }
                    // Unless the threads have ended meanwhile.
                    let _ = TURNSTILE.compare_exchange(
                        STOPPED,
                        CLOSED,
                        Ordering::SeqCst,
                        Ordering::SeqCst,
                    );
                }
                _ => thread::yield_now(),
            }
        };
        assert!(served, "a child hangs");
        assert!(forks >= THREADS, "{forks} forks only");
    });
}
