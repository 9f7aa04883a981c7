//! The collision protocol of a hypervisor: one count, one sequence and one range for a whole shadow.
//!
//! # The protocol
//! | who | does |
//! | --- | --- |
//! | start | counts itself in `in_progress` and widens the range; then locks the state and zaps |
//! | end | advances `seq`, and only then leaves `in_progress` |
//! | fault | reads `seq`; looks up; locks the state; gives up if `in_progress` is not zero and the range meets its own, or if `seq` is another; else installs |
//!
//! A fault whose turn at the lock comes before the start's is zapped by it. One whose turn comes after sees the start's
//! count, or else, since it was taken back after `seq` had advanced, the new `seq`. A fault that has read the new `seq`
//! looks up after the change.
//!
//! # Source
//! `kvm_mmu_invalidate_begin`, `_range_add`, `_end`, `mmu_invalidate_retry_gfn`, virt/kvm/kvm_main.c, Linux 6.12.

mod watched;

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex, into_inner, lock, mutant};
use crate::{
    Blocking, Event, Exit, InvalidateRange, Mm, Notifier, Va, VaRange, WouldBlock, WouldDeadlock, context, lockdep,
};
use std::fmt;
use std::mem::replace;
use std::sync::{PoisonError, TryLockError};
use watched::Watched;

/// What a shadow does when a part of it is invalidated. See [`InvalidateSeq`] for an example.
///
/// # Source
/// `kvm_unmap_gfn_range`, arch/x86/kvm/mmu/mmu.c, Linux 6.12.
pub trait ShadowOps: Send + 'static {
    /// Lets go of every entry that `range` covers. The shadow's lock is held.
    ///
    /// Called only for ranges that meet what the shadow watches, and with the whole range.
    ///
    /// # Blocking
    /// May sleep unless [`InvalidateRange::blocking`] forbids it. Must not wait for whoever waits for an invalidation, and must not
    /// allocate, free or print: see [`Notifier`].
    fn zap(&mut self, range: &InvalidateRange<'_>);
}

/// A shadow of translations, with the protocol by which faults fill it and invalidations empty it.
///
/// For a shadow that has one lock and many faults that may collide, such as a virtual machine's page tables; many
/// independent ranges are better off as [`IntervalNotifier`](crate::IntervalNotifier)s. It is a [`Notifier`]: give it to a
/// [`Subsystem`](crate::Subsystem) or a [`Registration`](crate::Registration), or call its callbacks from those of a
/// notifier around it. The state can be reached under its lock alone, and what a fault has looked up gets into it only
/// if nothing has changed since.
///
/// Faults do not wait for an invalidation: they are refused and try again, from the snapshot on. Of invalidations that
/// overlap in time, the smallest range around all of them counts until the last one ends; one of unwatched ranges does not
/// count. When the address space has ended, nothing can be installed any more.
///
/// # Source
/// The `mmu_invalidate_*` fields of `struct kvm`, Linux 6.12. Differs: ranges are addresses and not guest frames; the end
/// does not take the shadow's lock; what comes after exit is refused.
///
/// # Examples
/// A shadow of this program's own; [`SoftTlb`](crate::SoftTlb) is a ready one.
///
/// ```
/// # use mmu_notifier::lockdep::CheckedAlloc;
/// # #[global_allocator]
/// # static ALLOC: CheckedAlloc = CheckedAlloc::new();
/// use mmu_notifier::{Event, InvalidateRange, InvalidateSeq, MmWithUser, Registration, ShadowOps, Va, VaRange};
///
/// /// Frames of eight pages. Its size is fixed: neither `zap` nor what `try_install` runs may allocate or free.
/// struct Table([Option<u64>; 8]);
/// impl ShadowOps for Table {
///     fn zap(&mut self, range: &InvalidateRange<'_>) {
///         for (page, frame) in (4..).zip(&mut self.0) {
///             frame.take_if(|_| range.range().contains(Va::new(page << 12)));
///         }
///     }
/// }
///
/// let mm = MmWithUser::new();
/// let guest = VaRange::covering(Va::new(0x4000), 0x8000)?;
/// let shadow = Registration::new(&mm, InvalidateSeq::new([guest], Table([None; 8])))?;
///
/// let page = VaRange::covering(Va::new(0x7000), 1)?;
/// let snapshot = shadow.snapshot(page);
/// let frame = 42; // Looked up here, however long it takes.
/// shadow.try_install(snapshot, |table| table.0[3] = Some(frame))?;
///
/// let snapshot = shadow.snapshot(page);
/// drop(mm.invalidate(page, Event::Unmap));
/// assert!(shadow.try_install(snapshot, |table| table.0[3] = Some(frame)).is_err(), "look again");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "mmu_invalidate_seq")]
#[doc(alias = "mmu_invalidate_in_progress")]
pub struct InvalidateSeq<S: ShadowOps> {
    window: Mutex<Window>,
    /// No bracket is open.
    idle: Condvar,
    /// How many open brackets meet what is watched, and for ever one more once the address space has ended. These
    /// four are written under `window` and read without it.
    in_progress: AtomicU64,
    seq: AtomicU64,
    first: AtomicU64,
    last: AtomicU64,
    state: Mutex<State<S>>,
    /// Beside the lock of `state`.
    order: lockdep::Map,
}

