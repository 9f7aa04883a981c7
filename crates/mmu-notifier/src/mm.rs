//! The address space: its memory (`Mm`) and its life (`MmWithUser`).

mod bracket;
mod exit;
mod lock;

pub use bracket::{Bracket, OwnedBracket};
pub use lock::MmapWriteGuard;

use crate::interval::Intervals;
use crate::secondary::Sealed;
use crate::subscriptions::Subscriptions;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::forks;
use crate::sync::{Arc, mutant};
use crate::{Va, VaRange, context};
use lock::MmapLock;
use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A counted handle of an address space (`mm_count`): the object is there, the address space may have ended.
///
/// Cloning it is `mmgrab`, dropping it `mmdrop`. A subscription holds one. It does not keep the address space alive; to
/// do something that needs it alive, go up through [`mmget_not_zero`](Self::mmget_not_zero).
///
/// # Blocking
/// The last drop waits for what the address space's domain still has to run, if there is anything.
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

/// Alone on its cache lines, as its subscribers are.
#[repr(align(128))]
struct Inner {
    id: u64,
    /// What [`forks`] said in the process that it belongs to.
    forks: usize,
    /// How many [`MmWithUser`] there are; zero for ever once it was.
    users: AtomicUsize,
    subscriptions: Subscriptions,
    intervals: Intervals,
    mmap_lock: MmapLock,
    panics: AtomicUsize,
}

impl Mm {
    /// Returns the number by which this process tells its address spaces apart, counted from 1 and never used again.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Tells whether this address space is that of a process which this one was forked from.
    ///
    /// It is the parent's alone: here it has no subscribers, brackets of it call nobody, nobody can subscribe to it or get a
    /// user of it, and what is put or dropped here for the last time is left as it is, with what it may hold of the
    /// parent's. The child makes an address space of its own.
    ///
    /// # Source
    /// `mmu_notifier_subscriptions_init` in `mm_init`, kernel/fork.c: a child starts without subscribers. Differs: the kernel has
    /// no handle that a child could inherit.
    #[must_use]
    #[inline]
    pub fn is_inherited(&self) -> bool {
        self.0.forks != forks()
    }

