//! Secondary TLBs that walk the primary page table themselves.

use crate::{Mm, Notifier, Va, VaRange};
use std::ops::Deref;

/// The callbacks of a hardware TLB that reads the primary page table.
///
/// Such hardware can refill an entry at any moment between a start and an end, so a bracket does
/// not help. The event source must flush the hardware where it clears the page-table entry, under
/// the lock of the page table. A software copy implements [`Notifier`] instead. A subscriber is one
/// or the other: [`Secondary`] forwards no start and no end to the type that it wraps.
///
/// # Source
/// `arch_invalidate_secondary_tlbs` of `struct mmu_notifier_ops`, Linux 6.6, which refuses an
/// operations table that also has a start or an end. Differs: [`Secondary`] has neither, so there
/// is no such table to refuse.
#[doc(alias = "arch_invalidate_secondary_tlbs")]
pub trait SecondaryTlb: Send + Sync + 'static {
    /// Flushes a range, before the page table's lock is released.
    ///
    /// # Blocking
    /// Must not sleep.
    /// # Source
    /// `arch_invalidate_secondary_tlbs`, Linux 6.6.
    fn invalidate_secondary_tlbs(&self, mm: &Mm, range: VaRange);

    /// Drops every entry of the address space. See [`Notifier::release`].
    fn release(&self, mm: &Mm) {
        let _ = mm;
    }

    /// See [`Notifier::clear_flush_young`].
    fn clear_flush_young(&self, mm: &Mm, range: VaRange) -> bool {
        let _ = (mm, range);
        false
    }

    /// See [`Notifier::clear_young`].
    fn clear_young(&self, mm: &Mm, range: VaRange) -> bool {
        let _ = (mm, range);
        false
    }

    /// See [`Notifier::test_young`].
    fn test_young(&self, mm: &Mm, address: Va) -> bool {
        let _ = (mm, address);
        false
    }
}

/// Wraps a [`SecondaryTlb`] as a subscriber for [`Subsystem`](crate::Subsystem) and
/// [`Registration`](crate::Registration). Brackets never call it.
///
/// # Examples
/// ```
/// # #[global_allocator]
/// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
/// use mmu_notifier::{Mm, MmWithUser, Registration, Secondary, SecondaryTlb, VaRange};
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// struct Iommu(AtomicU64); // Counts its flushes.
/// impl SecondaryTlb for Iommu {
///     fn invalidate_secondary_tlbs(&self, _mm: &Mm, _range: VaRange) {
///         self.0.fetch_add(1, Ordering::Relaxed);
///     }
/// }
///
/// let mm = MmWithUser::new();
/// let iommu = Registration::new(&mm, Secondary(Iommu(AtomicU64::new(0))))?;
/// mm.invalidate_secondary_tlbs(VaRange::ALL);
/// assert_eq!(iommu.0.0.load(Ordering::Relaxed), 1);
/// # Ok::<(), mmu_notifier::WouldDeadlock>(())
/// ```
///
/// [`Notifier`] has no callback for the flush, so this does not compile:
///
/// ```compile_fail,E0407
/// struct Both;
/// impl mmu_notifier::Notifier for Both {
///     fn invalidate_range_start(&self, _: &mmu_notifier::InvalidateRange<'_>) {}
///     fn invalidate_secondary_tlbs(&self, _: &mmu_notifier::Mm, _: mmu_notifier::VaRange) {}
/// }
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Secondary<T>(pub T);

impl<T> Deref for Secondary<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: SecondaryTlb> Notifier for Secondary<T> {
    fn release(&self, mm: &Mm) {
        self.0.release(mm);
    }

    fn clear_flush_young(&self, mm: &Mm, range: VaRange) -> bool {
        self.0.clear_flush_young(mm, range)
    }

    fn clear_young(&self, mm: &Mm, range: VaRange) -> bool {
        self.0.clear_young(mm, range)
    }

    fn test_young(&self, mm: &Mm, address: Va) -> bool {
        self.0.test_young(mm, address)
    }

    fn secondary_tlb(&self, _: Sealed) -> Option<&dyn SecondaryTlb> {
        Some(&self.0)
    }
}

/// Hides a method of a public trait. Only `raw` exports this type, for the crate of the C
/// interface.
#[derive(Debug, Clone, Copy)]
pub struct Sealed;
