//! Makes the domains usable in the child of a `fork`.
//!
//! Nothing is locked before the fork: a thread that waits for one of our locks may hold the
//! allocator's, which `fork` wants next. So the child may find any slow-path lock held by a thread
//! that is gone, and what it guards half changed. Every structure is therefore built so that each
//! single store leaves it whole, and the child frees the locks.
//!
//! In the child the calling thread keeps its sections; those of all other threads have ended,
//! except movable ones, which may have been handed to the calling thread. The reclaimer is gone,
//! unless it is what called `fork`; callbacks that were queued stay queued.

use super::state::pool;
use super::{ids, pages, reclaimer};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

/// How many forks lie between this process and the first of its family that had this crate.
static FORKS: AtomicUsize = AtomicUsize::new(0);

/// How many registrations have begun: hardly ever more than one.
static REGISTERED: AtomicUsize = AtomicUsize::new(0);

/// Returns how many forks lie between this process and the first of its family that had this crate:
/// what it says in one process it says in no child of it.
#[inline]
pub fn forks() -> usize {
    // ORDER: Relaxed is enough: it changes while the process has one thread.
    FORKS.load(Ordering::Relaxed)
}

/// Registers before `main`. A fork runs only the handlers that were there when it began: were they
/// registered with the first domain, another thread could take a lock of ours between that and the
/// end of a fork already begun, and the child would find it held. What is left is a library that is
/// loaded, and used, while another thread is in the middle of `fork`.
///
/// The section is that of the functions which are called at start, with arguments that `register`
/// does not take; it needs nothing that is not there before `main`.
#[cfg(not(miri))]
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = register;

/// Registers the handler that repairs the domains in a child of this process.
pub(super) extern "C" fn register() {
    static DONE: AtomicBool = AtomicBool::new(false);
    // Several threads may register at first. None of them may continue before *a* registration is
    // complete: a fork before that has a child that no handler repairs. None waits for another's
    // registration either: in such a child it never completes. ORDER(srcu-fork): Acquire, partner
    // below.
    if !DONE.load(Ordering::Acquire) {
        REGISTERED.fetch_add(1, Ordering::Relaxed);
        // SAFETY: `pthread_atfork` needs functions that stay. glibc has room for 48 without
        // allocating.
        unsafe { libc::pthread_atfork(None, None, Some(child)) };
        // ORDER(srcu-fork): Release: the registration comes first. Partner: the load above.
        DONE.store(true, Ordering::Release);
    }
}

unsafe extern "C" fn child() {
    static REPAIRED: AtomicI32 = AtomicI32::new(0);
    // SAFETY: No preconditions.
    let this_process = unsafe { libc::getpid() };
    // Not by the number alone: in a process namespace of its own, a child can have that of its
    // parent.
    let is_again = REPAIRED.swap(this_process, Ordering::Relaxed) == this_process;
    if is_again && REGISTERED.load(Ordering::Relaxed) > 1 {
        return;
    }
    FORKS.fetch_add(1, Ordering::Relaxed);
    ids::after_fork();
    pages::after_fork();
    let reclaimer_survived = reclaimer::after_fork();
    pool::each(|state| {
        state.updater.gp.after_fork();
        state.updater.event.after_fork();
        let mine = state.table.mine().map(ptr::from_ref);
        state.table.each(|slot| {
            if mine != Some(ptr::from_ref(slot)) {
                slot.local.settle();
            }
        });
        state.restart();
        reclaimer::adopt(state, reclaimer_survived);
    });
}
