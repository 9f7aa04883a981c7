//! The collision protocol of a hypervisor: one count, one sequence and one range for a whole
//! shadow.
//!
//! # The protocol
//! * A **start** that meets a watched range increments `in_progress` and widens the range. Then it
//!   locks the state and zaps.
//! * The **end** of such a start advances `seq`, and only then decrements `in_progress`.
//! * A **fault** proceeds in six steps:
//! 1. It reads `seq`.
//! 2. It looks up the page, without a lock.
//! 3. It locks the state.
//! 4. If `in_progress` is not zero and the range meets the fault's, the fault retries from step 1.
//! 5. If `seq` has changed, the fault retries from step 1.
//! 6. It installs the page and unlocks the state.
//!
//! A fault must never leave a stale entry installed. A fault and the zap of a start take the same
//! lock, so there are two cases:
//!
//! * If the fault takes the lock first, the zap comes later and removes what the fault installed.
//! * If the start takes the lock first, the fault sees the start's count and retries. If the
//!   matching end has already removed that count, the fault sees the new `seq`, because the end
//!   advances `seq` first. A fault that read the old `seq` in step 1 then retries. A fault that
//!   read the new `seq` looked up the page after the change, so its entry is not stale.
//!
//! # Source
//! `kvm_mmu_invalidate_begin`, `_range_add`, `_end`, `mmu_invalidate_retry_gfn`,
//! virt/kvm/kvm_main.c, Linux 6.12.

mod watched;

use crate::mm::context;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex, into_inner, lock, mutant};
use crate::{
    Blocking, Event, Exit, InvalidateRange, Mm, Notifier, Va, VaRange, WouldBlock, WouldDeadlock,
    lockdep,
};
use std::fmt;
use std::mem::replace;
use std::sync::{PoisonError, TryLockError};
use watched::Watched;

/// What a shadow does when part of it is invalidated. See [`InvalidateSeq`] for an example.
///
/// # Source
/// `kvm_unmap_gfn_range`, arch/x86/kvm/mmu/mmu.c, Linux 6.12.
pub trait ShadowOps: Send + 'static {
    /// Drops every entry that `range` covers. The caller holds the shadow's lock.
    ///
    /// A bracket calls it if its range meets a range that the shadow watches, and passes the whole
    /// range. When the address space ends, it is called for all addresses.
    ///
    /// # Blocking
    /// May sleep unless [`InvalidateRange::blocking`] forbids it. Must not wait for a thread that
    /// itself waits for an invalidation to end, because neither would continue. Must not allocate,
    /// free or print: see [`Notifier`].
    fn zap(&mut self, range: &InvalidateRange<'_>);
}

/// A shadow of translations, with the protocol by which faults fill it and invalidations empty it.
///
/// Use it for a shadow that has one lock and many faults that may collide, such as a virtual
/// machine's page tables. For many independent ranges, use
/// [`IntervalNotifier`](crate::IntervalNotifier)s. An `InvalidateSeq` is a [`Notifier`]: give it to
/// a [`Subsystem`](crate::Subsystem) or a [`Registration`](crate::Registration), or let a
/// notifier that contains it call its callbacks. The state is reached only under its lock. The
/// result of a fault's look-up is installed only if the range has not changed since.
///
/// A fault does not wait for an invalidation. The shadow refuses the fault, which then retries with
/// a new snapshot. While invalidations overlap in time, the smallest range around all of them
/// counts as invalidated until the last one ends. An invalidation of unwatched ranges does not
/// count. After the address space has ended, every install is refused.
///
/// # Source
/// The `mmu_invalidate_*` fields of `struct kvm`, Linux 6.12. Differs: ranges are addresses instead
/// of guest frames; the end does not take the shadow's lock; an install after exit is refused.
///
/// # Examples
/// A shadow that this program defines. [`SoftTlb`](crate::SoftTlb) is a ready-made table.
///
/// ```
/// # use mmu_notifier::lockdep::CheckedAlloc;
/// # #[global_allocator]
/// # static ALLOC: CheckedAlloc = CheckedAlloc::new();
/// use mmu_notifier::{Event, InvalidateRange, InvalidateSeq, MmWithUser, Registration, ShadowOps, Va, VaRange};
///
/// /// Frames of eight pages, in a fixed array: `zap` and the closure of `try_install` must not allocate or free.
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
    /// Waiters are notified when no bracket is open, and when the address space has ended.
    idle: Condvar,
    /// How many open brackets meet a watched range, plus one that stays for ever once the address
    /// space has ended. This field and the next three are written under `window` and read without
    /// it.
    in_progress: AtomicU64,
    seq: AtomicU64,
    first: AtomicU64,
    last: AtomicU64,
    state: Mutex<State<S>>,
    /// The `lockdep` map of the lock around `state`.
    order: lockdep::Map,
}

