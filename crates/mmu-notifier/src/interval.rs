//! Interval notifiers: a subscriber of one range, with the collision-retry protocol in its types.
//!
//! ```text
//!   reader                            bracket
//!   ------                            -------
//!   1. read_begin: waits while the
//!      interval is being invalidated,
//!      reads its sequence
//!   2. looks up, without a lock       1. start: makes the shared sequence odd (a window opens)
//!   3. try_install:                   2. for each interval that the range meets:
//!        lock the state                    lock the state
//!        retry if the sequence             store the odd sequence
//!          has changed                     invalidate the state
//!        install                           unlock
//!        unlock                       3. the memory changes
//!                                     4. last end: makes the shared sequence even, wakes readers
//! ```
//!
//! Reader and bracket take the same lock, so there are two cases:
//!
//! * If the reader takes the lock first, the callback comes later and removes what the reader
//!   installed.
//! * If the bracket takes the lock first, the reader finds another sequence and retries. The
//!   reader's next `read_begin` waits until the last window has closed, so the new look-up follows
//!   the change.
//!
//! `mm/intervals.rs` holds the shared sequence and the tree of the intervals by range.

mod error;
mod node;
pub(crate) mod raw;

pub use crate::mm::intervals::Finish;
pub use error::{InsertError, RemoveError, Retry};

use crate::mm::context;
use crate::sync::{Mutex, lock};
use crate::{
    InvalidateRange, Mm, MmWithUser, MmapWriteGuard, VaRange, WouldBlock, WouldDeadlock, lockdep,
};
use node::Node;
use std::fmt;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;

/// What an interval's state does when its range is invalidated.
///
/// The state is locked and its sequence stored before either function is called; an implementation
/// cannot forget either. Calls for different intervals may run in parallel; calls for the same
/// interval are serialised. At exit, every interval in the tree is called once with
/// [`Event::Release`](crate::Event), over the whole address space. An interval whose insert still
/// waits for the end of an open bracket at that time does not get this call.
///
/// # Source
/// `struct mmu_interval_notifier_ops`, Linux 5.5; the second pass as proposed in 2026.
///
/// # Examples
/// A state that starts a slow flush for each range and waits for all of them afterwards:
///
/// ```
/// # #[global_allocator]
/// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
/// use mmu_notifier::{Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, MmWithUser, Va, VaRange};
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// static UNDER_WAY: AtomicU64 = AtomicU64::new(0); // Flushes that were begun and not waited for.
/// static AT_ONCE: AtomicU64 = AtomicU64::new(0);   // How many there were at the most.
///
/// struct Device(Option<Finish>); // The second pass, made beforehand: the callback must not allocate.
/// impl IntervalOps for Device {
///     fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
///         let under_way = UNDER_WAY.fetch_add(1, Ordering::Relaxed) + 1; // Begin to flush.
///         AT_ONCE.fetch_max(under_way, Ordering::Relaxed);
///         self.0.take()
///     }
/// }
/// let device = || {
///     let wait = || { UNDER_WAY.fetch_sub(1, Ordering::Relaxed); };
///     Device(Some(Finish::new(wait)))
/// };
///
/// let mm = MmWithUser::new();
/// let page = |number: u64| VaRange::covering(Va::new(number << 12), 1);
/// let one = IntervalNotifier::insert(&mm, page(1)?, device())?;
/// let two = IntervalNotifier::insert(&mm, page(2)?, device())?;
/// drop(mm.invalidate(VaRange::ALL, Event::Unmap));
/// assert_eq!((AT_ONCE.load(Ordering::Relaxed), UNDER_WAY.load(Ordering::Relaxed)), (2, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "mmu_interval_notifier_ops")]
pub trait IntervalOps: Send + 'static {
    /// Drops everything that `range` covers. The returned [`Finish`] runs without the lock, after
    /// every interval that meets the range has been called. Use it for slow work that can proceed
    /// for all intervals at once.
    ///
    /// Must not allocate, free or print. The same holds for every other holder of the state's lock,
    /// because the callback waits for that lock: see [`Notifier`](crate::Notifier).
    ///
    /// # Blocking
    /// May sleep.
    fn invalidate(&mut self, range: &InvalidateRange<'_>) -> Option<Finish>;

    /// Like [`invalidate`](Self::invalidate), for a bracket in which sleeping is forbidden. The
    /// default calls `invalidate`, so a state whose `invalidate` may sleep must implement this
    /// method as well.
    ///
    /// # Errors
    /// [`WouldBlock`] if it would have to sleep. Then the intervals after this one are not called,
    /// and no bracket opens.
    fn try_invalidate(
        &mut self,
        range: &InvalidateRange<'_>,
    ) -> Result<Option<Finish>, WouldBlock> {
        Ok(self.invalidate(range))
    }
}

