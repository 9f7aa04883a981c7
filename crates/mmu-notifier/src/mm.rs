//! The address space: its object in memory (`Mm`) and its life (`MmWithUser`).

mod bracket;
pub(crate) mod context;
mod event;
mod exit;
#[expect(
    unsafe_code,
    reason = "intervals that their users own, in a tree that is walked without a lock"
)]
pub(crate) mod intervals;
mod lock;
pub(crate) mod notifier;
#[expect(unsafe_code, reason = "a guard beside what it borrows from")]
mod owned_guard;
#[expect(unsafe_code, reason = "what its caller says of memory in C")]
mod placed;
#[expect(unsafe_code, reason = "the one list that is read under SRCU")]
pub(crate) mod subscriptions;

pub use bracket::{Bracket, OwnedBracket};
pub use event::{Blocking, Event, Exit, InvalidateRange, Owner, WouldBlock};
pub use lock::MmapWriteGuard;
pub use notifier::{Notifier, Secondary, SecondaryTlb};
pub use placed::PlacedBracket;

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::forks;
use crate::sync::{Arc, mutant};
use crate::{Va, VaRange};
use intervals::Intervals;
use lock::MmapLock;
use notifier::Sealed;
use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use subscriptions::Subscriptions;

/// A counted handle of an address space (`mm_count`). The object exists as long as the handle does,
/// but the address space may have ended.
///
/// Cloning a handle is `mmgrab`, dropping it is `mmdrop`. Each notifier holds one until its free. A
/// handle does not keep the address space alive; for work that needs it alive, take a user with
/// [`mmget_not_zero`](Self::mmget_not_zero).
///
/// # Blocking
/// The last drop waits until the deferred work of the address space's domain, if there is any, has
/// run. On the background thread it does not wait.
///
/// # Source
/// `struct mm_struct`, `mmgrab`, `mmdrop`; `Mm` of Rust in the kernel.
///
/// # Examples
/// ```
/// use mmu_notifier::{Mm, MmWithUser};
///
/// let user = MmWithUser::new();
/// let handle: Mm = (*user).clone();
/// assert_eq!((handle.mm_users(), handle.mm_count()), (1, 2), "the user has a handle of its own");
/// drop(user);
/// assert_eq!((handle.mm_users(), handle.mm_count(), handle.callback_panics()), (0, 1, 0));
/// ```
#[derive(Clone)]
#[repr(transparent)]
#[doc(alias = "mm_struct")]
#[doc(alias = "mmgrab")]
#[doc(alias = "mmdrop")]
pub struct Mm(Arc<Inner>);

/// Alone on its cache lines, as the nodes of its subscribers are.
#[repr(align(128))]
struct Inner {
    id: u64,
    /// The value of [`forks`] in the process that made this address space.
    forks: usize,
    /// How many [`MmWithUser`] there are. Once zero, it stays zero.
    users: AtomicUsize,
    subscriptions: Subscriptions,
    intervals: Intervals,
    mmap_lock: MmapLock,
    panics: AtomicUsize,
}

impl Mm {
    /// Returns the id of this address space in this process. Ids begin with 1 and are never reused.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Tells whether this address space belongs to a process from which this one was forked.
    ///
    /// The address space stays the parent's. In the child it has no subscribers, and a bracket of
    /// it calls no callback. The child can neither subscribe to it nor take a user of it. In the
    /// child, the last put of a notifier and the drop of an interval free nothing, because the
    /// notifier or state, with all that it owns, belongs to the parent. The child makes an address
    /// space of its own.
    ///
    /// # Source
    /// `mmu_notifier_subscriptions_init` in `mm_init`, kernel/fork.c: a child starts without
    /// subscribers. Differs: the kernel has no handle that a child could inherit.
    #[must_use]
    #[inline]
    pub fn is_inherited(&self) -> bool {
        self.0.forks != forks()
    }

    /// Takes one more user, which keeps the address space alive; `None` if the address space has
    /// ended, is ending, or belongs to a parent process.
    ///
    /// This is the only way from a handle to a user, and subscribing needs a user:
    ///
    /// ```compile_fail,E0308
    /// # struct Shadow; impl mmu_notifier::Notifier for Shadow {}
    /// # static SHADOW: mmu_notifier::Subsystem<Shadow> = mmu_notifier::Subsystem::new(|_| Ok(Shadow));
    /// fn subscribe(handle: &mmu_notifier::Mm) {
    ///     let _ = SHADOW.get(handle);
    /// }
    /// ```
    ///
    /// # Blocking
    /// Never.
    /// # Source
    /// `mmget_not_zero`, include/linux/sched/mm.h.
    #[must_use]
    pub fn mmget_not_zero(&self) -> Option<MmWithUser> {
        let mut users = if self.is_inherited() {
            0
        } else {
            self.0.users.load(Ordering::Relaxed)
        };
        while users != 0 {
            // ORDER: Relaxed is enough. The handle `self` already orders the content, and which
            // thread runs exit depends on the count alone.
            match self.0.users.compare_exchange_weak(
                users,
                users + 1,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(MmWithUser(self.clone())),
                Err(now) => users = now,
            }
        }
        None
    }

