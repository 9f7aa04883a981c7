//! Signals that wait.
//!
//! # Safety
//! The calls change the mask of the calling thread, through pointers to locals.

#![allow(unsafe_code, reason = "calls without a safe wrapper; see the Safety section")]

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;

/// Runs `f` with all signals blocked. A thread that it starts inherits that: the program's handlers
/// never run there, and a signal that the program waits for is not taken from it.
pub(crate) fn without<T>(f: impl FnOnce() -> T) -> T {
    let _held = Held::new();
    f()
}

/// The thread's signals wait while this is alive. It stays on its thread.
struct Held(libc::sigset_t, PhantomData<*mut ()>);

impl Held {
    fn new() -> Self {
        let mut sets = [const { MaybeUninit::<libc::sigset_t>::zeroed() }; 2];
        // SAFETY: fills the set it is given.
        unsafe { libc::sigfillset(sets[0].as_mut_ptr()) };
        // SAFETY: both sets are locals; the first was filled above.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, sets[0].as_ptr(), sets[1].as_mut_ptr()) };
        // SAFETY: zeroes are a set, and the call above has written it.
        Self(unsafe { sets[1].assume_init() }, PhantomData)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: the set is what this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, ptr::null_mut()) };
    }
}