/// A subscriber of one range, which owns the state that the range protects.
///
/// A reader gets a sequence from [`read_begin`](Self::read_begin), and makes its look-up without
/// any lock. It stores the result in the state with [`try_install`](Self::try_install), which
/// refuses if the range was invalidated in between. So no stale result can be installed, and a
/// reader cannot forget the lock or the sequence.
///
/// Dropping it is [`remove`](Self::remove). If `remove` would wait for this very thread (inside a
/// bracket or a deferred free), the drop returns at once. The background thread then removes the
/// node and drops its state after a grace period. In the child of a fork, the drop of an interval
/// of the parent's address space does nothing.
///
/// # Source
/// `struct mmu_interval_notifier`, Linux 5.5.
///
/// # Examples
/// ```
/// # #[global_allocator]
/// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
/// use mmu_notifier::{Event, Finish, InvalidateRange, IntervalNotifier, IntervalOps, MmWithUser, Va, VaRange};
///
/// struct Shadow(Option<u64>);
/// impl IntervalOps for Shadow {
///     fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
///         self.0 = None;
///         None
///     }
/// }
///
/// let mm = MmWithUser::new();
/// let range = VaRange::covering(Va::new(0x7000), 0x1000)?;
/// let node = IntervalNotifier::insert(&mm, range, Shadow(None))?;
///
/// let seq = node.read_begin();
/// let frame = 42; // Looked up here, however long it takes.
/// node.try_install(seq, |shadow| shadow.0 = Some(frame))?;
///
/// let seq = node.read_begin();
/// drop(mm.invalidate(range, Event::Unmap));
/// assert!(node.try_install(seq, |shadow| shadow.0 = Some(frame)).is_err(), "the frame has moved: look again");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "dropping an interval removes it"]
#[doc(alias = "mmu_interval_notifier")]
pub struct IntervalNotifier<S: IntervalOps> {
    node: NonNull<Node<Mutex<S>>>,
    owns: PhantomData<Node<Mutex<S>>>,
}

// SAFETY: The box of the node moves. The box holds the state, which `IntervalOps` requires to be
// `Send`, behind a lock, and links that only holders of the lock of the intervals touch.
unsafe impl<S: IntervalOps> Send for IntervalNotifier<S> {}
// SAFETY: `&IntervalNotifier` reaches the state only through its lock, and the links only through
// the lock of the intervals.
unsafe impl<S: IntervalOps> Sync for IntervalNotifier<S> {}

/// The sequence that [`IntervalNotifier::read_begin`] returned.
#[must_use = "a sequence is what `try_install` compares"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadSeq(u64);