#[derive(Debug)]
struct Window {
    /// How many brackets are open, whether they meet what is watched or not (`mn_active_invalidate_count`).
    active: u64,
    /// Whether the address space has ended: of brackets that were open then, the end may never come.
    released: bool,
    /// How many threads wait for `idle`: waking nobody would still be a system call.
    waiters: usize,
    /// Changed only when `active` is zero, so that an end decides as its start did, or after release, when ends decide
    /// nothing; and under both locks.
    watched: Watched,
}

#[derive(Debug)]
struct State<S> {
    shadow: S,
    watched: Watched,
}

/// What a fault began with: where, and the sequence at that time.
///
/// It serves for one try. One that was refused needs a new snapshot and a new look-up after it:
///
/// ```compile_fail,E0382
/// # use mmu_notifier::*;
/// # struct Nothing; impl ShadowOps for Nothing { fn zap(&mut self, _: &InvalidateRange<'_>) {} }
/// let shadow = InvalidateSeq::new([VaRange::ALL], Nothing);
/// let snapshot = shadow.snapshot(VaRange::ALL);
/// let _ = shadow.try_install(snapshot, |_| ());
/// let _ = shadow.try_install(snapshot, |_| ());
/// ```
#[must_use = "look up what is to be installed, then pass this to `try_install`"]
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    range: VaRange,
    seq: u64,
}

/// Why nothing was installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InstallError {
    /// The range was or is being invalidated: take a new snapshot and look up again.
    Retry,
    /// The range is not within what the shadow watches, so nobody would ever zap it.
    NotWatched,
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Retry => "the range was invalidated meanwhile: take a new snapshot and look up again",
            Self::NotWatched => "the range is not within what the shadow watches: add it with `watch`",
        })
    }
}

impl std::error::Error for InstallError {}

impl<S: ShadowOps> InvalidateSeq<S> {
    /// Makes a shadow of the given ranges, which may overlap or touch.
    ///
    /// Until it is registered nobody tells it anything.
    #[must_use]
    pub fn new(watched: impl IntoIterator<Item = VaRange>, shadow: S) -> Self {
        let watched = Watched::new(watched);
        Self {
            window: Mutex::new(Window { active: 0, released: false, waiters: 0, watched: watched.clone() }),
            idle: Condvar::new(),
            in_progress: AtomicU64::new(0),
            seq: AtomicU64::new(0),
            first: AtomicU64::new(0),
            last: AtomicU64::new(0),
            state: Mutex::new(State { shadow, watched }),
            order: lockdep::Map::new("the shadow of an InvalidateSeq"),
        }
    }

