//! Callbacks whose memory the caller gives.

use super::Srcu;
use crate::raw::callback::{Head, push, push_behind};
use crate::raw::reclaimer;
use crate::raw::state::{State, inbox};
use std::ptr::NonNull;

impl Srcu {
    /// Calls `f(head)` on the reclaimer thread once all sections that are open now have ended.
    ///
    /// For objects that embed their [`Head`]. After [`Srcu::prepare`] it allocates nothing, takes
    /// no lock and never blocks; it may be called inside sections and callbacks. Callbacks of one
    /// domain run in the order in which they were queued. A panic in `f` is caught, as for
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
        // SAFETY: `push` wants what the caller promised to us.
        if unsafe { push(&state.pending.queue, head, f) } {
            inbox::schedule(state);
            reclaimer::start_unless_forked();
        }
    }

    /// The same as [`call_raw`](Self::call_raw), where `f` may drop the domain itself, which it can
    /// do before this returns.
    ///
    /// Two atomic read-modify-writes dearer if nothing is queued yet. Never blocks, and never
    /// allocates once the domain is prepared.
    ///
    /// # Safety
    /// As [`call_raw`](Self::call_raw). The domain may be gone when this returns.
    pub unsafe fn call_raw_dropping(&self, head: NonNull<Head>, f: unsafe fn(NonNull<Head>)) {
        debug_assert_not_queued(head);
        let state = NonNull::from(self.state());
        // SAFETY: The domain is borrowed and keeps its state until the push; from `retain` on, our
        // own count does.
        let alive = unsafe { state.as_ref() };
        // SAFETY: `push_behind` wants what the caller promised to us.
        if unsafe { push_behind(&alive.pending.queue, head, f) } {
            // The push that found the queue empty schedules the domain, which may be gone already.
            return;
        }
        alive.retain();
        // SAFETY: `push` wants what the caller promised to us, and `push_behind` has not queued it.
        if unsafe { push(&alive.pending.queue, head, f) } {
            inbox::schedule(alive);
            reclaimer::start_unless_forked();
        }
        // SAFETY: Gives up the count taken above; the state is used no more.
        unsafe { State::release(state.as_ptr()) };
    }
}

/// For callers of `call_raw` that break their promise.
fn debug_assert_not_queued(head: NonNull<Head>) {
    // SAFETY: The head must be valid: their promise.
    let idle = !unsafe { head.as_ref() }.is_queued();
    debug_assert!(
        idle,
        "a callback's head was queued again before its function was called"
    );
}
