//! Threads that leave the program's signals alone.
//!
//! # Safety
//! The calls change the mask of the calling thread, through pointers to locals.

#![allow(unsafe_code, reason = "calls without a safe wrapper; see the Safety section")]

use std::mem::MaybeUninit;

/// Runs `f` with all signals blocked, which a thread that it starts inherits: the program's handlers never run there, and a signal
/// that the program waits for is not taken from it.
pub(crate) fn without<T>(f: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: needs a place for a set.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: needs an initialised set, from the line above, and a place for the old one.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
    let result = f();
    // SAFETY: needs an initialised set: the call before filled it in.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    result
}
