//! The primitives that models replace: from `loom` under `cfg(mmun_loom)`, from `std` otherwise.

#[cfg(mmun_loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard, atomic};
#[cfg(not(mmun_loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};

#[cfg(not(mmun_loom))]
pub(crate) use std::sync::atomic::fence;
use std::sync::{PoisonError, TryLockError};

/// A fence at which models may switch threads. `loom`'s own is glued to the operation before it: no thread ever runs between a store and
/// the fence behind it. A relaxed read-modify-write that all fences share is a place to switch and adds no order.
#[cfg(mmun_loom)]
pub(crate) fn fence(order: atomic::Ordering) {
    loom::lazy_static! { static ref POINT: atomic::AtomicUsize = atomic::AtomicUsize::new(0); }
    POINT.fetch_add(1, atomic::Ordering::Relaxed);
    atomic::fence(order);
}

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

/// The order, or in a run that is broken in the way that `name` says, none.
#[inline(always)]
pub(crate) fn unless(name: &str, order: atomic::Ordering) -> atomic::Ordering {
    if mutant(name) { atomic::Ordering::Relaxed } else { order }
}
