//! A mutex for slow paths, which never allocates, can be made in a constant, and can be reset in
//! the child of a fork.

use std::ops::{Deref, DerefMut};

#[cfg(mmun_loom)]
pub(crate) use model::Lock;
#[cfg(not(mmun_loom))]
pub(crate) use real::Lock;

#[cfg(not(mmun_loom))]
mod real {
    use super::{Deref, DerefMut};
    use crate::raw::event::{futex_wait, futex_wake};
    use crate::raw::process;
    use crate::sync::{AtomicU32, Ordering};
    use std::cell::UnsafeCell;

    const FREE: u32 = 0;
    const HELD: u32 = 1;
    /// A thread holds the lock, and a waiter may be asleep.
    const CONTENDED: u32 = 2;

    pub(crate) struct Lock<T> {
        word: AtomicU32,
        value: UnsafeCell<T>,
    }

    // SAFETY: the value is accessed only through `LockGuard`, of which only one exists at a time.
    // So sharing the lock only moves access to the value between threads.
    unsafe impl<T: Send> Sync for Lock<T> {}

    impl<T> Lock<T> {
        pub(crate) const fn new(value: T) -> Self {
            Self {
                word: AtomicU32::new(FREE),
                value: UnsafeCell::new(value),
            }
        }

        pub(crate) fn lock(&self) -> LockGuard<'_, T> {
            // ORDER(srcu-lock): Acquire when taking the lock and Release when freeing it, so that
            // each holder sees the writes of earlier holders.
            if self
                .word
                .compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
            {
                self.lock_contended();
            }
            LockGuard { lock: self }
        }

        #[cold]
        fn lock_contended(&self) {
            // In a child, the holder may not exist.
            process::check();
            // ORDER(srcu-lock): Acquire, as in `lock`.
            while self.word.swap(CONTENDED, Ordering::Acquire) != FREE {
                futex_wait(&self.word, CONTENDED);
            }
        }

        /// Frees the lock in the child of a fork, where its holder may not exist. The value is as
        /// the holder left it.
        pub(crate) fn after_fork(&self) {
            if self.word.load(Ordering::Relaxed) != FREE {
                self.word.store(FREE, Ordering::Relaxed);
            }
        }
    }

    pub(crate) struct LockGuard<'a, T> {
        lock: &'a Lock<T>,
    }

    impl<T> Deref for LockGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            // SAFETY: no `&mut` to the value may exist. Only this guard hands them out, and it is
            // the only guard.
            unsafe { &*self.lock.value.get() }
        }
    }

    impl<T> DerefMut for LockGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            // SAFETY: the reference must be unique. This is the only guard, and it is borrowed
            // mutably.
            unsafe { &mut *self.lock.value.get() }
        }
    }

    impl<T> Drop for LockGuard<'_, T> {
        fn drop(&mut self) {
            // ORDER(srcu-lock): Release; partner in `lock`.
            if self.lock.word.swap(FREE, Ordering::Release) == CONTENDED {
                futex_wake(&self.lock.word, 1);
            }
        }
    }
}

#[cfg(mmun_loom)]
mod model {
    use super::{Deref, DerefMut};
    use loom::sync::{Mutex, MutexGuard};

    pub(crate) struct Lock<T>(Mutex<T>);

    impl<T> Lock<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> LockGuard<'_, T> {
            LockGuard(self.0.lock().expect("models do not poison"))
        }
    }

    pub(crate) struct LockGuard<'a, T>(MutexGuard<'a, T>);

    impl<T> Deref for LockGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            &self.0
        }
    }

    impl<T> DerefMut for LockGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            &mut self.0
        }
    }
}
