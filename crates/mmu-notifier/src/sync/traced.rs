//! The standard library's `Mutex`, `Condvar` and `Arc`, in a form that a thread sanitizer can
//! follow (`--cfg mmun_tsan`).
//!
//! The sanitizer does not see how the standard library's slow paths order accesses, because the
//! standard library is not rebuilt for it. So here each lock has a clock, an atomic that every lock
//! and every unlock advances. An `Arc` has a clock too, because the standard `Arc` uses a fence in
//! its drop, which sanitizers do not understand. Every access to a clock is an addition, because
//! LLVM may delete an acquiring load whose value is unused.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{self, LockResult, PoisonError, TryLockError, TryLockResult};

#[derive(Debug, Default)]
pub(crate) struct Mutex<T> {
    clock: AtomicU64,
    inner: sync::Mutex<T>,
}

#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T> {
    clock: &'a AtomicU64,
    /// Only `Condvar::wait` takes it out.
    inner: Option<sync::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self {
            clock: AtomicU64::new(0),
            inner: sync::Mutex::new(value),
        }
    }

    pub(crate) fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        Ok(MutexGuard::new(
            &self.clock,
            self.inner.lock().unwrap_or_else(PoisonError::into_inner),
        ))
    }

    #[allow(dead_code, reason = "who includes this file need not use all of it")]
    pub(crate) fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
        match self.inner.try_lock() {
            Ok(inner) => Ok(MutexGuard::new(&self.clock, inner)),
            Err(TryLockError::Poisoned(poisoned)) => {
                Ok(MutexGuard::new(&self.clock, poisoned.into_inner()))
            }
            Err(TryLockError::WouldBlock) => Err(TryLockError::WouldBlock),
        }
    }

    #[allow(dead_code, reason = "as above")]
    pub(crate) fn into_inner(self) -> LockResult<T> {
        // Acquire, because the last holder may have unlocked in a slow path.
        self.clock.fetch_add(1, Ordering::AcqRel);
        self.inner.into_inner()
    }
}

impl<'a, T> MutexGuard<'a, T> {
    fn new(clock: &'a AtomicU64, inner: sync::MutexGuard<'a, T>) -> Self {
        clock.fetch_add(1, Ordering::AcqRel);
        Self {
            clock,
            inner: Some(inner),
        }
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.inner.as_ref().expect("only `wait` takes it out")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.inner.as_mut().expect("only `wait` takes it out")
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.clock.fetch_add(1, Ordering::Release);
        // The drop of the field `inner` releases the lock itself, after this.
    }
}

#[derive(Debug, Default)]
#[allow(dead_code, reason = "as above")]
pub(crate) struct Condvar(sync::Condvar);

#[allow(dead_code, reason = "as above")]
impl Condvar {
    pub(crate) const fn new() -> Self {
        Self(sync::Condvar::new())
    }

    pub(crate) fn wait<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
    ) -> LockResult<MutexGuard<'a, T>> {
        let (clock, inner) = (
            guard.clock,
            guard.inner.take().expect("only `wait` takes it out"),
        );
        // This drop advances the clock. There is nothing left to unlock.
        drop(guard);
        Ok(MutexGuard::new(
            clock,
            self.0.wait(inner).unwrap_or_else(PoisonError::into_inner),
        ))
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

#[derive(Debug)]
#[allow(dead_code, reason = "as above")]
pub(crate) struct Arc<T>(sync::Arc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
    clock: AtomicU64,
    value: T,
}

#[allow(dead_code, reason = "as above")]
impl<T> Arc<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(sync::Arc::new(Shared {
            clock: AtomicU64::new(0),
            value,
        }))
    }

    pub(crate) fn ptr_eq(this: &Self, other: &Self) -> bool {
        sync::Arc::ptr_eq(&this.0, &other.0)
    }

    pub(crate) fn strong_count(this: &Self) -> usize {
        sync::Arc::strong_count(&this.0)
    }
}

impl<T> Clone for Arc<T> {
    fn clone(&self) -> Self {
        Self(sync::Arc::clone(&self.0))
    }
}

impl<T> Deref for Arc<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T> Drop for Arc<T> {
    fn drop(&mut self) {
        self.0.clock.fetch_add(1, Ordering::Release);
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        self.clock.fetch_add(1, Ordering::AcqRel);
    }
}