    /// Begins a fault on `range`. Whatever is to be installed must be looked up after this.
    ///
    /// # Blocking
    /// Never, and takes no lock.
    /// # Source
    /// The read of `mmu_invalidate_seq` in a KVM page fault.
    pub fn snapshot(&self, range: VaRange) -> Snapshot {
        // ORDER(core-seq): the change that an end reports, before the look-up. Partner: the store in `advance`. Weaker, a fault
        // could look up the old page with the new sequence. Model: loom `b_40`.
        let order = if mutant("snapshot_relaxed") { Ordering::Relaxed } else { Ordering::Acquire };
        Snapshot { range, seq: self.seq.load(order) }
    }

    /// Tells, without the lock, whether [`try_install`](Self::try_install) would probably refuse. Both answers may be wrong by
    /// the time they arrive; it saves looking up what is of no use.
    ///
    /// # Source
    /// `mmu_invalidate_retry_gfn_unsafe`.
    #[doc(alias = "mmu_invalidate_retry_gfn_unsafe")]
    #[must_use]
    pub fn is_stale(&self, snapshot: &Snapshot) -> bool {
        // ORDER(core-seq-end): partner of the stores in `leave` and `enter`. Weaker, one could see an end's count and not its
        // sequence, and install what it has invalidated. Model: loom `b_40`.
        if self.in_progress.load(Ordering::Acquire) != 0 {
            // ORDER(core-seq-end): partner of the stores in `enter`: who reads the range of a later window sees that the
            // earlier one has advanced the sequence.
            let order = if mutant("range_relaxed") { Ordering::Relaxed } else { Ordering::Acquire };
            let (first, last) = (self.first.load(order), self.last.load(order));
            if first <= snapshot.range.last().get() && snapshot.range.start().get() <= last {
                return true;
            }
        }
        self.seq.load(Ordering::Relaxed) != snapshot.seq
    }

