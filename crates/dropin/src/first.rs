//! A value that is published once, without a lock.
//!
//! `std::sync::Once` and `OnceLock` hold a lock while the value is made. The first use of a library
//! takes milliseconds and calls the dynamic loader, so such a lock hangs a program in two ways:
//! * The child of a fork waits for a thread that only its parent has.
//! * A library's constructor runs with the loader's lock held. If it waits for the value, and the
//!   thread that makes the value waits for the loader, both wait for ever.

#![allow(
    unsafe_code,
    reason = "one pointer that is published once and never freed"
)]

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Threads that need the value at the same time each make one. The first published one stays.
#[derive(Debug)]
pub(crate) struct First<T>(AtomicPtr<T>);

impl<T: Send + Sync> First<T> {
    pub(crate) const fn new() -> First<T> {
        First(AtomicPtr::new(ptr::null_mut()))
    }

    pub(crate) fn get(&self) -> Option<&'static T> {
        // ORDER(dropin-first): Acquire, for the content. Partner: the exchange in `get_or_make`.
        let value = self.0.load(Ordering::Acquire);
        // SAFETY: the pointer is null or comes from `Box::into_raw` below, and is never freed.
        unsafe { value.as_ref() }
    }

    /// Returns the value. `make` may run in several threads, so doing its work twice must do no
    /// harm.
    pub(crate) fn get_or_make(&self, make: impl FnOnce() -> T) -> &'static T {
        self.get().unwrap_or_else(|| {
            let made = Box::into_raw(Box::new(make()));
            // ORDER(dropin-first): Release for the content, Acquire for that of the thread that was
            // first. Partner: `get`.
            let before =
                self.0
                    .compare_exchange(ptr::null_mut(), made, Ordering::AcqRel, Ordering::Acquire);
            let Err(first) = before else {
                // SAFETY: `made` is now published, and never freed.
                return unsafe { &*made };
            };
            // SAFETY: `made` was not published, so this thread is its only owner.
            drop(unsafe { Box::from_raw(made) });
            // SAFETY: as in `get`; the pointer is not null, because the exchange failed.
            unsafe { &*first }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_published_value_stays() {
        static VALUE: First<u32> = First::new();
        assert_eq!(VALUE.get(), None);
        let inner = || *VALUE.get_or_make(|| 1);
        // The inner call publishes while the outer one makes its value.
        assert_eq!(*VALUE.get_or_make(|| inner() + 1), 1);
        assert_eq!(VALUE.get(), Some(&1));
    }
}
