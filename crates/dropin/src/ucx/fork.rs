//! A fork while other threads use UCX's caches.
//!
//! The child has a copy of each cache. If another thread of the parent holds a lock of the cache at
//! the fork, no thread of the child releases that lock, and the child's first look-up waits for
//! ever. So the thread that forks makes three steps:
//! 1. It sets [`FORKING`], and waits until no other thread is inside of UCX for this library. A
//!    report of another thread must not wait for the fork: that thread can be inside `free` and
//!    hold a lock of the allocator, for which `fork` waits. So reports are put off from now on
//!    ([`late`]), and the next look-up makes them.
//! 2. It takes the lock of each UCP context ([`context`](super::context)), with which threads share
//!    the context's caches from UCX 1.14 on. With UCX 1.12 and 1.13 it takes the locks of each
//!    transport's cache ([`locks`](super::locks)); look-ups that begin now wait before they take a
//!    lock, because these locks prefer readers.
//! 3. After the fork, the parent releases the locks and makes the reports that were put off. The
//!    child releases the locks, or makes them anew.
//!
//! A thread that holds a lock of step 2 waits for no lock that the thread that forks has taken
//! before. It can report changes, so the thread that forks takes the locks of contexts first, which
//! no report needs.
//!
//! Each wait of the thread that forks has a limit, because that thread may hold one of the locks,
//! or a lock for which the holder of one of them waits: that of an allocator whose handler has run.
//!
//! Handlers of a fork run in the reverse order of their registration before the fork. UCX's own
//! handler takes a cache's lock and releases it. So this module registers its handlers when the
//! library is loaded, before UCX registers its own.

#![allow(unsafe_code, reason = "`pthread_atfork` and `gettid`")]

use super::locks::until;
use super::{LOOKS_UNLOCKED, SERVED, caches, report_now, serve_child};
use crate::{late, space};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The thread that forks; 0 if none does.
static FORKING: AtomicU32 = AtomicU32::new(0);
/// How many forks have begun inside of a fork's handlers. Only the thread that forks accesses it.
static NESTED: AtomicU32 = AtomicU32::new(0);
/// How many threads are inside of UCX for this library.
static INSIDE: AtomicU32 = AtomicU32::new(0);

/// The longest wait of the thread that forks.
const LIMIT: Duration = Duration::from_secs(1);

/// Registers the handlers.
pub(crate) fn register() {
    // SAFETY: the handlers are functions of this object; glibc removes them when the object is
    // unloaded.
    unsafe { libc::pthread_atfork(Some(before), Some(after), Some(in_child)) };
}

/// Marks the calling thread as inside of UCX until [`leave`]. Returns false, and marks nothing, if
/// a thread forks.
pub(super) fn enter() -> bool {
    enter_always();
    // ORDER(dropin-fork): SeqCst: either this load sees the fork, or the thread that forks sees the
    // addition in `enter_always`, and waits. Partner: the exchange and the load in `before`.
    let is_free = FORKING.load(Ordering::SeqCst) == 0;
    if !is_free {
        leave();
    }
    is_free
}

/// Like [`enter`], also while a thread forks.
pub(super) fn enter_always() {
    // ORDER(dropin-fork): SeqCst, see `enter`.
    INSIDE.fetch_add(1, Ordering::SeqCst);
}

/// Like [`enter`], but waits until no other thread forks. The caller must hold no lock for which
/// `fork` or the thread that forks waits.
pub(super) fn enter_after_fork() {
    while !enter() {
        if !is_under_way() {
            return enter_always();
        }
        std::thread::yield_now();
    }
}

pub(super) fn leave() {
    // ORDER(dropin-fork): Release: the locks of UCX that this thread took are free before this.
    // Partner: the load in `before`.
    INSIDE.fetch_sub(1, Ordering::Release);
}

/// Tells whether another thread forks.
fn is_under_way() -> bool {
    let forking = FORKING.load(Ordering::Relaxed);
    forking != 0 && forking != own()
}

/// Waits until no other thread forks. The caller must hold no lock, as for [`enter_after_fork`].
pub(super) fn wait() {
    while is_under_way() {
        std::thread::yield_now();
    }
}

fn own() -> u32 {
    // SAFETY: the call has no arguments, and always succeeds.
    unsafe { libc::gettid() as u32 }
}

fn is_own() -> bool {
    FORKING.load(Ordering::Relaxed) == own()
}

extern "C" fn before() {
    if !matches!(SERVED.get(), Some(Ok(()))) {
        return;
    }
    if is_own() {
        NESTED.fetch_add(1, Ordering::Relaxed);
        return;
    }
    space::wait_for_threads();
    let end = Instant::now() + LIMIT;
    // ORDER(dropin-fork): SeqCst, before the load of `INSIDE`. Partner: `enter`. It also acquires
    // the end of another thread's fork. Partner: the store in `after`.
    let claim = || {
        FORKING
            .compare_exchange(0, own(), Ordering::SeqCst, Ordering::Relaxed)
            .is_ok()
    };
    if !until(end, claim) {
        return;
    }
    late::stop_fast_paths();
    if until(end, || INSIDE.load(Ordering::SeqCst) == 0) {
        caches::take_locks(end);
    }
}

extern "C" fn after() {
    if !is_own() {
        return;
    }
    if NESTED.load(Ordering::Relaxed) != 0 {
        NESTED.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    caches::release_locks();
    // ORDER(dropin-fork): Release, after the locks. Partner: the exchange in `before`.
    FORKING.store(0, Ordering::Release);
    // A report must not meet a look-up of these versions in another thread (see `late`).
    if LOOKS_UNLOCKED.load(Ordering::Relaxed) {
        return;
    }
    if let Some(space) = space::current() {
        let _whole = srcu::Uncancelled::enter();
        space.late.report(report_now);
    }
}

/// Runs in the child, which has one thread. So all accesses are relaxed. A thread that finds the
/// child's space finds these stores or later ones, because the space is published afterwards.
extern "C" fn in_child() {
    caches::renew_locks();
    FORKING.store(0, Ordering::Relaxed);
    NESTED.store(0, Ordering::Relaxed);
    INSIDE.store(0, Ordering::Relaxed);
    if SERVED.get().is_some() {
        serve_child();
    }
}