    /// Returns how many [`MmWithUser`] there are now. For reports and tests.
    #[must_use]
    #[inline]
    pub fn mm_users(&self) -> usize {
        self.0.users.load(Ordering::Relaxed)
    }

    /// Returns how many handles there are now. Every `Mm`, [`MmWithUser`], interval and
    /// [`OwnedBracket`] holds one, and so does every notifier until its free: all subscriptions of
    /// one notifier share its handle. For reports and tests.
    #[must_use]
    pub fn mm_count(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// Tells whether a bracket would call a callback: a subscriber exists, or an interval was
    /// inserted at some time. The answer is a snapshot, and a registrar may be at work. So a source
    /// must not skip a bracket because the answer is false.
    ///
    /// # Blocking
    /// Never.
    /// # Source
    /// `mm_has_notifiers`, Linux 5.15. Differs: the answer is false again once the last subscriber
    /// has gone, unless an interval was ever inserted.
    #[must_use]
    #[doc(alias = "mm_has_notifiers")]
    pub fn has_notifiers(&self) -> bool {
        !self.is_inherited() && (!self.0.subscriptions.is_empty() || self.0.intervals.is_enabled())
    }

    /// Returns how many callbacks and drops of this address space's subscribers have panicked.
    #[must_use]
    pub fn callback_panics(&self) -> usize {
        self.0.panics.load(Ordering::Relaxed)
    }

    /// Tells the subscribers whose hardware walks the primary page table itself to flush `range`.
    ///
    /// # Blocking
    /// Never. The callbacks must not sleep either.
    /// # Source
    /// `mmu_notifier_arch_invalidate_secondary_tlbs`, Linux 6.6.
    #[doc(alias = "mmu_notifier_arch_invalidate_secondary_tlbs")]
    pub fn invalidate_secondary_tlbs(&self, range: VaRange) {
        self.for_each(|notifier| {
            if let Some(tlb) = notifier.secondary_tlb(Sealed) {
                tlb.invalidate_secondary_tlbs(self, range);
            }
        });
    }

    /// Clears the accessed marks that subscribers keep for `range`, flushes, and returns whether
    /// any mark was set. Asks every subscriber.
    ///
    /// # Blocking
    /// As long as the callbacks do.
    /// # Source
    /// `mmu_notifier_clear_flush_young`, Linux 5.15. Differs: the caller adds the primary page
    /// table's own mark.
    #[doc(alias = "mmu_notifier_clear_flush_young")]
    pub fn clear_flush_young(&self, range: VaRange) -> bool {
        let mut young = false;
        self.for_each(|notifier| young |= notifier.clear_flush_young(self, range));
        young
    }

    /// Clears the accessed marks that subscribers keep for `range`, and returns whether any mark
    /// was set. Asks every subscriber.
    ///
    /// # Blocking
    /// As long as the callbacks do.
    /// # Source
    /// `mmu_notifier_clear_young`, Linux 5.15.
    /// # Examples
    /// ```
    /// use mmu_notifier::{Mm, MmWithUser, Notifier, Registration, Va, VaRange};
    /// use std::sync::atomic::{AtomicBool, Ordering};
    ///
    /// struct Table(AtomicBool);
    /// impl Notifier for Table {
    ///     fn clear_young(&self, _: &Mm, _: VaRange) -> bool {
    ///         self.0.swap(false, Ordering::Relaxed)
    ///     }
    ///     fn test_young(&self, _: &Mm, _: Va) -> bool {
    ///         self.0.load(Ordering::Relaxed)
    ///     }
    /// }
    ///
    /// let mm = MmWithUser::new();
    /// let _table = Registration::new(&mm, Table(AtomicBool::new(true)))?;
    /// assert!(mm.test_young(Va::new(0x1000)) && mm.clear_young(VaRange::ALL));
    /// assert!(!mm.test_young(Va::new(0x1000)), "the page was not used since");
    /// # Ok::<(), mmu_notifier::WouldDeadlock>(())
    /// ```
    #[doc(alias = "mmu_notifier_clear_young")]
    pub fn clear_young(&self, range: VaRange) -> bool {
        let mut young = false;
        self.for_each(|notifier| young |= notifier.clear_young(self, range));
        young
    }

    /// Tells whether any subscriber holds a set accessed mark for the page at `address`. Stops
    /// asking at the first such subscriber.
    ///
    /// # Blocking
    /// As long as the callbacks do.
    /// # Source
    /// `mmu_notifier_test_young`, Linux 5.15.
    #[doc(alias = "mmu_notifier_test_young")]
    #[must_use]
    pub fn test_young(&self, address: Va) -> bool {
        let mut young = false;
        self.for_each(|notifier| young = young || notifier.test_young(self, address));
        young
    }

    /// Calls `f` for every subscriber, in a read section of its own.
    fn for_each(&self, f: impl FnMut(&dyn crate::Notifier)) {
        if self.is_inherited() {
            return;
        }
        let _inside = context::Inside::enter(self);
        self.0.subscriptions.read().for_each(self, f);
    }

    /// Runs the deferred frees of this address space. For models, which have no reclaimer thread.
    #[cfg(mmun_loom)]
    #[doc(hidden)]
    pub fn run_deferred(&self) {
        self.0
            .subscriptions
            .srcu()
            .barrier()
            .expect("called outside of sections");
    }

    #[inline]
    pub(crate) fn intervals(&self) -> &Intervals {
        &self.0.intervals
    }

    /// Returns the sequence of the intervals and how many invalidations are open, for tests of the
    /// protocol.
    #[doc(hidden)]
    #[must_use]
    pub fn interval_snapshot(&self) -> (u64, u64) {
        self.0.intervals.snapshot()
    }

    #[inline]
    pub(crate) fn subscriptions(&self) -> &Subscriptions {
        &self.0.subscriptions
    }

    /// Tells whether waiting here for brackets of this address space would wait for this thread
    /// itself, or could wait for ever.
    pub(crate) fn would_deadlock(&self) -> bool {
        // An inherited address space may have brackets of parent threads. These brackets never end
        // in the child.
        self.0.subscriptions.srcu().read_lock_held() || context::is_freeing() || self.is_inherited()
    }

    /// Runs one callback. If it panics, catches and counts the panic.
    #[inline]
    pub(crate) fn catching(&self, callback: impl FnOnce()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(callback)) {
            self.count_panic(panic);
        }
    }

