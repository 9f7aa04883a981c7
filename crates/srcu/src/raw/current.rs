//! Whether this thread runs callbacks, and of which domain, so that a call that would wait for its
//! own thread can be refused.

use crate::raw::state::State;
use std::ptr;

thread_word! {
    /// The address of the domain whose callback runs on this thread, or zero.
    static RUNNING: u64 = 0;
    /// One if this thread is the reclaimer or acts in its place, otherwise zero.
    static RECLAIMER: u64 = 0;
}

/// Sets whether this thread is the reclaimer or acts in its place, and returns the old value.
pub(crate) fn set_reclaimer(is: bool) -> bool {
    let before = is_reclaimer();
    RECLAIMER.set(is.into());
    before
}

/// Runs `f` with this thread marked as one that acts as the reclaimer. `f` must not unwind, because
/// the mark would stay.
pub(crate) fn as_reclaimer(f: impl FnOnce()) {
    let before = set_reclaimer(true);
    f();
    set_reclaimer(before);
}

/// Tells whether this thread is the reclaimer, or acts in its place at the moment. If so, a wait
/// for any callback on this thread would never end.
pub fn is_reclaimer() -> bool {
    RECLAIMER.get() != 0
}

/// Tells whether a callback of this domain is running on this thread.
pub(crate) fn runs_callback_of(state: &State) -> bool {
    RUNNING.get() == address(state)
}

/// Runs `f` as a callback of `state`.
pub(crate) fn with_callback_of(state: &State, f: impl FnOnce()) {
    let before = RUNNING.get();
    RUNNING.set(address(state));
    f();
    RUNNING.set(before);
}

fn address(state: &State) -> u64 {
    ptr::from_ref(state).addr() as u64
}
