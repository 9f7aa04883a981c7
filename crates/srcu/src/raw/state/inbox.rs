//! The inbox: the domains that have work for the reclaimer, linked through their states.
//!
//! # Safety
//! # Invariants
//! Each pointer in the inbox holds one count of its state.

use super::State;
use crate::raw::event::Event;
use crate::sync::{AtomicPtr, Ordering};
use std::ptr::{self, NonNull};

pub(crate) struct Inbox {
    /// The domains that were added, the latest first.
    pushed: AtomicPtr<State>,
    /// The domains that the reclaimer took over, the earliest first. Only the reclaimer accesses
    /// this list. The list is not on the reclaimer's stack, so that the child of a fork finds it.
    taken: AtomicPtr<State>,
    pub(in crate::raw) event: Event,
    /// Models have no reclaimer thread: the threads that wait for callbacks act as the reclaimer,
    /// one at a time.
    #[cfg(mmun_loom)]
    pub(in crate::raw) acting: crate::raw::lock::Lock<()>,
}

#[cfg(not(mmun_loom))]
pub(in crate::raw) static INBOX: Inbox = Inbox::new();

#[cfg(not(mmun_loom))]
fn inbox(_: &State) -> &'static Inbox {
    &INBOX
}

#[cfg(mmun_loom)]
fn inbox(state: &State) -> &Inbox {
    &state.inbox
}

/// Puts a domain into the inbox if it is not there, and wakes the reclaimer.
pub(crate) fn schedule(state: &State) {
    // ORDER(srcu-scheduled): AcqRel. If `scheduled` was already set, the reclaimer's swap reads
    // this store, and so the reclaimer sees the work that was added before it. Partner: the swap in
    // `turn`. Model: loom `a_barrier_waits_for_the_calls_of_both_threads`.
    if state.pending.scheduled.swap(true, Ordering::AcqRel) {
        return;
    }
    state.retain();
    // INVARIANT: the count just taken belongs to the pointer in the inbox.
    let inbox = inbox(state);
    let mut latest = inbox.pushed.load(Ordering::Relaxed);
    loop {
        state.pending.next.store(latest, Ordering::Relaxed);
        let this = ptr::from_ref(state).cast_mut();
        // ORDER(srcu-inbox): Release, for the link. Partner: the Acquire in `take`.
        match inbox
            .pushed
            .compare_exchange_weak(latest, this, Ordering::Release, Ordering::Relaxed)
        {
            Ok(_) => break,
            Err(later) => latest = later,
        }
    }
    inbox.event.advance();
}

impl Inbox {
    #[cfg(not(mmun_loom))]
    const fn new() -> Self {
        Self {
            pushed: AtomicPtr::new(ptr::null_mut()),
            taken: AtomicPtr::new(ptr::null_mut()),
            event: Event::new(),
        }
    }

    #[cfg(mmun_loom)]
    pub(super) fn new() -> Self {
        Self {
            pushed: AtomicPtr::new(ptr::null_mut()),
            taken: AtomicPtr::new(ptr::null_mut()),
            event: Event::new(),
            acting: crate::raw::lock::Lock::new(()),
        }
    }

    /// Tells whether no domain was added since the reclaimer last took the list over.
    #[cfg(not(mmun_loom))]
    pub(in crate::raw) fn is_empty(&self) -> bool {
        self.pushed.load(Ordering::Relaxed).is_null()
    }

    /// In the child of a fork: empties the inbox.
    #[cfg(not(mmun_loom))]
    pub(in crate::raw) fn after_fork(&self) {
        self.pushed.store(ptr::null_mut(), Ordering::Relaxed);
        self.taken.store(ptr::null_mut(), Ordering::Relaxed);
        self.event.after_fork();
    }

    /// In the child of a fork, in the reclaimer: marks the domains in the inbox as scheduled.
    #[cfg(not(mmun_loom))]
    pub(in crate::raw) fn mark_scheduled(&self) {
        for list in [&self.pushed, &self.taken] {
            let mut next = NonNull::new(list.load(Ordering::Relaxed));
            while let Some(state) = next {
                // SAFETY: the state must be alive. The inbox holds a count of it.
                let pending = unsafe { &state.as_ref().pending };
                pending.scheduled.store(true, Ordering::Relaxed);
                next = NonNull::new(pending.next.load(Ordering::Relaxed));
            }
        }
    }

    /// Removes and returns the domain that was added first.
    pub(in crate::raw) fn take(&self) -> Option<NonNull<State>> {
        if self.taken.load(Ordering::Relaxed).is_null() {
            // ORDER(srcu-inbox): Acquire; partner in `schedule`.
            let mut latest = self.pushed.swap(ptr::null_mut(), Ordering::Acquire);
            let mut earlier = ptr::null_mut();
            while let Some(state) = NonNull::new(latest) {
                // SAFETY: the state must be alive. The inbox holds a count of it.
                let next = unsafe { &state.as_ref().pending.next };
                latest = next.load(Ordering::Relaxed);
                next.store(earlier, Ordering::Relaxed);
                earlier = state.as_ptr();
            }
            self.taken.store(earlier, Ordering::Relaxed);
        }
        let first = NonNull::new(self.taken.load(Ordering::Relaxed))?;
        // SAFETY: the state must be alive. The inbox holds a count of it, which only the return
        // passes to the caller.
        let next = unsafe { first.as_ref() }
            .pending
            .next
            .load(Ordering::Relaxed);
        self.taken.store(next, Ordering::Relaxed);
        Some(first)
    }
}
