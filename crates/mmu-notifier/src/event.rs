//! What is about to happen to a range, as a subscriber is told.

use crate::{Mm, Va, VaRange};
use std::fmt;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a range is invalidated. A hint: a subscriber that lets go of everything on every event is correct.
///
/// # Source
/// `enum mmu_notifier_event`, include/linux/mmu_notifier.h, Linux 5.15. Differs: the owner is a part of the events that have one;
/// no event carries a mapping, so there is no `mmu_notifier_range_update_to_read_only` (gone from the kernel in 6.3).
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
/// There is nothing to ask whether a mapping stays readable:
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
    /// The mapping goes away or moves: munmap, mremap, brk. The only event after which the mapping may be gone.
    #[doc(alias = "MMU_NOTIFY_UNMAP")]
    Unmap,
    /// The pages are taken away and the mapping stays: madvise, copy on write, truncation, reclaim.
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
    /// The address space ends. Its exit makes this event, and nobody else can.
    #[doc(alias = "MMU_NOTIFY_RELEASE")]
    Release(Exit),
    /// The pages move to another place in memory.
    #[doc(alias = "MMU_NOTIFY_MIGRATE")]
    Migrate {
        /// Who moves them; equal to one's own mark if the subscriber itself does.
        owner: Option<Owner>,
    },
    /// A device takes exclusive access to the pages.
    #[doc(alias = "MMU_NOTIFY_EXCLUSIVE")]
    Exclusive {
        /// Who takes it; equal to one's own mark if the subscriber itself does.
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

    /// Returns the mark of whoever migrates the pages or takes them exclusively; `None` for every other event.
    #[must_use]
    pub const fn owner(self) -> Option<Owner> {
        match self {
            Self::Migrate { owner } | Self::Exclusive { owner } => owner,
            _ => None,
        }
    }
}

/// The proof that an address space is exiting; nobody outside can make one.
///
/// # Source
/// `MMU_NOTIFY_RELEASE`, Linux 5.5. Differs: the kernel's is a number like the others.
///
/// ```compile_fail,E0603
/// let event = mmu_notifier::Event::Release(mmu_notifier::Exit(()));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Exit(pub(crate) ());

/// The mark of whoever moves pages, by which a subscriber knows its own migration and may skip it.
///
/// A subscriber that skips must still count the start, as its end comes too.
///
/// # Source
/// `owner` of `struct mmu_notifier_range`, Linux 5.14. Differs: a number that nobody else has, and not a pointer.
///
/// # Examples
/// ```
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
    /// Makes a mark that is unlike every other of this process.
    ///
    /// # Panics
    /// After 2^63 marks.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "two defaults that differ would surprise")]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(Owner::FIRST);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(next >= Self::FIRST, "2^63 owners were made");
        Self(NonZeroU64::new(next).expect("it is at least the first"))
    }

    /// Returns the mark of whoever has an object at this address, none for address zero; for C programs, whose owners are
    /// pointers. No object's address is a mark of [`new`](Self::new): those lie above 2^63.
    #[must_use]
    pub const fn at(address: Va) -> Option<Self> {
        match NonZeroU64::new(address.get()) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// Returns the mark as a number, which for one of [`at`](Self::at) is the address.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// Where those of `new` begin, above all addresses of objects.
    const FIRST: u64 = 1 << 63;
}

/// Whether a callback may sleep.
///
/// # Source
/// `MMU_NOTIFIER_RANGE_BLOCKABLE`, `mmu_notifier_range_blockable`, Linux 5.15. Differs: a start that must not sleep is a method
/// of its own, [`Notifier::try_invalidate_range_start`](crate::Notifier::try_invalidate_range_start).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[doc(alias = "mmu_notifier_range_blockable")]
pub enum Blocking {
    /// It may sleep, and must not refuse.
    Allowed,
    /// It must answer at once, and may refuse with [`WouldBlock`].
    Forbidden,
}

/// One invalidation, as its subscribers see it. Brackets make it; the same one comes to the start and to the end.
///
/// # Source
/// `struct mmu_notifier_range`, Linux 5.15. Differs: never empty, and it may reach the last address.
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

    /// Returns what happens to them.
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

/// A subscriber would have had to sleep where that is forbidden. No end is owed for the start that got this answer.
///
/// # Source
/// `-EAGAIN` from `invalidate_range_start`; no other refusal exists, so it is a type of its own and not an errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WouldBlock;

impl fmt::Display for WouldBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a subscriber would have to sleep: try again where sleeping is allowed")
    }
}

impl std::error::Error for WouldBlock {}
