//! An invalidation as subscribers see it: its event, its range, and whether the callback may sleep.

use crate::{Mm, Va, VaRange};
use std::fmt;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a range is invalidated. The event is a hint: a subscriber that drops the range on every
/// event is correct.
///
/// # Source
/// `enum mmu_notifier_event`, include/linux/mmu_notifier.h, Linux 5.15. Differs: an event that has
/// an owner carries the owner. No event carries a mapping, so there is no
/// `mmu_notifier_range_update_to_read_only` (removed from the kernel in 6.3).
///
/// # Examples
/// ```
/// use mmu_notifier::{Event, Owner};
///
/// let mine = Owner::new();
/// assert_eq!(Event::Migrate { owner: Some(mine) }.owner(), Some(mine));
/// assert_eq!((Event::Unmap.owner(), Event::ProtectionVma.name()), (None, "protection_vma"));
/// ```
///
/// An event cannot tell whether a mapping stays readable:
///
/// ```compile_fail,E0599
/// fn update_to_read_only(range: &mmu_notifier::InvalidateRange<'_>) -> bool {
///     range.event() == mmu_notifier::Event::ProtectionVma && range.vma().is_readable()
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[doc(alias = "mmu_notifier_event")]
pub enum Event {
    /// The mapping is removed or moved: munmap, mremap, brk. The mapping may be gone only after
    /// this event or [`Release`](Self::Release).
    #[doc(alias = "MMU_NOTIFY_UNMAP")]
    Unmap,
    /// The pages are taken away, but the mapping stays: madvise, copy on write, truncation,
    /// reclaim.
    #[doc(alias = "MMU_NOTIFY_CLEAR")]
    Clear,
    /// The protection of the whole mapping changes: mprotect.
    #[doc(alias = "MMU_NOTIFY_PROTECTION_VMA")]
    ProtectionVma,
    /// Single pages change protection: fork's write protection, page cleaning.
    #[doc(alias = "MMU_NOTIFY_PROTECTION_PAGE")]
    ProtectionPage,
    /// Soft-dirty tracking write-protects the pages.
    #[doc(alias = "MMU_NOTIFY_SOFT_DIRTY")]
    SoftDirty,
    /// The address space ends. Only its exit can make this event.
    #[doc(alias = "MMU_NOTIFY_RELEASE")]
    Release(Exit),
    /// The pages move to another place in memory.
    #[doc(alias = "MMU_NOTIFY_MIGRATE")]
    Migrate {
        /// The mark of the driver that moves the pages. A subscriber that moves the pages itself
        /// finds its own mark.
        owner: Option<Owner>,
    },
    /// A device takes exclusive access to the pages.
    #[doc(alias = "MMU_NOTIFY_EXCLUSIVE")]
    Exclusive {
        /// The mark of the driver that takes the access. A subscriber that takes the access itself
        /// finds its own mark.
        owner: Option<Owner>,
    },
}

impl Event {
    /// Returns the event's name as tools print it: lower case, words joined by `_`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unmap => "unmap",
            Self::Clear => "clear",
            Self::ProtectionVma => "protection_vma",
            Self::ProtectionPage => "protection_page",
            Self::SoftDirty => "soft_dirty",
            Self::Release(_) => "release",
            Self::Migrate { .. } => "migrate",
            Self::Exclusive { .. } => "exclusive",
        }
    }

    /// Returns the mark of the driver that migrates the pages or takes them exclusively; `None` for
    /// every other event.
    #[must_use]
    pub const fn owner(self) -> Option<Owner> {
        match self {
            Self::Migrate { owner } | Self::Exclusive { owner } => owner,
            _ => None,
        }
    }
}

/// The proof that an address space is exiting. Only this crate can make one.
///
/// # Source
/// `MMU_NOTIFY_RELEASE`, Linux 5.5. Differs: the kernel's event is a constant like the others.
///
/// ```compile_fail,E0603
/// let event = mmu_notifier::Event::Release(mmu_notifier::Exit(()));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Exit(pub(crate) ());

