//! One interval in memory.
//!
//! # Safety
//! A node is one `Box<Node<Mutex<S>>>` that its `IntervalNotifier` owns as a pointer, or lies in
//! memory that a caller of [`raw`](crate::raw) provides. `in_tree` and `deferred_next` are used
//! only under the lock of the address space's intervals. They are atomics only to avoid `unsafe`
//! code.

use super::tree::Tree;
use super::window::Removal;
use super::{Finish, IntervalOps};
use crate::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use crate::sync::{Mutex, mutant};
use crate::{Blocking, InvalidateRange, Mm, VaRange, WouldBlock, lockdep};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::sync::{PoisonError, TryLockError};

/// The part of an interval that does not depend on the type of its state.
///
/// # Invariants
/// It is the first field of a `Node<L>`, and `state` points to the `state` of that node.
pub(super) struct Header {
    range: VaRange,
    in_tree: AtomicBool,
    deferred_next: AtomicPtr<Header>,
    /// The sequence of the last window that met this interval; always odd. Stored under the state's
    /// lock.
    invalidate_seq: AtomicU64,
    state: NonNull<dyn Callback>,
}

#[repr(C)]
pub(super) struct Node<L> {
    pub(super) header: Header,
    pub(super) state: L,
    pub(super) mm: Mm,
}

/// The state's lock and callback, without the state's type.
pub(super) trait Callback {
    fn invalidate(
        &self,
        node: &Header,
        seq: u64,
        range: &InvalidateRange<'_>,
    ) -> Result<Option<Finish>, WouldBlock>;
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
        // Always stored, and before the callback: a reader that looked up before this window must
        // not install the result.
        if !mutant("callback_without_seq") {
            node.invalidate_seq.store(seq, Ordering::Relaxed);
        }
        let _callback = crate::lockdep::callback::<S>("invalidate");
        match range.blocking {
            Blocking::Allowed => Ok(state.invalidate(range)),
            Blocking::Forbidden => state.try_invalidate(range),
        }
    }
}

impl<L: Callback + 'static> Node<L> {
    /// Makes a node that is in no tree, and leaks its box. The caller owns it.
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
        // SAFETY: The place must be within a live allocation: the caller's duty. No reference is
        // made.
        let place: *mut dyn Callback = unsafe { &raw mut (*node.as_ptr()).state };
        let header = Header {
            range,
            in_tree: AtomicBool::new(false),
            deferred_next: AtomicPtr::new(ptr::null_mut()),
            invalidate_seq: AtomicU64::new(1),
            state: NonNull::new(place).expect("the address of a field is not null"),
        };
        // INVARIANT: `state` points to the state of its own node.
        // SAFETY: The place must be valid for writes: the caller's duty.
        unsafe { node.write(Self { header, state, mm }) };
    }

    /// Waits until no invalidation of this interval is running, and returns its sequence. Returns
    /// [`NEVER`] if this thread must not wait.
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
            lockdep::might_wait(Some(&self.mm));
            intervals.wait_past(seq);
        }
        seq
    }

    /// Takes the node off the tree and waits until no thread can be in its callback. Returns false,
    /// and changes nothing, if this thread would wait for itself.
    ///
    /// # Safety
    /// The node must have been inserted, and not detached before with success.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(super) unsafe fn detach(&self) -> bool {
        if self.mm.is_inherited() {
            return false;
        }
        let intervals = self.mm.intervals();
        let may_wait = !self.mm.would_deadlock();
        if may_wait {
            lockdep::might_wait(Some(&self.mm));
        }
        // SAFETY: The node must be inserted and not removed: the caller's duty.
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

/// A sequence that matches no node's, because theirs are always odd.
const NEVER: u64 = 0;

impl Header {
    pub(super) fn range(&self) -> VaRange {
        self.range
    }

    pub(super) fn seq(&self) -> u64 {
        self.invalidate_seq.load(Ordering::Relaxed)
    }

    pub(super) fn set_seq(&self, seq: u64) {
        self.invalidate_seq.store(seq, Ordering::Relaxed);
    }

    /// Calls the interval's callback. A panic in it is counted, and the call counts as done.
    pub(super) fn invalidate(
        &self,
        seq: u64,
        range: &InvalidateRange<'_>,
    ) -> Result<Option<Finish>, WouldBlock> {
        // SAFETY: The pointee must be alive and not mutably borrowed: it is a part of the same node
        // (invariant), and a lock.
        let state = unsafe { self.state.as_ref() };
        catch_unwind(AssertUnwindSafe(|| state.invalidate(self, seq, range))).unwrap_or_else(
            |panic| {
                range.mm.count_panic(panic);
                Ok(None)
            },
        )
    }

    /// Tells whether the node is in the tree. The caller holds the lock.
    pub(super) fn is_in_tree(&self) -> bool {
        self.in_tree.load(Ordering::Relaxed)
    }

    /// Returns how many spare nodes the tree needs to insert this node.
    pub(super) fn need(&self, tree: &Tree<Self>) -> usize {
        tree.need(self.range, NonNull::from(self))
    }

    /// Inserts the node into the tree if it is not in it, and removes it otherwise. The caller
    /// holds the lock, and no thread walks the tree.
    pub(super) fn toggle(&self, tree: &mut Tree<Self>) {
        if self.in_tree.fetch_xor(true, Ordering::Relaxed) {
            tree.remove(self.range, NonNull::from(self));
        } else {
            tree.insert(self.range, NonNull::from(self));
        }
    }

    /// Pushes the node to the front of the deferred list, and returns the new front. The caller
    /// holds the lock.
    pub(super) fn defer(&self, front: *mut Self) -> *mut Self {
        self.deferred_next.store(front, Ordering::Relaxed);
        ptr::from_ref(self).cast_mut()
    }

    /// Takes this front node off the deferred list, and returns the next. The caller holds the
    /// lock.
    pub(super) fn take_deferred(&self) -> *mut Self {
        self.deferred_next.swap(ptr::null_mut(), Ordering::Relaxed)
    }

    /// Takes this node off the deferred list, at any position, and returns the new front.
    ///
    /// # Safety
    /// The lock must be held, and `front` must be null or the front of the list, whose nodes are
    /// all alive.
    pub(super) unsafe fn undefer(&self, front: *mut Self) -> *mut Self {
        if ptr::eq(front, self) {
            return self.take_deferred();
        }
        let mut at = front;
        // SAFETY: Nodes on the list are alive: the caller's duty.
        while let Some(node) = unsafe { at.as_ref() } {
            at = node.deferred_next.load(Ordering::Relaxed);
            if ptr::eq(at, self) {
                node.deferred_next
                    .store(self.take_deferred(), Ordering::Relaxed);
            }
        }
        front
    }
}
