//! One thread's counters in one domain.
//!
//! # Invariants
//! Only the owning thread writes a slot, so its stores need no read-modify-write instruction. (The
//! only thread of a forked child settles the slots of the threads that it does not have.) Counters
//! only grow, and wrap around. No code resets them while the domain is in use, so the end of a
//! thread needs no clean-up.

use crate::sync::{AtomicUsize, Ordering, mutant};

/// How often sections of each bank were entered and left.
pub(crate) struct Counters {
    lock: [AtomicUsize; 2],
    unlock: [AtomicUsize; 2],
}

/// Two cache lines, because processors prefetch lines in pairs.
#[repr(align(128))]
pub(crate) struct Slot {
    /// Sections that end on this thread. The beginnings minus the ends are the sections that the
    /// thread is in.
    pub(crate) local: Counters,
    /// Sections that may end on another thread, which then counts the end in its own slot.
    pub(crate) moved: Counters,
}

impl Counters {
    #[inline(always)]
    pub(crate) fn enter(&self, bank: usize) {
        let count = &self.lock[bank & 1];
        // Relaxed: the caller's fence orders this store before the reads of the section,
        // ORDER(srcu-enter).
        count.store(
            count.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Relaxed,
        );
    }

    #[inline(always)]
    pub(crate) fn leave(&self, bank: usize) {
        let count = &self.unlock[bank & 1];
        // ORDER(srcu-leave): Release: every access of the section happens before the end of a grace
        // period that counts this end. Partner: the Acquire in `unlocked`. If weaker, a free could
        // overtake a read. Model: loom `free_waits_for_reader`.
        let order = if mutant("unlock_relaxed") {
            Ordering::Relaxed
        } else {
            Ordering::Release
        };
        count.store(count.load(Ordering::Relaxed).wrapping_add(1), order);
    }

    pub(crate) fn locked(&self, bank: usize) -> usize {
        // Relaxed: the heavy fence in `scan` orders this load after the sum of ends.
        self.lock[bank & 1].load(Ordering::Relaxed)
    }

    pub(crate) fn unlocked(&self, bank: usize) -> usize {
        // ORDER(srcu-leave): Acquire; partner in `leave`.
        self.unlock[bank & 1].load(Ordering::Acquire)
    }

    /// Returns the number of open sections. The caller is the slot's thread, and these are its
    /// local counters.
    pub(crate) fn depth(&self) -> usize {
        let open = |bank: usize| {
            self.lock[bank]
                .load(Ordering::Relaxed)
                .wrapping_sub(self.unlock[bank].load(Ordering::Relaxed))
        };
        open(0).wrapping_add(open(1))
    }

    /// Ends all sections of a thread that does not exist. The caller is the only thread of a forked
    /// child.
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
