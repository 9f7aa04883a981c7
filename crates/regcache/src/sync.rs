//! The primitives that models replace: from `loom` under `cfg(mmun_loom)`, from `std` otherwise.

#[cfg(mmun_loom)]
use loom::sync::MutexGuard as Guard;
#[cfg(mmun_loom)]
pub(crate) use loom::sync::{Condvar, Mutex, atomic};
#[cfg(not(mmun_loom))]
use std::sync::MutexGuard as Guard;
#[cfg(not(mmun_loom))]
pub(crate) use std::sync::{Condvar, Mutex, atomic};

use std::ops::{Deref, DerefMut};
#[cfg(not(mmun_loom))]
pub(crate) use std::sync::atomic::fence;
use std::sync::{PoisonError, TryLockError};

/// A fence at which models may switch threads. `loom`'s own is glued to the operation before it: no
/// thread ever runs between a store and the fence behind it. A relaxed read-modify-write that all
/// fences share is a place to switch and adds no order.
#[cfg(mmun_loom)]
pub(crate) fn fence(order: atomic::Ordering) {
    loom::lazy_static! { static ref POINT: atomic::AtomicUsize = atomic::AtomicUsize::new(0); }
    POINT.fetch_add(1, atomic::Ordering::Relaxed);
    atomic::fence(order);
}

/// The lock of a cache, held.
#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T> {
    guard: Guard<'a, T>,
    // Dropped second: the mark stays until the lock is free.
    locking: Locking,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

mmu_notifier::thread_word! {
    /// One if this thread holds the lock of a cache, or is about to.
    static LOCKING: u64 = 0;
    /// The address of the cache that this thread is at work on, zero for none.
    static AT_WORK: u64 = 0;
}

/// The mark that this thread is at the lock of a cache: a signal handler that finds it must not
/// wait for that lock.
///
/// Set before the attempt and taken back after the release, so that there is no instruction in
/// between.
#[derive(Debug)]
struct Locking {
    before: u64,
}

impl Locking {
    fn mark() -> Self {
        let before = LOCKING.get();
        LOCKING.mark(1);
        Self { before }
    }
}

impl Drop for Locking {
    fn drop(&mut self) {
        // Not zero: a handler may have interrupted a thread that was about to lock.
        LOCKING.mark(self.before);
    }
}

/// Tells whether waiting for the lock of a cache would wait for this very thread, which a signal
/// handler has interrupted: nothing else comes here under the lock.
pub(crate) fn is_locking() -> bool {
    LOCKING.get() != 0
}

/// The mark that this thread is at work on a cache, with its lock or in its registrar: a signal
/// handler that finds it must not sleep until that work is done.
///
/// Only the innermost cache is marked. A registrar that uses another cache in turn hides the outer
/// one.
#[derive(Debug)]
pub(crate) struct AtWork {
    before: u64,
    is_nested: bool,
}

impl AtWork {
    pub(crate) fn mark<T>(cache: &T) -> Self {
        let cache = std::ptr::from_ref(cache).addr() as u64;
        let before = AT_WORK.get();
        AT_WORK.mark(cache);
        Self {
            before,
            is_nested: before == cache,
        }
    }

    /// Tells whether this thread was at work on the same cache already.
    pub(crate) fn is_nested(&self) -> bool {
        self.is_nested
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        AT_WORK.mark(self.before);
    }
}

/// Locks, also after a panic in another holder: nothing that can panic runs under the lock of a
/// cache.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    let locking = Locking::mark();
    MutexGuard {
        guard: mutex.lock().unwrap_or_else(PoisonError::into_inner),
        locking,
    }
}

/// Locks at once or not at all, also after a panic.
pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    let locking = Locking::mark();
    match mutex.try_lock() {
        Ok(guard) => Some(MutexGuard { guard, locking }),
        Err(TryLockError::Poisoned(poisoned)) => Some(MutexGuard {
            guard: poisoned.into_inner(),
            locking,
        }),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Sleeps until notified. May wake for nothing.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    let MutexGuard { guard, locking } = guard;
    MutexGuard {
        guard: condvar.wait(guard).unwrap_or_else(PoisonError::into_inner),
        locking,
    }
}

pub(crate) use mmu_notifier::mutant;

/// The order, or in a run that is broken in the way that `name` says, none.
#[inline(always)]
pub(crate) fn unless(name: &str, order: atomic::Ordering) -> atomic::Ordering {
    if mutant(name) {
        atomic::Ordering::Relaxed
    } else {
        order
    }
}