impl<S: IntervalOps> IntervalNotifier<S> {
    /// Subscribes to `range` of `mm`. If an invalidation is running, the interval may not be in the
    /// tree yet when this returns. So a reader must begin with [`read_begin`](Self::read_begin),
    /// which waits until the interval is in the tree.
    ///
    /// # Blocking
    /// Only the first insert on an address space sleeps: until the brackets open at that time have
    /// ended, and those opened later that it [may have to wait for](crate#what-a-wait-waits-for).
    /// # Errors
    /// [`InsertError`] with the state, if this is the first insert and this thread is inside a
    /// bracket of `mm`, holds its write lock (use [`insert_locked`](Self::insert_locked)) or runs a
    /// deferred free. Always if `mm` is the address space of a parent process.
    /// # Source
    /// `mmu_interval_notifier_insert`. Differs: empty ranges, overflow and dead address spaces
    /// cannot be passed, and there is no EINTR.
    #[doc(alias = "mmu_interval_notifier_insert")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn insert(mm: &MmWithUser, range: VaRange, state: S) -> Result<Self, InsertError<S>> {
        match mm.intervals().enable(mm) {
            Ok(()) => Ok(Self::insert_enabled(mm, range, state)),
            Err(error) => Err(InsertError { error, state }),
        }
    }

    /// Like [`insert`](Self::insert), for a caller that holds the write lock.
    ///
    /// # Blocking
    /// Blocks as `insert` does, but not for the lock.
    /// # Errors
    /// [`InsertError`] with the state, if this is the first insert and this thread has opened a
    /// bracket of the address space since it took the lock, or runs a deferred free. Always if the
    /// address space is that of a parent process.
    /// # Source
    /// `mmu_interval_notifier_insert_locked`, Linux 5.5.
    /// # Examples
    /// ```
    /// # #[global_allocator]
    /// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
    /// use mmu_notifier::{Finish, IntervalNotifier, IntervalOps, InvalidateRange, MmWithUser, VaRange};
    ///
    /// struct Grant;
    /// impl IntervalOps for Grant {
    ///     fn invalidate(&mut self, _: &InvalidateRange<'_>) -> Option<Finish> { None }
    /// }
    ///
    /// let mm = MmWithUser::new();
    /// let mut locked = mm.mmap_write_lock()?;
    /// let grant = IntervalNotifier::insert_locked(&mut locked, VaRange::ALL, Grant)?; // `insert` would wait for this thread.
    /// drop(locked);
    /// assert_eq!(grant.range(), VaRange::ALL);
    /// # Ok::<(), mmu_notifier::WouldDeadlock>(())
    /// ```
    #[doc(alias = "mmu_interval_notifier_insert_locked")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn insert_locked(
        locked: &mut MmapWriteGuard<'_>,
        range: VaRange,
        state: S,
    ) -> Result<Self, InsertError<S>> {
        match locked.intervals().enable_locked(locked) {
            Ok(()) => Ok(Self::insert_enabled(locked.mm(), range, state)),
            Err(error) => Err(InsertError { error, state }),
        }
    }

    /// The caller has enabled the intervals of `mm`.
    fn insert_enabled(mm: &MmWithUser, range: VaRange, state: S) -> Self {
        let node = Node::new((**mm).clone(), range, Mutex::new(state));
        let interval = Self {
            node,
            owns: PhantomData,
        };
        // SAFETY: The node is new, and `interval` keeps it until `detach` has succeeded.
        unsafe { mm.intervals().insert(&interval.node().header) };
        interval
    }

    fn node(&self) -> &Node<Mutex<S>> {
        // SAFETY: A reference needs a live node: this handle owns it.
        unsafe { self.node.as_ref() }
    }

    /// Returns the address space, which may have ended.
    #[must_use]
    pub fn mm(&self) -> &Mm {
        &self.node().mm
    }

    /// Returns the range that it was inserted with.
    ///
    /// # Source
    /// `interval_tree.start` and `interval_tree.last` of `struct mmu_interval_notifier`.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.node().header.range()
    }

    /// Waits until no invalidation of this interval is running, and returns its sequence.
    ///
    /// The sequence may be stale when it is returned; [`try_install`](Self::try_install) detects
    /// that. The caller must bound how often it retries, if it needs a bound.
    ///
    /// # Blocking
    /// Sleeps while an invalidation that met this interval runs. Inside a bracket of the same
    /// address space, and in a deferred free, the wait might be for this thread itself. If such an
    /// invalidation runs there, the call does not sleep, and returns a sequence that never matches.
    /// In the child of a fork, the sequence of a parent's interval never matches.
    /// # Source
    /// `mmu_interval_read_begin`.
    #[doc(alias = "mmu_interval_read_begin")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn read_begin(&self) -> ReadSeq {
        ReadSeq(self.node().read_begin())
    }

    /// Tells, without the state's lock, whether `seq` is stale.
    ///
    /// True is always reliable. False is a hint, unless the caller holds a lock that every callback
    /// of this interval takes as well: some drivers keep many intervals under one lock of their
    /// own. Under that lock, false is reliable too, because the sequence is stored before the
    /// callback runs:
    ///
    /// * If the callback takes that lock first, the caller sees the new sequence.
    /// * If the caller takes that lock first, the callback runs later and finds what the caller
    ///   installed under the lock.
    ///
    /// # Source
    /// `mmu_interval_check_retry` without that lock, `mmu_interval_read_retry` under it.
    /// # Examples
    /// ```
    /// # #[global_allocator]
    /// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
    /// use mmu_notifier::{Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, MmWithUser, VaRange};
    /// use std::sync::{Arc, Mutex};
    ///
    /// /// One table of the device for all of its buffers.
    /// type Table = Arc<Mutex<[Option<u64>; 64]>>;
    /// struct Buffer(usize, Table);
    /// impl IntervalOps for Buffer {
    ///     fn invalidate(&mut self, _: &InvalidateRange<'_>) -> Option<Finish> {
    ///         self.1.lock().unwrap()[self.0] = None;
    ///         None
    ///     }
    /// }
    ///
    /// let (mm, table) = (MmWithUser::new(), Table::new(Mutex::new([None; 64])));
    /// let buffer = IntervalNotifier::insert(&mm, VaRange::ALL, Buffer(7, Arc::clone(&table)))?;
    /// loop {
    ///     let seq = buffer.read_begin();
    ///     let frame = 42; // Looked up here, however long it takes.
    ///     let mut entries = table.lock().unwrap();
    ///     if !buffer.check_retry(seq) {
    ///         entries[7] = Some(frame); // The lock may be held on, for other buffers.
    ///         break;
    ///     }
    /// }
    /// drop(mm.invalidate(VaRange::ALL, Event::Unmap));
    /// assert_eq!(table.lock().unwrap()[7], None);
    /// # Ok::<(), mmu_notifier::WouldDeadlock>(())
    /// ```
    #[doc(alias = "mmu_interval_read_retry")]
    #[doc(alias = "mmu_interval_check_retry")]
    #[must_use]
    pub fn check_retry(&self, seq: ReadSeq) -> bool {
        self.node().header.seq() != seq.0
    }

    /// Runs `install` on the locked state, if the range was not invalidated since `seq` was read.
    ///
    /// `install` must not change this address space's mappings, because the callback for that
    /// change would wait for the lock that `install` holds. With an in-process source, freeing a
    /// large block of memory changes mappings too.
    ///
    /// # Blocking
    /// Sleeps while a callback of this interval or another `install` holds the lock.
    /// # Errors
    /// [`Retry`] if the range was invalidated; `install` was not run.
    /// # Source
    /// `mmu_interval_read_retry`. Differs: the lock and the comparison are one.
    #[doc(alias = "mmu_interval_read_retry")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn try_install<R>(
        &self,
        seq: ReadSeq,
        install: impl FnOnce(&mut S) -> R,
    ) -> Result<R, Retry> {
        if self.check_retry(seq) {
            return Err(Retry);
        }
        let _held = lockdep::holds_state(self.mm().id());
        let mut state = lock(&self.node().state);
        if self.node().header.seq() == seq.0 {
            Ok(install(&mut state))
        } else {
            Err(Retry)
        }
    }

    /// Runs `f` on the locked state, whatever its sequence is: to use what is cached, or to drop
    /// it.
    ///
    /// `f` must obey the same rule as `install` in [`try_install`](Self::try_install).
    ///
    /// # Blocking
    /// Sleeps while a callback of this interval or an `install` holds the lock.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn with_state<R>(&self, f: impl FnOnce(&mut S) -> R) -> R {
        let _held = lockdep::holds_state(self.mm().id());
        f(&mut lock(&self.node().state))
    }

    /// Unsubscribes, waits until no callback of this interval can run, and hands the state back.
    ///
    /// # Blocking
    /// Sleeps while an invalidation that met any interval of this address space runs.
    /// # Errors
    /// [`RemoveError`] with the interval, unchanged, if the removal would have to wait and this
    /// thread is inside a bracket or callback of the address space or runs a deferred free. Always
    /// if the address space is that of a parent process.
    /// # Source
    /// `mmu_interval_notifier_remove`. Differs: the state comes back; a wait for the caller's own
    /// thread is an error.
    /// # Examples
    /// ```
    /// # #[global_allocator]
    /// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
    /// # use mmu_notifier::*;
    /// # struct Cache(Option<u64>); // Of a fixed size: it is changed under the lock.
    /// # impl IntervalOps for Cache {
    /// #     fn invalidate(&mut self, _: &InvalidateRange<'_>) -> Option<Finish> { self.0 = None; None }
    /// # }
    /// let mm = MmWithUser::new();
    /// let node = IntervalNotifier::insert(&mm, VaRange::ALL, Cache(None))?;
    /// let seq = node.read_begin();
    /// assert!(!node.check_retry(seq));
    /// node.with_state(|cache| cache.0 = Some(8));
    /// let bracket = mm.invalidate(VaRange::ALL, Event::Unmap);
    /// assert!(node.check_retry(seq));
    /// let refused = node.remove().err().expect("it would wait for the bracket of this thread");
    /// drop(bracket);
    /// let cache = refused.interval.remove()?;
    /// assert_eq!(cache.0, None);
    /// # Ok::<(), WouldDeadlock>(())
    /// ```
    #[doc(alias = "mmu_interval_notifier_remove")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn remove(self) -> Result<S, RemoveError<S>> {
        if !self.detach() {
            return Err(RemoveError {
                error: WouldDeadlock,
                interval: self,
            });
        }
        // SAFETY: A `Box` needs the unique pointer that came from one: `new` leaked it to this
        // handle, which is not dropped, and after `detach` the node is in no tree, no list and no
        // walk.
        let node = unsafe { Box::from_raw(ManuallyDrop::new(self).node.as_ptr()) };
        Ok(crate::sync::into_inner(node.state))
    }

    #[cfg_attr(debug_assertions, track_caller)]
    fn detach(&self) -> bool {
        // SAFETY: The handle exists, so the node was inserted and is not removed: `remove` and drop
        // consume the handle once this returns true, and false leaves the node as it was.
        unsafe { self.node().detach() }
    }
}

impl<S: IntervalOps> Drop for IntervalNotifier<S> {
    fn drop(&mut self) {
        if self.detach() {
            // SAFETY: A `Box` needs the unique pointer that came from one. `new` leaked it to this
            // handle, whose drop this is, and after `detach` no other code has the pointer.
            drop(unsafe { Box::from_raw(self.node.as_ptr()) });
        } else if !self.mm().is_inherited() {
            let again = Self {
                node: self.node,
                owns: PhantomData,
            };
            let mm = again.mm().clone();
            // The reclaimer must not sleep until a window closes either. If a window is open then,
            // the drop of `again` comes to this line once more, and the removal waits for another
            // grace period.
            mm.subscriptions().srcu().call(move || {
                let mm = again.mm().clone();
                context::freeing(|| {
                    mm.catching(|| drop(again));
                    drop(mm);
                });
            });
        }
    }
}

impl<S: IntervalOps> fmt::Debug for IntervalNotifier<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntervalNotifier")
            .field("mm", self.mm())
            .finish_non_exhaustive()
    }
}
