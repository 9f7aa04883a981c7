//! The table of operations that a subscriber implements.

use crate::secondary::{Sealed, SecondaryTlb};
use crate::{InvalidateRange, Mm, Va, VaRange, WouldBlock};

/// What a subscriber does when an address space changes. Every method has a default that does nothing.
///
/// The kernel's `free_notifier` is the value's own `Drop`: it runs on the reclaimer thread of the `srcu` crate, after a
/// grace period, when no callback of this value can still be running. It also runs, in the caller's thread, for a value
/// that was never registered.
///
/// Callbacks may run before `get` has returned to its caller, in parallel with themselves, and after the last reference
/// was put (until the grace period ends). A start need not be followed by an end: the subscriber may be
/// put, unregistered or released in between.
/// A callback may put, look up existing subscriptions and open further brackets; it cannot wait for callbacks to end,
/// and what would wait returns [`WouldDeadlock`](crate::WouldDeadlock) instead. A panic in a callback is caught and
/// counted ([`Mm::callback_panics`]); the other subscribers are still called.
///
/// # Source
/// `struct mmu_notifier_ops`, include/linux/mmu_notifier.h.
#[doc(alias = "mmu_notifier_ops")]
pub trait Notifier: Send + Sync + 'static {
    /// Lets go of the whole address space, which is about to end.
    ///
    /// When it has returned nothing may be able to use the address space through this subscriber any more. Other callbacks may
    /// still come, during it and until it is delisted right after, so it must leave them something to stand on. May run
    /// twice and in parallel for a [`Registration`](crate::Registration): once from exit, once from `unregister`.
    ///
    /// # Blocking
    /// May sleep; exit waits for it.
    fn release(&self, mm: &Mm) {
        let _ = mm;
    }

    /// Lets go of a range that is about to change, and keeps off it until the matching
    /// [`invalidate_range_end`](Self::invalidate_range_end).
    ///
    /// # Blocking
    /// May sleep unless [`InvalidateRange::blocking`] forbids it.
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        let _ = range;
    }

    /// The same where sleeping is forbidden.
    ///
    /// # Errors
    /// [`WouldBlock`] if it would have to sleep. Then it must have changed nothing, and it gets no end.
    fn try_invalidate_range_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        self.invalidate_range_start(range);
        Ok(())
    }

    /// Hears that the change is over and the range may be used again.
    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        let _ = range;
    }

    /// Clears the accessed marks of a range, flushes, and tells whether any was set.
    fn clear_flush_young(&self, mm: &Mm, range: VaRange) -> bool {
        let _ = (mm, range);
        false
    }

    /// Clears the accessed marks of a range, and tells whether any was set. Need not flush.
    fn clear_young(&self, mm: &Mm, range: VaRange) -> bool {
        let _ = (mm, range);
        false
    }

    /// Tells whether the accessed mark of the page at `address` is set, and changes nothing.
    fn test_young(&self, mm: &Mm, address: Va) -> bool {
        let _ = (mm, address);
        false
    }

    /// The other kind of subscriber, which [`Secondary`](crate::Secondary) alone can be.
    #[doc(hidden)]
    fn secondary_tlb(&self, _: Sealed) -> Option<&dyn SecondaryTlb> {
        None
    }
}
