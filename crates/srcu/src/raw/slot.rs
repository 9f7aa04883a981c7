//! One thread's counters in one domain.
//!
//! # Invariants
//! Only the thread that a slot belongs to writes it, so its stores need no read-modify-write
//! instruction. Counters only grow (and wrap); they are never reset while the domain is in use,
//! which is why a thread's exit needs no clean-up.

use crate::sync::{AtomicUsize, Ordering, mutant};

/// How often sections of each bank were entered and left.
pub(crate) struct Counters {
    lock: [AtomicUsize; 2],
    unlock: [AtomicUsize; 2],
}

/// Two lines, since processors prefetch lines in pairs.
#[repr(align(128))]
pub(crate) struct Slot {
    /// Sections that end on this thread: the difference is exactly how deep the thread is in them.
    pub(crate) local: Counters,
    /// Sections that may end on another thread, which counts the end in its own slot.
    pub(crate) moved: Counters,
}

impl Counters {
    #[inline(always)]
    pub(crate) fn enter(&self, bank: usize) {
        let count = &self.lock[bank & 1];
        // Relaxed: what follows is ordered by the caller's fence, ORDER(srcu-enter).
        count.store(
            count.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Relaxed,
        );
    }

    #[inline(always)]
    pub(crate) fn leave(&self, bank: usize) {
        let count = &self.unlock[bank & 1];
        // ORDER(srcu-leave): Release: every access of the section happens before a grace period
        // that counts this end goes past it. Partner: the Acquire in `unlocked`. If it were weaker,
        // a free could overtake a read. Model: loom `free_waits_for_reader`.
        let order = if mutant("unlock_relaxed") {
            Ordering::Relaxed
        } else {
            Ordering::Release
        };
        count.store(count.load(Ordering::Relaxed).wrapping_add(1), order);
    }

    pub(crate) fn locked(&self, bank: usize) -> usize {
        // Relaxed: `scan` orders it after the sum of ends with the heavy fence.
        self.lock[bank & 1].load(Ordering::Relaxed)
    }

    pub(crate) fn unlocked(&self, bank: usize) -> usize {
        // ORDER(srcu-leave): Acquire, partner in `leave`.
        self.unlock[bank & 1].load(Ordering::Acquire)
    }

    /// Sections open, if the caller is the thread that owns the slot and these are the local
    /// counters.
    pub(crate) fn depth(&self) -> usize {
        let open = |bank: usize| {
            self.lock[bank]
                .load(Ordering::Relaxed)
                .wrapping_sub(self.unlock[bank].load(Ordering::Relaxed))
        };
        open(0).wrapping_add(open(1))
    }

    /// Ends all sections, whose thread is gone: the caller is the only thread of a forked child.
    #[cfg(not(mmun_loom))]
    pub(super) fn settle(&self) {
        for bank in 0..2 {
            let locked = self.lock[bank].load(Ordering::Relaxed);
            if self.unlock[bank].load(Ordering::Relaxed) != locked {
                self.unlock[bank].store(locked, Ordering::Relaxed);
            }
        }
    }

    #[cfg(mmun_loom)]
    pub(crate) fn new() -> Self {
        let zeros = || [AtomicUsize::new(0), AtomicUsize::new(0)];
        Self {
            lock: zeros(),
            unlock: zeros(),
        }
    }
}
