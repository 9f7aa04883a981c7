//! The primitives that models replace: from `loom` under `cfg(mmun_loom)`, from `std` otherwise.

#[cfg(mmun_loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard, atomic};
#[cfg(not(mmun_loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};

use std::sync::{PoisonError, TryLockError};

/// Locks, also after a panic in another holder: nothing that can panic runs under the lock of a cache.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks at once or not at all, also after a panic.
pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Sleeps until notified. May wake for nothing.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Whether this run is to be broken in the way that `name` says. A model that passes all the same proves nothing.
#[cfg(mmun_loom)]
pub(crate) fn mutant(name: &str) -> bool {
    std::env::var("MMUN_MUTANT").is_ok_and(|mutant| mutant == name)
}

#[cfg(not(mmun_loom))]
#[inline(always)]
pub(crate) const fn mutant(_name: &str) -> bool {
    false
}
