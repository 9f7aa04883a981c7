//! A child that is forked while another thread of its parent starts or ends.
//!
//! A thread that starts or ends takes a global lock of the standard library, and a fork copies the
//! lock as it is. The lock guards a tree whose nodes come from the allocator. So if the allocator
//! blocks a thread that starts or ends, that thread sooner or later blocks with the lock held.
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

/// An allocator that blocks each thread that starts or ends, in each call, until the turnstile lets
/// the thread pass.
struct Stops;

#[global_allocator]
static STOPS: Stops = Stops;

static TURNSTILE: AtomicU8 = AtomicU8::new(OPEN);
/// `OPEN`: no thread is blocked. `CLOSED`: the next thread will be blocked. `STOPPED`: one thread
/// is blocked. `OVER`: the threads have ended.
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

// SAFETY: the system's allocator does all of the work and fulfils the trait's contract.
unsafe impl GlobalAlloc for Stops {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        pass();
        // SAFETY: the caller fulfils the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        pass();
        // SAFETY: the caller fulfils the contract of `dealloc`.
        unsafe { System.dealloc(place, layout) }
    }
}

fn starts_everything() -> bool {
    // SAFETY: has no preconditions. It ends a child that hangs after 20 seconds.
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
            // All threads live at the same time, so that the tree has several nodes.
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
                    // This fails if the threads have ended meanwhile.
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
