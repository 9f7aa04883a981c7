//! A lease that owns a handle of its cache.

use super::RegCache;
use crate::lease::Lease;
use crate::{Error, Registrar};
use mmu_notifier::VaRange;
use std::fmt;
use std::mem::ManuallyDrop;

/// A lease that keeps its cache alive. From [`RegCache::get_owned`].
#[must_use = "the region may be deregistered when the lease is dropped"]
pub struct OwnedLease<R: Registrar> {
    /// The lease borrows from the cache behind the field `cache`, so `drop` ends the lease first.
    lease: ManuallyDrop<Lease<'static, R>>,
    cache: RegCache<R>,
}

impl<R: Registrar> OwnedLease<R> {
    #[expect(unsafe_code, reason = "a lease beside what it borrows from")]
    pub(crate) fn new(cache: RegCache<R>, range: VaRange) -> Result<Self, Error<R::Error>> {
        let lease = cache.get(range)?;
        // SAFETY: the cache must outlive the lease. The handle keeps the cache alive at a fixed
        // address, and `drop` ends the lease before the handle. No caller sees the longer lifetime:
        // `get` shortens it.
        let lease = unsafe { std::mem::transmute::<Lease<'_, R>, Lease<'static, R>>(lease) };
        Ok(Self {
            lease: ManuallyDrop::new(lease),
            cache,
        })
    }

    /// Returns the lease.
    pub fn get<'a>(&'a self) -> &'a Lease<'a, R> {
        &self.lease
    }

    /// Returns the cache.
    #[must_use]
    pub fn cache(&self) -> &RegCache<R> {
        &self.cache
    }
}

impl<R: Registrar> Drop for OwnedLease<R> {
    #[expect(unsafe_code, reason = "the lease ends before the handle")]
    fn drop(&mut self) {
        // SAFETY: the lease must not be dropped twice or used afterwards. `self` is the only owner
        // of the lease, and its drop runs once.
        unsafe { ManuallyDrop::drop(&mut self.lease) };
    }
}

impl<R: Registrar> fmt::Debug for OwnedLease<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OwnedLease").field(self.get()).finish()
    }
}