#[derive(Debug)]
struct Window {
    /// How many brackets are open, whether or not they meet a watched range
    /// (`mn_active_invalidate_count`).
    active: u64,
    /// Whether the address space has ended. Exit delists the subscriber, so brackets that were open
    /// at that time may never call their end.
    released: bool,
    /// How many threads wait for `idle`. Without waiters, the end skips the wake-up, which would be
    /// a system call.
    waiters: usize,
    /// Only a thread that holds the locks of `window` and `state` changes it, and only when
    /// `active` is zero or after release. So an end finds the ranges of its start. After release,
    /// an end skips `in_progress`.
    watched: Watched,
}

#[derive(Debug)]
struct State<S> {
    shadow: S,
    watched: Watched,
}

/// The start of a fault: its range, and the sequence at that time.
///
/// A snapshot is good for one try. After a refusal, the fault needs a new snapshot and a new
/// look-up:
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
    /// The range may have changed: take a new snapshot and look up again. Either an invalidation of
    /// some watched range has ended since the snapshot, or an open one meets the range.
    Retry,
    /// The range is not within the ranges that the shadow watches, so no invalidation would zap it.
    NotWatched,
    /// The address space has ended: nothing can be installed any more, so a retry is useless.
    Exited,
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Retry => {
                "the range was invalidated meanwhile: take a new snapshot and look up again"
            }
            Self::Exited => "the address space has ended: nothing can be installed any more",
            Self::NotWatched => {
                "the range is not within the ranges that the shadow watches: pass it to `watch`"
            }
        })
    }
}

impl std::error::Error for InstallError {}

impl<S: ShadowOps> InvalidateSeq<S> {
    /// Makes a shadow of the given ranges, which may overlap or touch.
    ///
    /// Until the shadow is registered, no bracket calls it.
    #[must_use]
    pub fn new(watched: impl IntoIterator<Item = VaRange>, shadow: S) -> Self {
        let watched = Watched::new(watched);
        Self {
            window: Mutex::new(Window {
                active: 0,
                released: false,
                waiters: 0,
                watched: watched.clone(),
            }),
            idle: Condvar::new(),
            in_progress: AtomicU64::new(0),
            seq: AtomicU64::new(0),
            first: AtomicU64::new(0),
            last: AtomicU64::new(0),
            state: Mutex::new(State { shadow, watched }),
            order: lockdep::Map::new("the shadow of an InvalidateSeq"),
        }
    }

    /// Begins a fault on `range`. The caller must look up the page after this call: an earlier
    /// look-up may be stale, and the snapshot could not tell.
    ///
    /// # Blocking
    /// Never. Takes no lock.
    /// # Source
    /// The read of `mmu_invalidate_seq` in a KVM page fault.
    pub fn snapshot(&self, range: VaRange) -> Snapshot {
        // ORDER(core-seq): orders the change that an end reports before the caller's look-up.
        // Partner: the store in `advance`. If weaker, a fault could look up the old page after it
        // read the new sequence. Model: loom `b_40`.
        let order = if mutant("snapshot_relaxed") {
            Ordering::Relaxed
        } else {
            Ordering::Acquire
        };
        Snapshot {
            range,
            seq: self.seq.load(order),
        }
    }

