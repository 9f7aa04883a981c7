//! Callbacks whose memory the caller provides.

use super::Srcu;
use crate::raw::callback::{Head, push, push_behind};
use crate::raw::reclaimer;
use crate::raw::state::{State, inbox};
use std::ptr::NonNull;

impl Srcu {
    /// Calls `f(head)` on the background thread once all sections that are open now have ended. (If
    /// the system gives no thread, [`Srcu::barrier`] calls it.)
    ///
    /// For objects that embed their [`Head`]. After [`Srcu::prepare`] the call allocates nothing,
    /// takes no lock and never blocks. It may be made inside sections and callbacks. Callbacks of
    /// one domain run in the order in which they were queued. A panic in `f` is caught, as for
    /// [`Srcu::call`].
    ///
    /// # Safety
    /// * `head` stays valid, and no other code touches it or queues it again, until `f` has been
    ///   called with it.
    /// * Calling `f(head)` on another thread, at any later time, is sound.
    ///
    /// # Source
    /// `call_srcu`, kernel/rcu/srcutree.c. Differs: callbacks of a domain run in order, in one
    /// thread, and may sleep, which delays all others.
    ///
    /// # Examples
    /// ```
    /// use srcu::{Head, Srcu};
    /// use std::ptr::NonNull;
    ///
    /// #[repr(C)]
    /// struct Node {
    ///     head: Head,
    ///     value: String,
    /// }
    ///
    /// unsafe fn free(head: NonNull<Head>) {
    ///     // SAFETY: The head is the first field of a node that came from `Box::leak` below, and is given back once.
    ///     drop(unsafe { Box::from_raw(head.cast::<Node>().as_ptr()) });
    /// }
    ///
    /// let srcu = Srcu::new();
    /// srcu.prepare();
    /// let node = Box::leak(Box::new(Node { head: Head::new(), value: "old".into() }));
    /// // ... readers find the node; then it is unlinked ...
    /// // SAFETY: The node is unlinked and lives until `free`; a `String` may be dropped on any thread.
    /// unsafe { srcu.call_raw(NonNull::from(node).cast(), free) };
    /// srcu.barrier().unwrap();
    /// ```
    #[doc(alias = "call_srcu")]
    pub unsafe fn call_raw(&self, head: NonNull<Head>, f: unsafe fn(NonNull<Head>)) {
        debug_assert_not_queued(head);
        let state = self.state();
        // SAFETY: `push` has the rules that the caller of this function follows.
        if unsafe { push(&state.pending.queue, head, f) } {
            inbox::schedule(state);
            reclaimer::start_unless_forked();
        }
    }

    /// Like [`call_raw`](Self::call_raw), but `f` may drop the domain itself, possibly before this
    /// call returns.
    ///
    /// This call costs two more atomic read-modify-writes if no callback is queued yet. It never
    /// blocks, and never allocates once the domain is prepared.
    ///
    /// # Safety
    /// The caller must follow the rules of [`call_raw`](Self::call_raw), and must not use the
    /// domain afterwards unless another owner keeps it alive: `f` may have dropped it.
    pub unsafe fn call_raw_dropping(&self, head: NonNull<Head>, f: unsafe fn(NonNull<Head>)) {
        debug_assert_not_queued(head);
        let state = NonNull::from(self.state());
        // SAFETY: until the push, the borrowed domain keeps its state alive. From `retain` on, the
        // count taken here does.
        let alive = unsafe { state.as_ref() };
        // SAFETY: `push_behind` has the rules that the caller of this function follows.
        if unsafe { push_behind(&alive.pending.queue, head, f) } {
            // The push that found the queue empty schedules the domain. The domain may be gone
            // already.
            return;
        }
        alive.retain();
        // SAFETY: `push` has the rules that the caller follows, and `push_behind` has not queued
        // the head.
        if unsafe { push(&alive.pending.queue, head, f) } {
            inbox::schedule(alive);
            reclaimer::start_unless_forked();
        }
        // SAFETY: releases the count taken above. The state is not used afterwards.
        unsafe { State::release(state.as_ptr()) };
    }
}

/// Detects a caller that queues a head twice. In builds without debug assertions, does nothing.
fn debug_assert_not_queued(head: NonNull<Head>) {
    // SAFETY: the head must be valid, which the caller promises.
    let idle = !unsafe { head.as_ref() }.is_queued();
    debug_assert!(
        idle,
        "a callback's head was queued again before its function was called"
    );
}
