//! The primitives that models replace: from `loom` under `cfg(mmun_loom)`, from `std` otherwise.

#[cfg(mmun_loom)]
pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard, atomic};
#[cfg(mmun_tsan)]
pub(crate) use std::sync::atomic;
#[cfg(not(any(mmun_loom, mmun_tsan)))]
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard, atomic};
#[cfg(mmun_tsan)]
pub(crate) use traced::{Arc, Condvar, Mutex, MutexGuard};
#[cfg(mmun_tsan)]
mod traced;

#[cfg(not(mmun_loom))]
pub(crate) use srcu::forks;

/// Models do not fork.
#[cfg(mmun_loom)]
pub(crate) fn forks() -> usize {
    0
}

use std::sync::PoisonError;

/// Takes the value out of a lock that no thread holds, even after a holder has panicked.
pub(crate) fn into_inner<T>(mutex: Mutex<T>) -> T {
    mutex.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a lock, even after a holder has panicked. The guarded data is consistent at every
/// instruction that can panic, and a panicking `alloc` must not make the address space unusable.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) use srcu::mutant;