    /// Tells, without the lock, whether [`try_install`](Self::try_install) would probably return
    /// [`InstallError::Retry`]. Either answer may be stale when it is returned. A caller can use it
    /// to skip a look-up that is probably useless.
    ///
    /// # Source
    /// `mmu_invalidate_retry_gfn_unsafe`.
    #[doc(alias = "mmu_invalidate_retry_gfn_unsafe")]
    #[must_use]
    pub fn is_stale(&self, snapshot: &Snapshot) -> bool {
        // ORDER(core-seq-end): partner of the stores in `leave` and `enter`. If weaker, a fault
        // could see an end's count without that end's sequence, and install what the bracket has
        // invalidated. Model: loom `b_40`.
        if self.in_progress.load(Ordering::Acquire) != 0 {
            // ORDER(core-seq-end): partner of the stores in `enter`. A fault that reads the range
            // of a later window also sees the sequence that earlier windows have advanced.
            let order = if mutant("range_relaxed") {
                Ordering::Relaxed
            } else {
                Ordering::Acquire
            };
            let (first, last) = (self.first.load(order), self.last.load(order));
            if first <= snapshot.range.last().get() && snapshot.range.start().get() <= last {
                return true;
            }
        }
        self.seq.load(Ordering::Relaxed) != snapshot.seq
    }

