//! The registrar's handles, one place for each region. Holders of a lease read them without a lock.

use super::memory::{Array, Zero};
use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;

/// # Invariants
/// While a region is being registered, only the registering thread accesses its place, and writes
/// it. Afterwards holders of a lease read the place. When no lease is left, only the deregistering
/// thread accesses it, and takes the handle.
pub(crate) struct Handles<T>(Array<Place<T>>);

#[repr(transparent)]
struct Place<T>(UnsafeCell<MaybeUninit<T>>);

// SAFETY: an uninitialised value may have any bits.
unsafe impl<T> Zero for Place<T> {
    fn zero() -> Self {
        Self(UnsafeCell::new(MaybeUninit::uninit()))
    }
}

// SAFETY: by the type's invariant there is either one writer and no reader, or only readers. `T:
// Send + Sync` allows both for its values.
unsafe impl<T: Send + Sync> Sync for Handles<T> {}

impl<T> Handles<T> {
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        Array::zeroes(len).map(Self)
    }

    /// Writes a region's handle.
    ///
    /// # Safety
    /// The caller is registering the region, and no lease of it exists.
    pub(crate) unsafe fn put(&self, region: u32, handle: T) {
        // SAFETY: the caller promises that no other code uses the place.
        unsafe { (*self.0[region as usize].0.get()).write(handle) };
    }

    /// Returns a region's handle.
    ///
    /// # Safety
    /// The caller holds a lease of the region for as long as it uses the reference.
    #[inline]
    pub(crate) unsafe fn get(&self, region: u32) -> &T {
        // SAFETY: no code may write to the place. A leased region is registered, and is
        // deregistered only after its last lease.
        let place = unsafe { &*self.0[region as usize].0.get() };
        // SAFETY: the value must be initialised. `put` has written the handle of every registered
        // region.
        unsafe { place.assume_init_ref() }
    }

    /// Takes a region's handle.
    ///
    /// # Safety
    /// The region is registered, has no lease and will get none, and its handle is taken only once.
    pub(crate) unsafe fn take(&self, region: u32) -> T {
        // SAFETY: the caller promises that no other code uses the place.
        let place = unsafe { &*self.0[region as usize].0.get() };
        // SAFETY: the value must be initialised and must not be read again. `put` has written it,
        // because the region is registered, and the caller promises to take it only once.
        unsafe { place.assume_init_read() }
    }
}