    /// Runs `install` on the locked shadow, if the snapshot's range is watched and was not invalidated since.
    ///
    /// `install` must not allocate, free or print, and make no memory call: with a source in this process, any of these may
    /// run the callback, which takes the same lock ([`Notifier`] has the rule).
    ///
    /// # Blocking
    /// Sleeps while another thread holds the lock: a zap or another `install`.
    /// # Errors
    /// [`InstallError`]; `install` was not run.
    /// # Source
    /// `mmu_invalidate_retry_gfn` under `mmu_lock`. Differs: the lock and the comparison are one.
    #[doc(alias = "mmu_invalidate_retry_gfn")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn try_install<R>(&self, snapshot: Snapshot, install: impl FnOnce(&mut S) -> R) -> Result<R, InstallError> {
        let _order = self.order.acquire();
        let mut state = lock(&self.state);
        if self.is_stale(&snapshot) {
            return Err(InstallError::Retry);
        }
        if !state.watched.holds(snapshot.range) {
            return Err(InstallError::NotWatched);
        }
        Ok(install(&mut state.shadow))
    }

    /// Runs `f` on the locked shadow: to use what it holds, or to let go of it.
    ///
    /// The same holds for `f` as for what [`try_install`](Self::try_install) runs.
    ///
    /// # Blocking
    /// Sleeps while another thread holds the lock.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn with_shadow<R>(&self, f: impl FnOnce(&mut S) -> R) -> R {
        let _order = self.order.acquire();
        f(&mut lock(&self.state).shadow)
    }

    /// Replaces the ranges that are watched, when no invalidation is open, and runs `zap` on the locked shadow, which must let
    /// go of whatever is watched no longer. Faults that have begun before are refused.
    ///
    /// The same holds for `zap` as for what [`try_install`](Self::try_install) runs.
    ///
    /// # Blocking
    /// Sleeps until every open bracket of the address space has ended, or the address space has. Brackets that begin meanwhile
    /// can hold it up; those that begin while `zap` runs wait for it.
    /// # Errors
    /// [`WouldDeadlock`] inside a bracket, a callback or a deferred free of any address space. Nothing has changed then.
    /// # Source
    /// `kvm_swap_active_memslots`, virt/kvm/kvm_main.c.
    /// # Examples
    /// ```
    /// # use mmu_notifier::*;
    /// # struct Table(Vec<u64>);
    /// # impl ShadowOps for Table { fn zap(&mut self, _: &InvalidateRange<'_>) { self.0.clear(); } }
    /// let shadow = InvalidateSeq::new([], Table(vec![7]));
    /// let page = VaRange::covering(Va::new(0x7000), 1)?;
    /// let snapshot = shadow.snapshot(page);
    /// assert_eq!(shadow.try_install(snapshot, |_| ()), Err(InstallError::NotWatched));
    /// let before = shadow.snapshot(page);
    /// shadow.watch([page], |table| table.0.clear())?;
    /// assert!(shadow.is_stale(&before) && shadow.try_install(before, |_| ()).is_err());
    /// let snapshot = shadow.snapshot(page);
    /// shadow.try_install(snapshot, |table| table.0.push(7))?;
    /// assert_eq!(shadow.with_shadow(|table| table.0.len()), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "kvm_swap_active_memslots")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn watch<R>(
        &self,
        watched: impl IntoIterator<Item = VaRange>,
        zap: impl FnOnce(&mut S) -> R,
    ) -> Result<R, WouldDeadlock> {
        // Before the question: the caller's iterator may leave a bracket open.
        let watched = Watched::new(watched);
        if context::is_inside() {
            return Err(WouldDeadlock);
        }
        lockdep::might_wait(None);
        let mut window = lock(&self.window);
        window.waiters += 1;
        while window.active != 0 && !window.released {
            window = self.idle.wait(window).unwrap_or_else(PoisonError::into_inner);
        }
        window.waiters -= 1;
        let _order = self.order.acquire();
        let mut state = lock(&self.state);
        self.advance();
        let old = (replace(&mut window.watched, watched.clone()), replace(&mut state.watched, watched));
        let result = zap(&mut state.shadow);
        drop(state);
        drop(window);
        // Freeing may unmap memory, which may come back here as a bracket.
        drop(old);
        Ok(result)
    }

    /// Forgets every invalidation that has begun and not ended, and that an address space has ended.
    ///
    /// A notifier that was unregistered between a start and its end never hears of the end. Before such a shadow is
    /// registered again, or its ranges are changed, this must be called; exclusive access proves that no callback runs.
    ///
    /// # Blocking
    /// Never.
    ///
    /// # Source
    /// `kvm_destroy_vm`, which resets the counts in the same case.
    /// # Examples
    /// ```
    /// # use mmu_notifier::*;
    /// # struct Table; impl ShadowOps for Table { fn zap(&mut self, _: &InvalidateRange<'_>) {} }
    /// let mm = MmWithUser::new();
    /// let shadow = Registration::new(&mm, InvalidateSeq::new([VaRange::ALL], Table))?;
    /// let mut shadow = shadow.unregister()?;
    /// let snapshot = shadow.snapshot(VaRange::ALL);
    /// assert!(shadow.try_install(snapshot, |_| ()).is_err(), "it was released");
    /// shadow.reset();
    /// let shadow = Registration::new(&mm, shadow)?;
    /// let snapshot = shadow.snapshot(VaRange::ALL);
    /// assert!(shadow.try_install(snapshot, |_| ()).is_ok());
    /// # Ok::<(), mmu_notifier::WouldDeadlock>(())
    /// ```
    pub fn reset(&mut self) {
        let mut window = lock(&self.window);
        (window.active, window.released) = (0, false);
        self.in_progress.store(0, Ordering::Relaxed);
        self.advance();
    }

    /// Takes the shadow out, whatever has begun and not ended.
    ///
    /// # Blocking
    /// Never.
    pub fn into_shadow(self) -> S {
        into_inner(self.state).shadow
    }

    /// Advances the sequence; the caller holds `window` or has exclusive access.
    fn advance(&self) {
        // ORDER(core-seq): what is reported, before the new sequence. Partner: the load in `snapshot`.
        self.seq.store(self.seq.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }

    /// Counts a start that meets what is watched; the caller holds `window`.
    fn enter(&self, range: VaRange) {
        let in_progress = self.in_progress.load(Ordering::Relaxed);
        let (mut first, mut last) = (range.start().get(), range.last().get());
        if in_progress != 0 {
            first = first.min(self.first.load(Ordering::Relaxed));
            last = last.max(self.last.load(Ordering::Relaxed));
        }
        // ORDER(core-seq-end): the sequence of earlier ends, before the range that replaces theirs. Partner: the loads in
        // `is_stale`. Weaker, a fault could see a range that does not meet it and the old sequence.
        self.first.store(first, Ordering::Release);
        self.last.store(last, Ordering::Release);
        self.in_progress.store(in_progress + 1, Ordering::Release);
    }

    /// Takes back what `enter` counted; the caller holds `window`.
    fn leave(&self) {
        let left = self.in_progress.load(Ordering::Relaxed) - 1;
        if mutant("count_before_seq") {
            self.in_progress.store(left, Ordering::Release);
            return self.advance();
        }
        self.advance();
        // ORDER(core-seq-end): the new sequence, before the count that lets faults through. Partner: the load in `is_stale`.
        self.in_progress.store(left, if mutant("end_relaxed") { Ordering::Relaxed } else { Ordering::Release });
    }

    /// Opens a bracket; the caller holds `window`. Tells whether it meets what is watched.
    fn open(&self, window: &mut Window, range: VaRange) -> bool {
        window.active += 1;
        let meets = window.watched.meets(range);
        if meets && !mutant("zap_uncounted") {
            self.enter(range);
        }
        meets
    }

    /// The range that is being invalidated, for tests; none if no invalidation meets what is watched.
    #[doc(hidden)]
    #[must_use]
    pub fn in_progress(&self) -> Option<(Va, Va)> {
        let _window = lock(&self.window);
        (self.in_progress.load(Ordering::Relaxed) != 0)
            .then(|| (Va::new(self.first.load(Ordering::Relaxed)), Va::new(self.last.load(Ordering::Relaxed))))
    }
}