    /// Runs `install` on the locked shadow, if the snapshot's range is watched and cannot have
    /// changed since. There is one sequence for all watched ranges: an invalidation of other
    /// watched pages that has ended since makes the call refuse as well.
    ///
    /// `install` must not allocate, free or print, and must not change mappings. With a source in
    /// this process, any of these may run the callback, which takes the same lock ([`Notifier`] has
    /// the rule).
    ///
    /// # Blocking
    /// Sleeps while another thread holds the lock: a zap or another `install`.
    /// # Errors
    /// [`InstallError`]; `install` was not run.
    /// # Source
    /// `mmu_invalidate_retry_gfn` under `mmu_lock`. Differs: this call takes the lock and compares.
    #[doc(alias = "mmu_invalidate_retry_gfn")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn try_install<R>(
        &self,
        snapshot: Snapshot,
        install: impl FnOnce(&mut S) -> R,
    ) -> Result<R, InstallError> {
        let _order = self.order.acquire();
        let mut state = lock(&self.state);
        if self.is_stale(&snapshot) {
            drop(state);
            return Err(match lock(&self.window).released {
                true => InstallError::Exited,
                false => InstallError::Retry,
            });
        }
        if !state.watched.holds(snapshot.range) {
            return Err(InstallError::NotWatched);
        }
        Ok(install(&mut state.shadow))
    }

    /// Runs `f` on the locked shadow, to use or to drop its entries.
    ///
    /// `f` must obey the same rule as `install` in [`try_install`](Self::try_install).
    ///
    /// # Blocking
    /// Sleeps while another thread holds the lock.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn with_shadow<R>(&self, f: impl FnOnce(&mut S) -> R) -> R {
        let _order = self.order.acquire();
        f(&mut lock(&self.state).shadow)
    }

    /// Waits until no bracket is open, replaces the watched ranges, and runs `zap` on the locked
    /// shadow. `zap` must drop every entry outside the new ranges, because no bracket will zap such
    /// an entry any more. Faults that began earlier are refused.
    ///
    /// `zap` must obey the same rule as `install` in [`try_install`](Self::try_install).
    ///
    /// # Blocking
    /// Sleeps until no bracket of the address space is open, or the address space has ended. New
    /// brackets can delay it for ever. A bracket that begins while `zap` runs waits for `zap`.
    /// # Errors
    /// [`WouldDeadlock`] inside a bracket, a callback or a deferred free of any address space.
    /// Nothing has changed then.
    /// # Source
    /// `kvm_swap_active_memslots`, virt/kvm/kvm_main.c.
    /// # Examples
    /// ```
    /// # #[global_allocator]
    /// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
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
        // Collect the ranges before the check below, because the caller's iterator may leave a
        // bracket open.
        let watched = Watched::new(watched);
        if context::is_inside() {
            return Err(WouldDeadlock);
        }
        lockdep::might_wait(None);
        let mut window = lock(&self.window);
        window.waiters += 1;
        while window.active != 0 && !window.released {
            window = self
                .idle
                .wait(window)
                .unwrap_or_else(PoisonError::into_inner);
        }
        window.waiters -= 1;
        let _order = self.order.acquire();
        let mut state = lock(&self.state);
        self.advance();
        let old = (
            replace(&mut window.watched, watched.clone()),
            replace(&mut state.watched, watched),
        );
        let result = zap(&mut state.shadow);
        drop(state);
        drop(window);
        // Freeing may unmap memory, and so begin a bracket that calls this shadow: both locks must
        // be released first.
        drop(old);
        Ok(result)
    }

    /// Forgets every invalidation that has begun and not ended, and forgets that an address space
    /// has ended.
    ///
    /// A notifier that was unregistered between a start and its end never gets the end. The caller
    /// must reset such a shadow before it registers the shadow again or changes its ranges:
    /// otherwise the old starts would count for ever. Exclusive access proves that no callback
    /// runs.
    ///
    /// # Blocking
    /// Never.
    ///
    /// # Source
    /// `kvm_destroy_vm`, which resets the counts in the same case.
    /// # Examples
    /// ```
    /// # #[global_allocator]
    /// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
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

    /// Returns the shadow. Invalidations that have begun and not ended do not matter.
    ///
    /// # Blocking
    /// Never.
    pub fn into_shadow(self) -> S {
        into_inner(self.state).shadow
    }

    /// Advances the sequence; the caller holds `window` or has exclusive access.
    fn advance(&self) {
        // ORDER(core-seq): orders the change that the end reports before the new sequence. Partner:
        // the load in `snapshot`.
        self.seq.store(
            self.seq.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Release,
        );
    }

    /// Counts a start that meets a watched range. The caller holds `window`.
    fn enter(&self, range: VaRange) {
        let in_progress = self.in_progress.load(Ordering::Relaxed);
        let (mut first, mut last) = (range.start().get(), range.last().get());
        if in_progress != 0 {
            first = first.min(self.first.load(Ordering::Relaxed));
            last = last.max(self.last.load(Ordering::Relaxed));
        }
        // ORDER(core-seq-end): orders the sequence that earlier ends stored before this range.
        // Partner: the loads in `is_stale`. If weaker, a fault could see this range, which does not
        // meet the fault's, together with the old sequence, and install a stale entry.
        self.first.store(first, Ordering::Release);
        self.last.store(last, Ordering::Release);
        self.in_progress.store(in_progress + 1, Ordering::Release);
    }

    /// Removes what `enter` counted. The caller holds `window`.
    fn leave(&self) {
        let left = self.in_progress.load(Ordering::Relaxed) - 1;
        if mutant("count_before_seq") {
            self.in_progress.store(left, Ordering::Release);
            return self.advance();
        }
        self.advance();
        // ORDER(core-seq-end): orders the new sequence before the count that lets faults through.
        // Partner: the load in `is_stale`.
        self.in_progress.store(
            left,
            if mutant("end_relaxed") {
                Ordering::Relaxed
            } else {
                Ordering::Release
            },
        );
    }

    /// Counts a bracket that opens, and returns whether it meets a watched range. The caller holds
    /// `window`.
    fn open(&self, window: &mut Window, range: VaRange) -> bool {
        window.active += 1;
        let meets = window.watched.meets(range);
        if meets && !mutant("zap_uncounted") {
            self.enter(range);
        }
        meets
    }

    /// Returns the range that is being invalidated, for tests. Returns `None` if no open bracket
    /// meets a watched range and the address space has not ended.
    #[doc(hidden)]
    #[must_use]
    pub fn in_progress(&self) -> Option<(Va, Va)> {
        let _window = lock(&self.window);
        (self.in_progress.load(Ordering::Relaxed) != 0).then(|| {
            (
                Va::new(self.first.load(Ordering::Relaxed)),
                Va::new(self.last.load(Ordering::Relaxed)),
            )
        })
    }
}

impl<S: ShadowOps> Notifier for InvalidateSeq<S> {
    fn release(&self, mm: &Mm) {
        {
            // This count is never removed: pages that a fault looks up from now on are about to be
            // freed.
            let mut window = lock(&self.window);
            self.enter(VaRange::ALL);
            window.released = true;
        }
        self.idle.notify_all();
        let event = Event::Release(Exit(()));
        let range = InvalidateRange {
            mm,
            range: VaRange::ALL,
            event,
            blocking: Blocking::Allowed,
            origin: 0,
        };
        let _order = self.order.acquire();
        lock(&self.state).shadow.zap(&range);
    }

    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        // The count comes before the zap, so a fault that locks after the zap sees the count.
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
    /// If no start came before.
    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        let mut window = lock(&self.window);
        window.active = window
            .active
            .checked_sub(1)
            .expect("an end comes after its start");
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

/// Locks without waiting, or refuses.
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