/// The mark of a driver that moves pages or takes exclusive access to them. A subscriber recognises
/// its own migration or access by the mark, and may skip the invalidation.
///
/// A subscriber that counts open invalidations must also count a start that it skips, because the
/// matching end is called as well.
///
/// # Source
/// `owner` of `struct mmu_notifier_range`, Linux 5.14. Differs: a number that is unique in this
/// process instead of a pointer.
///
/// # Examples
/// ```
/// # #[global_allocator]
/// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
/// use mmu_notifier::{InvalidateRange, Notifier, Owner};
///
/// struct Device(Owner);
/// impl Notifier for Device {
///     fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
///         if range.event().owner() == Some(self.0) {
///             return; // This device moves the page itself, and knows.
///         }
///         // Let go of the range here.
///     }
/// }
/// # let device = Device(Owner::new());
/// # assert_ne!(device.0, Owner::new());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(NonZeroU64);

impl Owner {
    /// Makes a mark that differs from every other mark of this process.
    ///
    /// # Panics
    /// After 2^63 marks.
    #[must_use]
    #[expect(
        clippy::new_without_default,
        reason = "two defaults that differ would surprise"
    )]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(Owner::FIRST);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(next >= Self::FIRST, "2^63 owners were made");
        Self(NonZeroU64::new(next).expect("it is at least the first"))
    }

    /// Returns the mark of the object at this address, or `None` for address zero. For C programs,
    /// whose owners are pointers. The mark differs from every mark of [`new`](Self::new), because
    /// those are at least 2^63 and no object's address is.
    #[must_use]
    pub const fn at(address: Va) -> Option<Self> {
        match NonZeroU64::new(address.get()) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// Returns the mark as an integer. For a mark of [`at`](Self::at), that is the address.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// The first mark of `new`: above the addresses of all objects.
    const FIRST: u64 = 1 << 63;
}

/// Whether a callback may sleep.
///
/// # Source
/// `MMU_NOTIFIER_RANGE_BLOCKABLE`, `mmu_notifier_range_blockable`, Linux 5.15. Differs: a start
/// that must not sleep calls a method of its own,
/// [`Notifier::try_invalidate_range_start`](crate::Notifier::try_invalidate_range_start).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[doc(alias = "mmu_notifier_range_blockable")]
pub enum Blocking {
    /// The callback may sleep, and must not refuse.
    Allowed,
    /// The callback must not sleep, and may refuse with [`WouldBlock`].
    Forbidden,
}

/// One invalidation, as its subscribers see it. The start and the end of a bracket get equal
/// values.
///
/// # Source
/// `struct mmu_notifier_range`, Linux 5.15. Differs: never empty, and it may reach the last
/// address.
///
/// # Examples
/// ```
/// use mmu_notifier::{Blocking, Event, MmWithUser, VaRange};
///
/// let mm = MmWithUser::new();
/// let bracket = mm.invalidate_owned(VaRange::ALL, Event::Unmap);
/// let range = bracket.range();
/// assert_eq!((range.range(), range.event(), range.blocking()), (VaRange::ALL, Event::Unmap, Blocking::Allowed));
/// assert_eq!(range.mm().id(), mm.id());
/// ```
#[derive(Debug, Clone, Copy)]
#[doc(alias = "mmu_notifier_range")]
pub struct InvalidateRange<'a> {
    pub(crate) mm: &'a Mm,
    pub(crate) range: VaRange,
    pub(crate) event: Event,
    pub(crate) blocking: Blocking,
    /// The `origin` of a [`PlacedBracket`](crate::raw::PlacedBracket), or 0 for every other
    /// bracket.
    pub(crate) origin: usize,
}

impl<'a> InvalidateRange<'a> {
    /// Returns the address space.
    #[must_use]
    pub fn mm(&self) -> &'a Mm {
        self.mm
    }

    /// Returns the pages that change.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.range
    }

    /// Returns the event: why the pages change.
    #[must_use]
    pub fn event(&self) -> Event {
        self.event
    }

    /// Tells whether the callback may sleep.
    #[must_use]
    pub fn blocking(&self) -> Blocking {
        self.blocking
    }
}

/// A subscriber would have to sleep where sleeping is forbidden. The subscriber that returned this
/// gets no end for the refused start.
///
/// # Source
/// `-EAGAIN` from `invalidate_range_start`. No other refusal exists, so this is a type of its own
/// instead of an errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WouldBlock;

impl fmt::Display for WouldBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a subscriber would have to sleep: try again where sleeping is allowed")
    }
}

impl std::error::Error for WouldBlock {}