impl<S: ShadowOps> Notifier for InvalidateSeq<S> {
    fn release(&self, mm: &Mm) {
        {
            // Never left: what is looked up from now on is about to be freed.
            let mut window = lock(&self.window);
            self.enter(VaRange::ALL);
            window.released = true;
        }
        self.idle.notify_all();
        let event = Event::Release(Exit(()));
        let range = InvalidateRange { mm, range: VaRange::ALL, event, blocking: Blocking::Allowed };
        let _order = self.order.acquire();
        lock(&self.state).shadow.zap(&range);
    }

    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        // Counted first: a fault whose turn at the lock comes after the zap's sees that it is too late.
        let meets = self.open(&mut lock(&self.window), range.range);
        if meets {
            let _order = self.order.acquire();
            lock(&self.state).shadow.zap(range);
        }
    }

    fn try_invalidate_range_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        let mut state = try_lock(&self.state)?;
        let meets = self.open(&mut *try_lock(&self.window)?, range.range);
        if meets {
            state.shadow.zap(range);
        }
        Ok(())
    }

    /// # Panics
    /// If there was no start.
    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        let mut window = lock(&self.window);
        window.active = window.active.checked_sub(1).expect("an end comes after its start");
        if !window.released && window.watched.meets(range.range) && !mutant("zap_uncounted") {
            self.leave();
        }
        let wake = window.active == 0 && window.waiters != 0;
        drop(window);
        if wake {
            self.idle.notify_all();
        }
    }
}

/// Locks at once or not at all.
fn try_lock<T>(mutex: &Mutex<T>) -> Result<crate::sync::MutexGuard<'_, T>, WouldBlock> {
    match mutex.try_lock() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::Poisoned(poisoned)) => Ok(PoisonError::into_inner(poisoned)),
        Err(TryLockError::WouldBlock) => Err(WouldBlock),
    }
}

impl<S: ShadowOps> fmt::Debug for InvalidateSeq<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InvalidateSeq")
            .field("in_progress", &self.in_progress.load(Ordering::Relaxed))
            .field("seq", &self.seq.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}
