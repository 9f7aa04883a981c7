//! What the current thread is doing for the reclaimer, so that a wait for itself can be refused.

use crate::raw::state::State;
use std::ptr;

thread_word! {
    /// The address of the domain whose callback runs on this thread, or zero.
    static RUNNING: u64 = 0;
    /// One if this thread runs callbacks.
    static RECLAIMER: u64 = 0;
}

/// Marks this thread as the one that runs callbacks, and says what it was before.
pub(crate) fn set_reclaimer(is: bool) -> bool {
    let before = is_reclaimer();
    RECLAIMER.set(is.into());
    before
}

/// Whether this thread runs the callbacks of all domains, so that waiting here for any of them
/// would never end.
pub fn is_reclaimer() -> bool {
    RECLAIMER.get() != 0
}

/// Whether a callback of this domain is running on this thread.
pub(crate) fn runs_callback_of(state: &State) -> bool {
    RUNNING.get() == address(state)
}

/// Runs `f` with callbacks of `state` marked as running.
pub(crate) fn with_callback_of(state: &State, f: impl FnOnce()) {
    let before = RUNNING.get();
    RUNNING.set(address(state));
    f();
    RUNNING.set(before);
}

fn address(state: &State) -> u64 {
    ptr::from_ref(state).addr() as u64
}
