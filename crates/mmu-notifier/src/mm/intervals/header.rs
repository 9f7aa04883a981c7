//! The part of an interval that the tree links and a bracket calls.
//!
//! `in_tree` and `deferred_next` are used only under the lock of the address space's intervals.
//! The two are atomics only to avoid `unsafe` code.

use super::Finish;
use super::tree::Tree;
use crate::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use crate::{InvalidateRange, VaRange, WouldBlock};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};

/// The part of an interval that does not depend on the type of its state.
///
/// # Invariants
/// The header is the first field of a `Node<L>`, and `state` points to that node's `state`.
pub(crate) struct Header {
    range: VaRange,
    in_tree: AtomicBool,
    deferred_next: AtomicPtr<Header>,
    /// The sequence of the last window that met this interval or was open at its insert, or of an
    /// earlier window if there was none. Always odd. A callback stores it under the state's lock.
    invalidate_seq: AtomicU64,
    state: NonNull<dyn Callback>,
}

/// The state's lock and callback, without the state's type.
pub(crate) trait Callback {
    fn invalidate(
        &self,
        node: &Header,
        seq: u64,
        range: &InvalidateRange<'_>,
    ) -> Result<Option<Finish>, WouldBlock>;
}

impl Header {
    /// Makes the header of an interval that is in no tree.
    ///
    /// # Safety
    /// `state` must be the state of the node whose first field the header becomes.
    pub(crate) unsafe fn new(range: VaRange, state: NonNull<dyn Callback>) -> Self {
        // INVARIANT: `state` points to the state of its own node, as the caller promises.
        Self {
            range,
            in_tree: AtomicBool::new(false),
            deferred_next: AtomicPtr::new(ptr::null_mut()),
            invalidate_seq: AtomicU64::new(1),
            state,
        }
    }

    pub(crate) fn range(&self) -> VaRange {
        self.range
    }

    pub(crate) fn seq(&self) -> u64 {
        self.invalidate_seq.load(Ordering::Relaxed)
    }

    pub(crate) fn set_seq(&self, seq: u64) {
        self.invalidate_seq.store(seq, Ordering::Relaxed);
    }

    /// Calls the interval's callback. If it panics, counts the panic and returns as if the callback
    /// had accepted.
    pub(super) fn invalidate(
        &self,
        seq: u64,
        range: &InvalidateRange<'_>,
    ) -> Result<Option<Finish>, WouldBlock> {
        // SAFETY: The pointee must be alive and not mutably borrowed: it lies in the same node
        // (invariant), and is a lock, which is used by shared reference only.
        let state = unsafe { self.state.as_ref() };
        catch_unwind(AssertUnwindSafe(|| state.invalidate(self, seq, range))).unwrap_or_else(
            |panic| {
                range.mm.count_panic(panic);
                Ok(None)
            },
        )
    }

    /// Tells whether the node is in the tree. The caller holds the lock.
    pub(crate) fn is_in_tree(&self) -> bool {
        self.in_tree.load(Ordering::Relaxed)
    }

    /// Returns how many spare nodes the tree needs to insert this node.
    pub(super) fn need(&self, tree: &Tree<Self>) -> usize {
        tree.need(self.range, NonNull::from(self))
    }

    /// Removes the node if the tree contains it, and inserts it otherwise. The caller holds the
    /// lock, and no thread walks the tree.
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
        // SAFETY: A reference needs a live node, and the caller promises that the nodes on the list
        // are alive.
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
