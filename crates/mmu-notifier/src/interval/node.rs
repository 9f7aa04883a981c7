//! One interval in memory.
//!
//! # Safety
//! A node is one `Box<Node<Mutex<S>>>` that its `IntervalNotifier` owns as a pointer, or lies in
//! memory that a caller of [`raw`](crate::raw) provides.

use super::{Finish, IntervalOps};
use crate::mm::intervals::{Callback, Header, Removal};
use crate::sync::{Mutex, mutant};
use crate::{Blocking, InvalidateRange, Mm, VaRange, WouldBlock, lockdep};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::{PoisonError, TryLockError};

#[repr(C)]
pub(super) struct Node<L> {
    pub(super) header: Header,
    pub(super) state: L,
    pub(super) mm: Mm,
}

impl<S: IntervalOps> Callback for Mutex<S> {
    fn invalidate(
        &self,
        node: &Header,
        seq: u64,
        range: &InvalidateRange<'_>,
    ) -> Result<Option<Finish>, WouldBlock> {
        let mut state = match range.blocking {
            Blocking::Allowed => crate::sync::lock(self),
            Blocking::Forbidden => match self.try_lock() {
                Ok(state) => state,
                Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
                Err(TryLockError::WouldBlock) => return Err(WouldBlock),
            },
        };
        // The sequence is always stored, and before the callback: a reader that looked up before
        // this window must not install the result.
        if !mutant("callback_without_seq") {
            node.set_seq(seq);
        }
        let _callback = crate::lockdep::callback::<S>("invalidate");
        match range.blocking {
            Blocking::Allowed => Ok(state.invalidate(range)),
            Blocking::Forbidden => state.try_invalidate(range),
        }
    }
}

impl<L: Callback + 'static> Node<L> {
    /// Makes a node that is in no tree, and leaks its box. The caller owns the node.
    pub(super) fn new(mm: Mm, range: VaRange, state: L) -> NonNull<Self> {
        let node = NonNull::from(Box::leak(Box::new(MaybeUninit::<Self>::uninit()))).cast();
        // SAFETY: The place must be valid for writes: it is the box leaked above.
        unsafe { Self::write(node, mm, range, state) };
        node
    }

    /// Makes a node that is in no tree at `node`.
    ///
    /// # Safety
    /// `node` must be valid for writes, aligned, and not in use.
    pub(super) unsafe fn write(node: NonNull<Self>, mm: Mm, range: VaRange, state: L) {
        // SAFETY: The place must be within a live allocation, which the caller promises. This makes
        // no reference.
        let place: *mut dyn Callback = unsafe { &raw mut (*node.as_ptr()).state };
        let place = NonNull::new(place).expect("the address of a field is not null");
        // SAFETY: `place` must be the state of the header's own node: `place` is a field of the
        // node that is written below.
        let header = unsafe { Header::new(range, place) };
        // SAFETY: The place must be valid for writes, which the caller promises.
        unsafe { node.write(Self { header, state, mm }) };
    }

    /// Waits until no invalidation of this interval is running, and returns its sequence. Returns
    /// [`NEVER`] if there is an invalidation to wait for and this thread must not wait, and in the
    /// child of a fork.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(super) fn read_begin(&self) -> u64 {
        if self.mm.is_inherited() {
            return NEVER;
        }
        let intervals = self.mm.intervals();
        let (seq, invalidating) = intervals.read(&self.header);
        if invalidating {
            if self.mm.would_deadlock() {
                return NEVER;
            }
            lockdep::might_wait(Some(self.mm.id()));
            intervals.wait_past(seq);
        }
        seq
    }

    /// Takes the node off the tree and waits until no thread can be in its callback. Returns false,
    /// and changes nothing, if this thread would wait for itself, or if the node belongs to the
    /// parent of a fork.
    ///
    /// # Safety
    /// The node must have been inserted, and not successfully detached before.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(super) unsafe fn detach(&self) -> bool {
        if self.mm.is_inherited() {
            return false;
        }
        let intervals = self.mm.intervals();
        let may_wait = !self.mm.would_deadlock();
        if may_wait {
            lockdep::might_wait(Some(self.mm.id()));
        }
        // SAFETY: The node must be inserted and not removed, which the caller promises.
        match unsafe { intervals.remove(&self.header, may_wait) } {
            Removal::Done => true,
            Removal::Refused => false,
            Removal::Deferred(seq) => {
                intervals.wait_past(seq);
                // Fails if the sequence changed before the deferred changes were made. The check is
                // cheap, and without it that failure would be a use after free.
                assert!(
                    !self.header.is_in_tree(),
                    "the window closed and the interval is still in the tree"
                );
                true
            }
        }
    }
}

/// A sequence that no node has, because a node's sequence is always odd.
const NEVER: u64 = 0;
