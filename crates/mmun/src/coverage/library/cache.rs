//! The interface to a library's registration cache.

use std::ffi::c_void;

/// A registration cache whose registrations are slots of a [`Ring`](super::ring::Ring).
pub(super) trait Cache {
    /// Looks a range up, and registers it if necessary. Returns its slot, and the argument for
    /// `put`. `None` if it could not be registered.
    fn get(&self, address: usize, len: usize) -> Option<(u32, *mut c_void)>;

    /// Releases a registration from `get`, once. The registration stays in the cache.
    fn put(&self, registration: *mut c_void);
}

/// A registration that a transfer may use: the library does not deregister it before the drop.
pub(super) struct Held<'a> {
    cache: &'a dyn Cache,
    registration: *mut c_void,
    pub(super) slot: u32,
}

impl Held<'_> {
    pub(super) fn look_up(cache: &dyn Cache, address: usize, len: usize) -> Option<Held<'_>> {
        let (slot, registration) = cache.get(address, len)?;
        Some(Held {
            cache,
            registration,
            slot,
        })
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.cache.put(self.registration);
    }
}
