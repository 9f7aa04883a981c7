//! Finds one kind of deadlock before it happens: a thread waits for callbacks while it holds a lock
//! that a callback takes.
//!
//! ```text
//!   thread 1                              thread 2
//!   lock(table)                           bracket is open
//!   unregister: waits for thread 2's      callback: waits for lock(table), which
//!     bracket                               thread 1 holds
//! ```
//!
//! Some calls wait for brackets or callbacks to end, for example
//! [`unregister`](crate::Registration::unregister), `get` of a new notifier,
//! [`remove`](crate::IntervalNotifier::remove), [`synchronize`](crate::Subsystem::synchronize) and
//! exit. If the caller holds a lock that an open bracket or a running callback waits for, neither
//! thread continues. In a test, such a wait and such a bracket rarely coincide. With a [`Map`]
//! beside the lock they need not coincide. It is enough that the lock was once held during such a
//! wait, and once taken inside a bracket or callback. The later of the two panics, and names the
//! place of the earlier.
//!
//! Only builds with `debug_assertions` do this. In other builds a `Map` is empty and does nothing.
//!
//! # Examples
//! ```
//! # #[global_allocator]
//! # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
//! use mmu_notifier::{InvalidateRange, Notifier, lockdep};
//! use std::sync::Mutex;
//!
//! struct Table {
//!     entries: Mutex<Vec<u64>>,
//!     order: lockdep::Map,
//! }
//!
//! impl Notifier for Table {
//!     fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
//!         let _order = self.order.acquire(); // Before the lock, so that it reports even a lock that hangs.
//!         self.entries.lock().unwrap().clear();
//!     }
//! }
//!
//! let table = Table { entries: Mutex::default(), order: lockdep::Map::new("Table::entries") };
//! # drop(table);
//! ```
//!
//! Two other mistakes hang just as rarely: a callback that uses the heap, and a thread that
//! allocates while it holds a lock that a callback takes. [`CheckedAlloc`] finds those.
//!
//! # Source
//! `__mmu_notifier_invalidate_range_start_map`, mm/mmu_notifier.c, Linux 5.5. Differs: a lock is
//! identified by its `Map` instead of by class, and address spaces are distinguished.

mod alloc;

pub use alloc::CheckedAlloc;

use std::marker::PhantomData;

/// Stands beside one lock of any kind, and records where it was taken.
///
/// # Source
/// `struct lockdep_map`.
#[derive(Debug)]
#[doc(alias = "lockdep_map")]
pub struct Map(imp::Map);

/// Records that the lock beside a [`Map`] is held or about to be taken, until dropped.
#[must_use = "the lock counts as held only as long as this lives"]
#[derive(Debug)]
pub struct Held<'a> {
    _held: imp::Held<'a>,
    // Not `Send`, because the thread that took the lock releases it.
    _stays: PhantomData<*const ()>,
}

impl Map {
    /// Makes the map of a lock, which reports call `name`.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self(imp::Map::new(name))
    }

    /// Records that this thread takes the lock. The lock counts as held until the guard is dropped.
    ///
    /// # Panics
    /// With `debug_assertions`, if this thread is inside a bracket or callback of an address space,
    /// and some thread has waited for that address space while it held this lock.
    /// # Source
    /// `lock_map_acquire`, include/linux/lockdep.h, Linux 5.5.
    /// # Examples
    /// ```
    /// use mmu_notifier::{Event, MmWithUser, Notifier, Registration, VaRange, lockdep};
    /// use std::panic::{AssertUnwindSafe, catch_unwind};
    ///
    /// struct Table;
    /// impl Notifier for Table {}
    ///
    /// let (mm, order) = (MmWithUser::new(), lockdep::Map::new("the table's lock"));
    /// mm.with_invalidation(VaRange::ALL, Event::Clear, |_| drop(order.acquire()));
    /// let waits = || {
    ///     let _held = order.acquire();
    ///     drop(Registration::new(&mm, Table));
    /// };
    /// let found = catch_unwind(AssertUnwindSafe(waits)).is_err();
    /// assert_eq!(found, cfg!(debug_assertions), "a bracket takes that lock, and this waits for brackets under it");
    /// ```
    #[cfg_attr(debug_assertions, track_caller)]
    #[inline]
    #[doc(alias = "lock_map_acquire")]
    pub fn acquire(&self) -> Held<'_> {
        Held {
            _held: self.0.acquire(),
            _stays: PhantomData,
        }
    }
}

/// Records that this thread is about to wait until brackets and callbacks of the address space with
/// the id `mm`, or of any address space, have ended.
///
/// # Panics
/// With `debug_assertions`, if this thread holds a lock that was once taken inside a bracket or
/// callback of such an address space.
#[cfg_attr(debug_assertions, track_caller)]
#[inline]
pub(crate) fn might_wait(mm: Option<u64>) {
    imp::might_wait(mm);
}

/// Records that this thread holds the state of an interval of the address space with the id `mm`,
/// until dropped. The interval's callback takes that state too.
#[cfg_attr(debug_assertions, track_caller)]
#[inline]
pub(crate) fn holds_state(mm: u64) -> imp::Held<'static> {
    imp::holds_state(mm)
}

/// Records that this thread runs the callback `method` of `N`, until dropped.
#[inline(always)]
pub(crate) fn callback<N: ?Sized>(method: &'static str) -> imp::Callback {
    imp::Callback::enter(std::any::type_name::<N>, method)
}

pub(crate) use imp::Section;

#[cfg_attr(
    all(debug_assertions, not(mmun_loom)),
    path = "lockdep/on.rs",
    expect(unsafe_code, reason = "places in atomics")
)]
#[cfg_attr(not(all(debug_assertions, not(mmun_loom))), path = "lockdep/off.rs")]
mod imp;
