//! The table of operations that a subscriber implements.

mod secondary;

pub use secondary::{Sealed, Secondary, SecondaryTlb};

use crate::{InvalidateRange, Mm, Va, VaRange, WouldBlock};

/// What a subscriber does when an address space changes. The default of
/// [`try_invalidate_range_start`](Self::try_invalidate_range_start) calls the start; the default of
/// every other method does nothing.
///
/// The value's own `Drop` is its `free_notifier`. The drop runs on the background thread of the
/// `srcu` crate, after a grace period, when no callback of this value can still be running. A value
/// that was never registered, or that `unregister` has returned, is dropped by its owner.
///
/// Callbacks may run before `get` has returned, in parallel with themselves, and after the last
/// put, until the grace period ends. A start need not be followed by an end: the subscriber may be
/// put, unregistered or released in between.
///
/// A callback may put, look up existing subscriptions and open further brackets, but it cannot wait
/// for callbacks to end: a call that would wait returns [`WouldDeadlock`](crate::WouldDeadlock)
/// instead. A panic in a callback is caught and counted ([`Mm::callback_panics`]), and the other
/// subscribers are still called.
///
/// # What a start or end callback must not do
/// If the address space is the caller's own, the allocator changes it as well: `free` returns a
/// block to the kernel while it holds the allocator's locks, and the callback runs in the middle of
/// `free`. So a callback must not
/// * allocate or free memory: no insert into or removal from a collection that owns nodes, no clone
///   of a `String`, no `Finish::new`;
/// * print or log, because that allocates and takes the lock of the stream;
/// * take a lock whose holders allocate, free or print, because such a holder may be this very
///   thread;
/// * load libraries, or use thread-local storage with a destructor.
///
/// A callback may store to atomics, make system calls, and take locks whose holders only touch
/// memory of a fixed size. Keep the data that a callback changes in such memory
/// ([`SoftTlb`](crate::SoftTlb) is a ready-made table), or let the callback mark the data and the
/// next user free it. [`lockdep::CheckedAlloc`](crate::lockdep::CheckedAlloc) finds a violation at
/// the first call. The rules do not apply to a subscriber of another process's address space,
/// because no allocator of this process changes that address space.
///
/// # Source
/// `struct mmu_notifier_ops`, include/linux/mmu_notifier.h, Linux 5.15. Differs: `change_pte`
/// (removed in 6.10) is left out; `free_notifier` is `Drop`, `alloc_notifier` is the closure of a
/// [`Subsystem`](crate::Subsystem); flushing a secondary TLB is a [trait of its own](SecondaryTlb).
///
/// # Examples
/// A subscriber that may refuse, and is then called again where it may sleep:
///
/// ```
/// # #[global_allocator]
/// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
/// use mmu_notifier::{Event, InvalidateRange, MmWithUser, Notifier, Registration, VaRange, WouldBlock};
/// use std::sync::{Mutex, TryLockError};
///
/// struct Table(Mutex<[Option<u64>; 8]>); // Of a fixed size, so the holder of the lock never allocates.
///
/// impl Notifier for Table {
///     fn invalidate_range_start(&self, _range: &InvalidateRange<'_>) {
///         self.0.lock().unwrap().fill(None);
///     }
///
///     fn try_invalidate_range_start(&self, _range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
///         self.0.try_lock().map_err(|_| WouldBlock)?.fill(None);
///         Ok(())
///     }
/// }
///
/// let mm = MmWithUser::new();
/// let table = Registration::new(&mm, Table(Mutex::new([Some(7); 8])))?;
/// let held = table.0.lock().unwrap();
/// assert!(mm.try_invalidate(VaRange::ALL, Event::Clear).is_err(), "the table is locked");
/// drop(held);
/// drop(mm.invalidate(VaRange::ALL, Event::Clear));
/// assert_eq!(table.0.lock().unwrap().iter().flatten().count(), 0);
/// # Ok::<(), mmu_notifier::WouldDeadlock>(())
/// ```
///
/// A blockable start cannot refuse:
///
/// ```compile_fail,E0053
/// # use mmu_notifier::{InvalidateRange, Notifier, WouldBlock};
/// struct Refuses;
/// impl Notifier for Refuses {
///     fn invalidate_range_start(&self, _: &InvalidateRange<'_>) -> Result<(), WouldBlock> { Err(WouldBlock) }
/// }
/// ```
///
/// and a start that may refuse can return no other error:
///
/// ```compile_fail,E0053
/// # use mmu_notifier::{InvalidateRange, Notifier};
/// struct Fails;
/// impl Notifier for Fails {
///     fn try_invalidate_range_start(&self, _: &InvalidateRange<'_>) -> Result<(), std::io::Error> { Ok(()) }
/// }
/// ```
#[doc(alias = "mmu_notifier_ops")]
pub trait Notifier: Send + Sync + 'static {
    /// Drops all shadow entries of the address space, which is about to end.
    ///
    /// After it has returned, neither the subscriber nor a device behind it may use the address
    /// space. Other callbacks may run in parallel with `release`, and after it until exit delists
    /// the subscriber. So `release` must leave the subscriber in a state in which they can run.
    /// For a [`Registration`](crate::Registration) it may run twice, and in parallel: once from
    /// exit, once from `unregister`.
    ///
    /// # Blocking
    /// May sleep; exit waits for it.
    /// # Source
    /// `release`, Linux 5.15.
    fn release(&self, mm: &Mm) {
        let _ = mm;
    }

    /// Drops a range that is about to change, and does not use the range until the matching
    /// [`invalidate_range_end`](Self::invalidate_range_end).
    ///
    /// # Blocking
    /// May sleep. Where sleeping is forbidden,
    /// [`try_invalidate_range_start`](Self::try_invalidate_range_start) is called instead.
    /// # Source
    /// `invalidate_range_start` in blockable mode. Differs: it returns nothing, because it must not
    /// refuse.
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        let _ = range;
    }

    /// Like [`invalidate_range_start`](Self::invalidate_range_start), for a bracket in which
    /// sleeping is forbidden. The default calls `invalidate_range_start`, so a subscriber whose
    /// start may sleep must implement this method as well.
    ///
    /// # Blocking
    /// Must not sleep.
    /// # Errors
    /// [`WouldBlock`] if it would have to sleep. Then it must have changed nothing, and its end is
    /// not called.
    /// # Source
    /// `invalidate_range_start` in non-blockable mode. Differs: `-EAGAIN` is the only error. A
    /// subscriber that refuses may implement the end; that end is not called for the refused start.
    fn try_invalidate_range_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        self.invalidate_range_start(range);
        Ok(())
    }

    /// Reports that the change is over, so the subscriber may use the range again. `range` is the
    /// range of the start.
    ///
    /// # Blocking
    /// May sleep unless [`InvalidateRange::blocking`] forbids it.
    /// # Source
    /// `invalidate_range_end`. Differs: it comes from the same read section as its start.
    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        let _ = range;
    }

    /// Clears the accessed marks of a range, flushes, and returns whether any mark was set. A
    /// subscriber whose hardware has no such marks may drop the range instead, and return whether
    /// it had an entry there.
    ///
    /// # Blocking
    /// May sleep; the caller of [`Mm::clear_flush_young`] waits.
    /// # Source
    /// `clear_flush_young` of `struct mmu_notifier_ops`, Linux 5.15. Differs: it returns a `bool`.
    fn clear_flush_young(&self, mm: &Mm, range: VaRange) -> bool {
        let _ = (mm, range);
        false
    }

    /// Clears the accessed marks of a range, and returns whether any was set. Need not flush.
    ///
    /// # Blocking
    /// May sleep; the caller of [`Mm::clear_young`] waits.
    /// # Source
    /// `clear_young` of `struct mmu_notifier_ops`, Linux 5.15. Differs: it returns a `bool`.
    fn clear_young(&self, mm: &Mm, range: VaRange) -> bool {
        let _ = (mm, range);
        false
    }

    /// Returns whether the accessed mark of the page at `address` is set. Changes nothing.
    ///
    /// # Blocking
    /// May sleep; the caller of [`Mm::test_young`] waits.
    /// # Source
    /// `test_young` of `struct mmu_notifier_ops`, Linux 5.15. Differs: it returns a `bool`.
    fn test_young(&self, mm: &Mm, address: Va) -> bool {
        let _ = (mm, address);
        false
    }

    /// Returns the secondary TLB. Only [`Secondary`](crate::Secondary) is one.
    #[doc(hidden)]
    fn secondary_tlb(&self, _: Sealed) -> Option<&dyn SecondaryTlb> {
        None
    }
}
