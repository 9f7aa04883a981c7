//! The counted reference from an `Srcu` to its state.

#[cfg(not(mmun_loom))]
use super::fork;
use super::state::State;
#[cfg(not(mmun_loom))]
use super::state::pool;
use crate::sync::{AtomicPtr, Ordering};
#[cfg(not(mmun_loom))]
use std::ptr;

/// The counted reference from an `Srcu` to its state. The first use makes the state.
///
/// # Invariants
/// Points to `EMPTY`, or to a state of which the handle owns one count.
pub(crate) struct Handle(AtomicPtr<State>);

impl Handle {
    #[cfg(not(mmun_loom))]
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::from_ref(&pool::EMPTY).cast_mut()))
    }

    #[cfg(mmun_loom)]
    pub(crate) fn new() -> Self {
        Self(AtomicPtr::new(State::create()))
    }

    /// Returns the state. Until the first use, this is `EMPTY`, in which no thread has a slot.
    #[inline(always)]
    pub(crate) fn peek(&self) -> &State {
        // ORDER(srcu-state): Acquire; partner in `first_use`.
        let state = self.0.load(Ordering::Acquire);
        // SAFETY: the state must outlive the reference. The state is a static, or this handle, from
        // which the reference borrows, keeps it alive.
        unsafe { &*state }
    }

    /// Returns the state. Makes it on first use, without the allocator.
    #[inline]
    pub(crate) fn get(&self) -> &State {
        self.used().unwrap_or_else(|| self.first_use())
    }

    #[cfg(not(mmun_loom))]
    pub(crate) fn used(&self) -> Option<&State> {
        Some(self.peek()).filter(|state| !ptr::eq(*state, &pool::EMPTY))
    }

    #[cfg(mmun_loom)]
    pub(crate) fn used(&self) -> Option<&State> {
        Some(self.peek())
    }

    #[cold]
    fn first_use(&self) -> &State {
        #[cfg(not(mmun_loom))]
        {
            fork::register();
            pool::first_use(&self.0);
        }
        self.peek()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Some(state) = self.used() {
            state.owned.store(false, Ordering::Relaxed);
            // SAFETY: `release` needs a count that the caller owns. By its invariant the handle
            // owns one.
            unsafe { State::release(state) };
        }
    }
}
