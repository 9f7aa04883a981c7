//! Intervals in memory that a C caller provides. The caller also provides the lock and checks the
//! sequence.

use super::Finish;
use super::node::Node;
use crate::mm::intervals::{Callback, Header};
use crate::{InvalidateRange, Mm, MmWithUser, MmapWriteGuard, VaRange, WouldBlock, WouldDeadlock};
use std::fmt;
use std::ptr::{self, NonNull};

/// The callback of an interval, for when its range is invalidated. The callback must take the
/// caller's lock and store `seq` with [`Interval::set_seq`] in every call, before it drops
/// anything: otherwise a reader that looked up before would not retry.
///
/// # Source
/// `struct mmu_interval_notifier_ops`, Linux 5.5.
pub trait RawIntervalOps: Send + Sync + 'static {
    /// Drops everything that `range` covers.
    ///
    /// # Blocking
    /// May sleep unless the range forbids it.
    /// # Errors
    /// [`WouldBlock`] if the subscriber would have to sleep and the range forbids it.
    fn invalidate(&self, range: &InvalidateRange<'_>, seq: u64) -> Result<(), WouldBlock>;
}

/// The state of a raw interval, as the tree calls it.
#[repr(transparent)]
struct State<T>(T);

impl<T: RawIntervalOps> Callback for State<T> {
    fn invalidate(
        &self,
        _: &Header,
        seq: u64,
        range: &InvalidateRange<'_>,
    ) -> Result<Option<Finish>, WouldBlock> {
        self.0.invalidate(range, seq).map(|()| None)
    }
}

/// The memory of one interval. The user of the interval holds a lock of its own around
/// [`set_seq`](Self::set_seq) and [`read_retry`](Self::read_retry).
#[repr(C)]
pub struct Interval<T>(Node<State<T>>);

impl<T: RawIntervalOps> Interval<T> {
    /// Makes an interval of `range` at `place` and inserts it, as
    /// [`IntervalNotifier::insert`](crate::IntervalNotifier::insert) does.
    ///
    /// # Blocking
    /// Only the first insert on an address space sleeps: until the brackets open at that time have
    /// ended, and those opened later that it [may have to wait for](crate#what-a-wait-waits-for).
    /// # Errors
    /// [`WouldDeadlock`] if this is the first insert and this thread is inside a bracket of `mm`,
    /// holds its write lock, or runs a deferred free. Always if `mm` is the address space of a
    /// parent process. Nothing was written.
    /// # Safety
    /// `place` must be valid for writes and aligned, and stay valid, at its place and untouched by
    /// other code until [`remove`](Self::remove) has succeeded.
    /// # Source
    /// `mmu_interval_notifier_insert`, Linux 5.5.
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn insert(
        place: NonNull<Self>,
        mm: &MmWithUser,
        range: VaRange,
        ops: T,
    ) -> Result<(), WouldDeadlock> {
        mm.intervals().enable(mm)?;
        // SAFETY: `place` must be valid for writes, aligned, and kept until `remove`. The caller
        // promises that.
        unsafe { Self::insert_enabled(place, mm, range, ops) };
        Ok(())
    }

    /// Like [`insert`](Self::insert), for a caller that holds the write lock.
    ///
    /// # Blocking
    /// Blocks as `insert` does.
    /// # Errors
    /// [`WouldDeadlock`] if this is the first insert and this thread has opened a bracket of the
    /// address space since it took the lock, or runs a deferred free. Always if the address space
    /// is that of a parent process.
    /// # Safety
    /// As for `insert`.
    /// # Source
    /// `mmu_interval_notifier_insert_locked`, Linux 5.5.
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn insert_locked(
        place: NonNull<Self>,
        locked: &mut MmapWriteGuard<'_>,
        range: VaRange,
        ops: T,
    ) -> Result<(), WouldDeadlock> {
        locked.mm().intervals().enable_locked(locked)?;
        // SAFETY: `place` must be valid for writes, aligned, and kept until `remove`. The caller
        // promises that.
        unsafe { Self::insert_enabled(place, locked.mm(), range, ops) };
        Ok(())
    }

    /// # Safety
    /// As for `insert`.
    unsafe fn insert_enabled(place: NonNull<Self>, mm: &MmWithUser, range: VaRange, ops: T) {
        let node: NonNull<Node<State<T>>> = place.cast();
        // SAFETY: The place must be valid for writes, which the caller promises.
        unsafe { Node::write(node, (**mm).clone(), range, State(ops)) };
        // SAFETY: A reference needs a live node: it was written above.
        let node = unsafe { node.as_ref() };
        // SAFETY: The node must be new, and must stay until it is removed. It was written above,
        // and the caller keeps it.
        unsafe { mm.intervals().insert(&node.header) };
    }

    /// Removes the interval, waits until no callback of it can run, and drops its operations. Then
    /// the memory is the caller's again.
    ///
    /// # Blocking
    /// Sleeps while an invalidation that met any interval of this address space runs.
    /// # Errors
    /// [`WouldDeadlock`] if the removal would have to wait and this thread is inside a bracket or
    /// callback of the address space or runs a deferred free. Always if the address space is that
    /// of a parent process. Nothing has changed then.
    /// # Safety
    /// `interval` must be inserted, and no thread may use it afterwards.
    /// # Source
    /// `mmu_interval_notifier_remove`, Linux 5.5.
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn remove(interval: NonNull<Self>) -> Result<(), WouldDeadlock> {
        let node = interval.cast::<Node<State<T>>>();
        // SAFETY: The node must be alive. The caller promises that it is inserted, so it is.
        let inserted = unsafe { node.as_ref() };
        // SAFETY: The node must be inserted and not detached, which the caller promises.
        if !unsafe { inserted.detach() } {
            return Err(WouldDeadlock);
        }
        // SAFETY: Moving out needs a place that no thread uses any more. After `detach`, the node
        // is in no tree, no list and no walk, and the caller promises that no thread uses it
        // afterwards.
        drop(unsafe { ptr::read(node.as_ptr()) });
        Ok(())
    }

    /// Waits until no invalidation of this interval is running, and returns its sequence. Returns
    /// zero, which never matches, if there is an invalidation to wait for and this thread must not
    /// wait, and in the child of a fork. See
    /// [`IntervalNotifier::read_begin`](crate::IntervalNotifier::read_begin).
    ///
    /// # Blocking
    /// Sleeps while an invalidation that met this interval runs.
    /// # Source
    /// `mmu_interval_read_begin`, Linux 5.5.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn read_begin(&self) -> u64 {
        self.0.read_begin()
    }

    /// Tells whether the range was invalidated since `seq` was read. Reliable under the user's
    /// lock. Without the lock, true is reliable and false is a hint.
    ///
    /// # Source
    /// `mmu_interval_read_retry`, `mmu_interval_check_retry`, Linux 5.5.
    #[must_use]
    pub fn read_retry(&self, seq: u64) -> bool {
        self.0.header.seq() != seq
    }

    /// Stores the sequence that a callback was given, under the user's lock.
    ///
    /// # Source
    /// `mmu_interval_set_seq`, Linux 5.5.
    pub fn set_seq(&self, seq: u64) {
        self.0.header.set_seq(seq);
    }

    /// Returns the address space, which may have ended.
    #[must_use]
    pub fn mm(&self) -> &Mm {
        &self.0.mm
    }
}

impl<T> fmt::Debug for Interval<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interval")
            .field("mm", &self.0.mm)
            .finish_non_exhaustive()
    }
}
