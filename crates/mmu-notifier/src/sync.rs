//! The primitives that models replace: from `loom` under `cfg(mmun_loom)`, from `std` otherwise.

#[cfg(mmun_loom)]
pub(crate) use loom::{
    sync::{Arc, Condvar, Mutex, MutexGuard, atomic},
    thread_local,
};
#[cfg(not(mmun_loom))]
pub(crate) use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, atomic},
    thread_local,
};

use std::sync::PoisonError;

/// Takes the value out of a lock that nobody can hold, also after a panic in a holder.
pub(crate) fn into_inner<T>(mutex: Mutex<T>) -> T {
    mutex.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Locks, also after a panic in another holder: what these locks guard is consistent at every instruction that can
/// panic, and a panicking `alloc` must not take the address space with it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
