//! Makes the domains usable in the child of a `fork`.
//!
//! No lock of this crate is taken before the fork, because that could deadlock: `fork` takes the
//! allocator's lock next, and the thread that holds that lock may be waiting for a lock of this
//! crate. So the child may find any slow-path lock held by a thread that does not exist there, with
//! the guarded data half changed. Therefore each single store leaves every structure consistent,
//! and the child frees the locks.
//!
//! In the child, the sections of the calling thread stay open. The sections of all other threads
//! have ended, except those of `SendGuard`s, which may have been handed to the calling thread. The
//! reclaimer does not exist in the child, unless the reclaimer itself called `fork`. Queued
//! callbacks stay queued.

use super::state::pool;
use super::{ids, pages, reclaimer};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

/// The number of forks between this process and the ancestor in which `register` ran first.
static FORKS: AtomicUsize = AtomicUsize::new(0);

/// How many registrations have begun. More than one only if several threads registered at the same
/// time.
static REGISTERED: AtomicUsize = AtomicUsize::new(0);

/// Returns the number of forks between this process and the ancestor that loaded this crate. So the
/// result of a process differs from that of each of its ancestors since then. A `_Fork` and a raw
/// `clone` system call run no fork handlers and are not counted.
#[inline]
pub fn forks() -> usize {
    // ORDER: Relaxed: the count changes only in the child of a fork, while it has one thread.
    FORKS.load(Ordering::Relaxed)
}

/// Registers the handler before `main`. A fork runs only the handlers that were registered when it
/// began. Suppose the handler were registered with the first domain, while a fork is already in
/// progress. Then another thread could take a lock of this crate before that fork ends, and the
/// child would find the lock held. One case remains: a library that is loaded and used while
/// another thread is in the middle of `fork`.
///
/// The loader calls the functions of the section `.init_array` at start, with arguments that
/// `register` ignores. `register` may run before `main`, because it needs only atomics and
/// `pthread_atfork`.
#[cfg(not(miri))]
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = register;

/// Registers the handler that repairs the domains in a child of this process.
pub(super) extern "C" fn register() {
    static DONE: AtomicBool = AtomicBool::new(false);
    // Several threads may come here at the same time at first. None of them may continue before at
    // least one registration is complete, because no handler would repair the child of a fork
    // before that. But none may wait for another thread's registration either: in the child of a
    // fork, that registration never completes. So each of these threads registers the handler.
    // ORDER(srcu-fork): Acquire; partner below.
    if !DONE.load(Ordering::Acquire) {
        REGISTERED.fetch_add(1, Ordering::Relaxed);
        // SAFETY: `pthread_atfork` needs a function that stays loaded as long as it is registered.
        // When glibc unloads a library, it removes the handlers of that library. (glibc registers
        // the first 48 handlers without allocating.)
        unsafe { libc::pthread_atfork(None, None, Some(child)) };
        // ORDER(srcu-fork): Release: the registration comes before the flag. Partner: the load
        // above.
        DONE.store(true, Ordering::Release);
    }
}

unsafe extern "C" fn child() {
    static REPAIRED: AtomicI32 = AtomicI32::new(0);
    // SAFETY: the call has no preconditions.
    let this_process = unsafe { libc::getpid() };
    // If several threads registered this handler, it runs several times in a child, and must repair
    // the domains only the first time. The pid alone does not tell a repeated run: in a pid
    // namespace of its own, a child can have the same pid as its parent.
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