    /// Takes part in keeping the address space alive, unless it has ended, is ending, or is the parent's of this process.
    ///
    /// It is the only way up from a handle; to subscribe takes a user:
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
        let mut users = if self.is_inherited() { 0 } else { self.0.users.load(Ordering::Relaxed) };
        while users != 0 {
            // ORDER: Relaxed is enough: the handle that `self` came from orders the content, and the count alone decides who
            // runs exit.
            match self.0.users.compare_exchange_weak(users, users + 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(MmWithUser(self.clone())),
                Err(now) => users = now,
            }
        }
        None
    }

    /// Returns how many [`MmWithUser`] there are. A snapshot, for reports and tests.
    #[must_use]
    pub fn mm_users(&self) -> usize {
        self.0.users.load(Ordering::Relaxed)
    }

    /// Returns how many handles there are: every `Mm`, every [`MmWithUser`] and every subscription holds one. A snapshot,
    /// for reports and tests.
    #[must_use]
    pub fn mm_count(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// Tells whether a bracket would call anybody: there is a subscriber, or there has been an interval. A snapshot: a
    /// registrar may be at work, so a source must not leave a bracket out because of it.
    ///
    /// # Blocking
    /// Never.
    /// # Source
    /// `mm_has_notifiers`, Linux 5.15. Differs: it is false again once the last subscriber has gone.
    #[must_use]
    #[doc(alias = "mm_has_notifiers")]
    pub fn has_notifiers(&self) -> bool {
        !self.is_inherited() && (!self.0.subscriptions.is_empty() || self.0.intervals.is_enabled())
    }

    /// Returns how many callbacks of this address space's subscribers, their drops included, have panicked.
    #[must_use]
    pub fn callback_panics(&self) -> usize {
        self.0.panics.load(Ordering::Relaxed)
    }

    /// Tells subscribers that walk the primary page table by themselves to flush `range`.
    ///
    /// # Blocking
    /// No; their callbacks must not sleep either.
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

    /// Clears the accessed marks that subscribers keep for `range`, flushes, and tells whether any was set. Asks everybody.
    ///
    /// # Blocking
    /// As long as the callbacks do.
    /// # Source
    /// `mmu_notifier_clear_flush_young`, Linux 5.15. Differs: the primary's own mark is the caller's to add.
    #[doc(alias = "mmu_notifier_clear_flush_young")]
    pub fn clear_flush_young(&self, range: VaRange) -> bool {
        let mut young = false;
        self.for_each(|notifier| young |= notifier.clear_flush_young(self, range));
        young
    }

    /// Clears the accessed marks that subscribers keep for `range`, and tells whether any was set. Asks everybody.
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
    /// assert!(!mm.test_young(Va::new(0x1000)), "nobody has used it since");
    /// # Ok::<(), mmu_notifier::WouldDeadlock>(())
    /// ```
    #[doc(alias = "mmu_notifier_clear_young")]
    pub fn clear_young(&self, range: VaRange) -> bool {
        let mut young = false;
        self.for_each(|notifier| young |= notifier.clear_young(self, range));
        young
    }

    /// Tells whether any subscriber holds a set accessed mark for the page at `address`, and asks no further than the
    /// first.
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

    /// Calls `f` for every subscriber in a section of its own.
    fn for_each(&self, f: impl FnMut(&dyn crate::Notifier)) {
        if self.is_inherited() {
            return;
        }
        let _inside = context::Inside::enter(self);
        self.0.subscriptions.read().for_each(self, f);
    }

    /// Runs the deferred frees of this address space: models have no reclaimer thread.
    #[cfg(mmun_loom)]
    #[doc(hidden)]
    pub fn run_deferred(&self) {
        self.0.subscriptions.srcu().barrier().expect("called outside of sections");
    }

    #[inline]
    pub(crate) fn intervals(&self) -> &Intervals {
        &self.0.intervals
    }

    /// Returns the sequence of the intervals and how many invalidations are open, for tests of the protocol.
    #[doc(hidden)]
    #[must_use]
    pub fn interval_snapshot(&self) -> (u64, u64) {
        self.0.intervals.snapshot()
    }

    #[inline]
    pub(crate) fn subscriptions(&self) -> &Subscriptions {
        &self.0.subscriptions
    }

    /// Tells whether waiting here for brackets of this address space would wait for this thread itself.
    pub(crate) fn would_deadlock(&self) -> bool {
        // Where it is inherited, whoever would have to be waited for may be a thread of the parent.
        self.0.subscriptions.srcu().read_lock_held() || context::is_freeing() || self.is_inherited()
    }

    /// Runs one callback; a panic in it is counted.
    #[inline]
    pub(crate) fn catching(&self, callback: impl FnOnce()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(callback)) {
            self.count_panic(panic);
        }
    }

    /// Counts a callback's panic. Its message went through the panic hook already.
    #[cold]
    pub(crate) fn count_panic(&self, payload: Box<dyn Any + Send>) {
        self.0.panics.fetch_add(1, Ordering::Relaxed);
        if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
            // A payload whose drop panics as well is not asked a third time.
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
        f.debug_struct("Mm").field("id", &self.id()).field("mm_users", &self.mm_users()).finish_non_exhaustive()
    }
}

/// A counted handle of an address space that is alive (`mm_users`).
///
/// Cloning it is `mmget`. Dropping the last one is exit: it calls `release` of every subscriber, delists them, and waits
/// until no callback runs in any of them; one that was put or unregistered before is not waited for. Whoever owns the pages frees them after that.
///
/// # Blocking
/// The last drop sleeps while `release` callbacks and open brackets last. Inside a callback of the same address space, or in
/// a deferred free, it does not wait for those brackets.
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
    #[expect(clippy::new_without_default, reason = "a new address space is an event, not a default value")]
    pub fn new() -> Self {
        Self::with_interval_seq(2)
    }

    /// The same with another first sequence of the intervals, for tests of its wrap-around.
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
        // ORDER(core-exit): AcqRel: everything that earlier users did, before the exit by the last one. Partner: itself. Weaker,
        // exit could delist around a registration that it does not see.
        let order = if mutant("exit_relaxed") { Ordering::Relaxed } else { Ordering::AcqRel };
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