    /// Counts a callback's panic. The panic hook has printed the message already.
    #[cold]
    pub(crate) fn count_panic(&self, payload: Box<dyn Any + Send>) {
        self.0.panics.fetch_add(1, Ordering::Relaxed);
        if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
            // Dropping the payload panicked too. Leak the second payload instead of dropping it.
            std::mem::forget(again);
        }
    }
}

impl PartialEq for Mm {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Mm {}

impl fmt::Debug for Mm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mm")
            .field("id", &self.id())
            .field("mm_users", &self.mm_users())
            .finish_non_exhaustive()
    }
}

/// A counted handle of an address space that is alive (`mm_users`).
///
/// Cloning it is `mmget`. Dropping the last one is exit: it calls every interval once, calls
/// `release` of every subscriber, delists the subscribers, and waits until no callback runs in any
/// of them. A callback may still run in a subscriber that was put or unregistered before. The owner
/// of the pages frees them after exit has returned.
///
/// # Blocking
/// The last drop sleeps while callbacks run and, if there is a subscriber, while open brackets
/// last. Inside a bracket or callback of the same address space, or in a deferred free, the drop
/// does not wait for brackets.
///
/// # Source
/// `mmget`, `mmput`; `MmWithUser` of Rust in the kernel.
///
/// # Examples
/// ```
/// use mmu_notifier::MmWithUser;
///
/// let mm = MmWithUser::new();
/// let handle = (*mm).clone();
/// assert!(handle.mmget_not_zero().is_some());
/// drop(mm);
/// assert!(handle.mmget_not_zero().is_none(), "it has ended, though the handle is still good");
/// ```
#[doc(alias = "mmget")]
#[doc(alias = "mmput")]
#[repr(transparent)]
pub struct MmWithUser(Mm);

impl MmWithUser {
    /// Makes a new address space, with one user and no subscriber, as fork and execve do.
    ///
    /// # Source
    /// `mm_init`, `mmu_notifier_subscriptions_init`: a forked child starts without subscribers.
    #[must_use]
    #[expect(
        clippy::new_without_default,
        reason = "a new address space is an event, not a default value"
    )]
    pub fn new() -> Self {
        Self::with_interval_seq(2)
    }

    /// Like [`new`](Self::new), but the sequence of the intervals begins with `seq`. For tests of
    /// the sequence's wrap-around.
    ///
    /// # Panics
    /// If `seq` is odd.
    #[doc(hidden)]
    #[must_use]
    pub fn with_interval_seq(seq: u64) -> Self {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        Self(Mm(Arc::new(Inner {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            forks: forks(),
            users: AtomicUsize::new(1),
            subscriptions: Subscriptions::new(),
            intervals: Intervals::new(seq),
            mmap_lock: MmapLock::new(),
            panics: AtomicUsize::new(0),
        })))
    }
}

impl Clone for MmWithUser {
    fn clone(&self) -> Self {
        // ORDER: Relaxed is enough: `self` keeps the count above zero meanwhile.
        self.0.0.users.fetch_add(1, Ordering::Relaxed);
        Self(self.0.clone())
    }
}

impl Drop for MmWithUser {
    fn drop(&mut self) {
        // ORDER(core-exit): AcqRel orders everything that earlier users did before the exit by the
        // last one. Partner: itself. If weaker, exit could delist without seeing a registration
        // that an earlier user made.
        let order = if mutant("exit_relaxed") {
            Ordering::Relaxed
        } else {
            Ordering::AcqRel
        };
        if self.0.0.users.fetch_sub(1, order) == 1 {
            exit::release(&self.0);
        }
    }
}

impl Deref for MmWithUser {
    type Target = Mm;

    fn deref(&self) -> &Mm {
        &self.0
    }
}

impl fmt::Debug for MmWithUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}
