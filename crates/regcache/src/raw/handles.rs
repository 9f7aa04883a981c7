//! The registrar's handles, one place for each region. Leases read them without a lock.

use super::memory::{Array, Zero};
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;

/// # Invariants
/// A place is written by who holds its region in the state of being registered, and read or emptied
/// after that, by the holders of a lease or, when there are none, by who deregisters it.
pub(crate) struct Handles<T>(Array<Place<T>>);

#[repr(transparent)]
struct Place<T>(UnsafeCell<MaybeUninit<T>>);

// SAFETY: An uninitialised value may have any bits.
unsafe impl<T> Zero for Place<T> {
    fn zero() -> Self {
        Self(UnsafeCell::new(MaybeUninit::uninit()))
    }
}

// SAFETY: By the type's invariant there is one writer and no reader, or there are readers only:
// values are sent between threads and shared as their type allows.
unsafe impl<T: Send + Sync> Sync for Handles<T> {}

impl<T> Handles<T> {
    pub(crate) fn new(len: usize) -> Self {
        Self(Array::zeroes(len))
    }

    /// Writes a region's handle.
    ///
    /// # Safety
    /// The caller is registering the region, and no lease of it exists.
    pub(crate) unsafe fn put(&self, region: u32, handle: T) {
        // SAFETY: No other code may use the place: the caller's promise.
        unsafe { (*self.0[region as usize].0.get()).write(handle) };
    }

    /// A region's handle.
    ///
    /// # Safety
    /// The caller holds a lease of the region for as long as it uses the reference.
    #[inline]
    pub(crate) unsafe fn get(&self, region: u32) -> &T {
        // SAFETY: No code may write to the place: a leased region was registered, and is
        // deregistered after its last lease.
        let place = unsafe { &*self.0[region as usize].0.get() };
        // SAFETY: It must be written: as above.
        unsafe { place.assume_init_ref() }
    }

    /// Takes a region's handle.
    ///
    /// # Safety
    /// The region was registered, has no lease and gets none, and this is done once.
    pub(crate) unsafe fn take(&self, region: u32) -> T {
        // SAFETY: No other code may use the place: the caller's promise.
        let place = unsafe { &*self.0[region as usize].0.get() };
        // SAFETY: It must be written, and not be read again: the caller's promise.
        unsafe { place.assume_init_read() }
    }
}
