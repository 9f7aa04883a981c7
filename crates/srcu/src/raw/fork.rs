//! Makes the domains usable in the child of a `fork`.
//!
//! Nothing is locked before the fork: a thread that waits for one of our locks may hold the allocator's, which `fork`
//! wants next. So the child may find any slow-path lock held by a thread that is gone, and what it guards half changed.
//! Every structure is therefore built so that each single store leaves it whole, and the child frees the locks.
//!
//! In the child the calling thread keeps its sections; those of all other threads have ended, except movable ones, which
//! may have been handed to the calling thread. The reclaimer is gone, unless it is what called `fork`; callbacks that
//! were queued stay queued.

use super::{ids, pages, reclaimer, state};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

/// Sees to it that children of this process are taken care of.
pub(super) fn register() {
    // Not a `Once`: its lock could be held by a thread that a fork leaves behind.
    static REGISTERED: AtomicBool = AtomicBool::new(false);
    if !REGISTERED.swap(true, Ordering::Relaxed) {
        // SAFETY: `pthread_atfork` needs functions that stay. glibc has room for 48 without allocating.
        unsafe { libc::pthread_atfork(None, None, Some(child)) };
    }
}

unsafe extern "C" fn child() {
    ids::after_fork();
    pages::after_fork();
    let reclaimer_survived = reclaimer::after_fork();
    state::each(|state| {
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
