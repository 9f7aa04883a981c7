//! What the current thread is doing for the reclaimer, so that a wait for itself can be refused.

use crate::raw::state::State;
use crate::sync::thread_local;
use std::cell::Cell;
use std::ptr;

#[cfg(not(mmun_loom))]
thread_local! {
    // A constant without a destructor: no registration, so reading it never allocates, not even at thread exit.
    static RUNNING: Cell<*const State> = const { Cell::new(ptr::null()) };
    static RECLAIMER: Cell<bool> = const { Cell::new(false) };
}
#[cfg(mmun_loom)]
thread_local! {
    static RUNNING: Cell<*const State> = Cell::new(ptr::null());
    static RECLAIMER: Cell<bool> = Cell::new(false);
}

/// Marks this thread as the one that runs callbacks, and says what it was before.
pub(crate) fn set_reclaimer(is: bool) -> bool {
    RECLAIMER.with(|reclaimer| reclaimer.replace(is))
}

/// Whether this thread runs the callbacks of all domains, so that waiting here for any of them would never end.
pub fn is_reclaimer() -> bool {
    RECLAIMER.with(Cell::get)
}

/// Whether a callback of this domain is running on this thread.
pub(crate) fn runs_callback_of(state: &State) -> bool {
    RUNNING.with(Cell::get) == ptr::from_ref(state)
}

/// Runs `f` with callbacks of `state` marked as running.
pub(crate) fn with_callback_of(state: &State, f: impl FnOnce()) {
    let before = RUNNING.with(|running| running.replace(ptr::from_ref(state)));
    f();
    RUNNING.with(|running| running.set(before));
}
