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

/// A fence at which a model may switch threads. loom never switches between an operation and loom's
/// own fence after it, so no thread would ever run in between. A relaxed read-modify-write on a
/// location that all fences share is a point where loom may switch, and adds no ordering.
#[cfg(mmun_loom)]
pub(crate) fn fence(order: atomic::Ordering) {
    loom::lazy_static! { static ref POINT: atomic::AtomicUsize = atomic::AtomicUsize::new(0); }
    POINT.fetch_add(1, atomic::Ordering::Relaxed);
    atomic::fence(order);
}

/// The held lock of a cache.
#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T> {
    guard: Guard<'a, T>,
    // After the guard, so that its drop clears the mark only when the lock is free.
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
    /// One if this thread holds the lock of a cache or is about to take it.
    static LOCKING: u64 = 0;
    /// The address of the cache that this thread works on, or zero.
    static AT_WORK: u64 = 0;
}

/// Marks that this thread holds or is taking the lock of a cache. A signal handler that finds the
/// mark must not wait for that lock.
///
/// The mark is set before the attempt and cleared after the release, so the lock is never held
/// without the mark.
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
        // Restore the old value, which may be nonzero: a signal handler may have interrupted a
        // thread that was about to lock.
        LOCKING.mark(self.before);
    }
}

/// Tells whether waiting for the lock of a cache could mean waiting for this very thread. Only a
/// signal handler that has interrupted the thread gets here with the mark set.
pub(crate) fn is_locking() -> bool {
    LOCKING.get() != 0
}

/// Marks that this thread works on a cache, under its lock or in its registrar. A signal handler
/// that finds the mark must not sleep until that work is done.
///
/// Only the innermost cache is marked. If a registrar uses a second cache, the mark of the second
/// cache replaces that of the first until the work on the second cache ends.
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

    /// Tells whether this thread was already working on the same cache.
    pub(crate) fn is_nested(&self) -> bool {
        self.is_nested
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        AT_WORK.mark(self.before);
    }
}

/// Locks. Ignores poisoning, because nothing that can panic runs under the lock of a cache.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    let locking = Locking::mark();
    MutexGuard {
        guard: mutex.lock().unwrap_or_else(PoisonError::into_inner),
        locking,
    }
}

/// Tries to lock without waiting. Ignores poisoning.
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

/// Sleeps until notified. Spurious wake-ups are possible.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    let MutexGuard { guard, locking } = guard;
    MutexGuard {
        guard: condvar.wait(guard).unwrap_or_else(PoisonError::into_inner),
        locking,
    }
}

pub(crate) use mmu_notifier::mutant;

/// Returns the ordering. In a run of the mutant `name`, returns `Relaxed` instead.
#[inline(always)]
pub(crate) fn unless(name: &str, order: atomic::Ordering) -> atomic::Ordering {
    if mutant(name) {
        atomic::Ordering::Relaxed
    } else {
        order
    }
}
