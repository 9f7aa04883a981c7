//! Leases, which keep regions registered.

use crate::Registrar;
use crate::cache::Cache;
use crate::raw::held::{Held, Place};
use crate::raw::region::Region;
use crate::sync::atomic::{Ordering, fence};
use mmu_notifier::VaRange;
use std::fmt;
use std::mem::ManuallyDrop;

/// Keeps a region registered until it is dropped. From [`RegCache::get`](crate::RegCache::get).
///
/// A lease can be sent to another thread and dropped there. A forgotten lease
/// ([`std::mem::forget`]) keeps its region registered for ever.
#[must_use = "the region may be deregistered when the lease is dropped"]
pub struct Lease<'a, R: Registrar> {
    cache: &'a Cache<R>,
    held: Held<'a>,
}

impl<'a, R: Registrar> Lease<'a, R> {
    #[inline(always)]
    pub(crate) fn new(cache: &'a Cache<R>, held: Held<'a>) -> Self {
        Self { cache, held }
    }

    /// Returns the `Held` of the lease without ending the lease. The caller must end it.
    pub(crate) fn into_held(self) -> Held<'a> {
        let this = ManuallyDrop::new(self);
        match this.held.place() {
            Place::Slot(slot) => Held::in_slot(slot),
            Place::Region(region) => Held::in_region(region),
        }
    }

    /// Ends the lease without a lock and without the registrar, as a signal handler must.
    ///
    /// If the lease was the last one of a stale region, the next miss,
    /// [`reap`](crate::RegCache::reap) or [`flush`](crate::RegCache::flush) deregisters the region.
    /// So does the next invalidation, if the registrar
    /// [deregisters in callbacks](Registrar::deregisters_in_callbacks).
    pub fn end_later(self) {
        let cache = self.cache;
        cache.end_later(&self.into_held());
    }

    fn region(&self) -> &Region {
        self.cache.index.region(self.cache.index.leased(&self.held))
    }

    /// Returns the registrar's handle of the region.
    #[must_use]
    #[inline]
    #[expect(unsafe_code, reason = "the one place where a handle is read")]
    pub fn handle(&self) -> &R::Handle {
        // SAFETY: the region must be leased as long as the reference lives. `self` leases it, and
        // the reference borrows from `self`.
        &unsafe { self.cache.handles.get(self.cache.index.leased(&self.held)) }.handle
    }

    /// Returns the registered region, which covers the requested range.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.region().range()
    }

    /// Tells whether the region still matches the memory at its addresses.
    ///
    /// The answer is false as soon as a source has reported that a part of the memory is about to
    /// change. The answer is also false if the region was merged into another one, evicted or
    /// flushed, and in the child of a fork. If the answer is false after a transfer, the transfer
    /// may have gone to memory that the program does not have any more. So a program that unmaps
    /// buffers in use must check.
    ///
    /// # Blocking
    /// With [`Options::kernel`](crate::Options::kernel), runs the callbacks of unreported changes,
    /// or waits while another thread runs them. So a signal handler must not call this function
    /// then.
    #[must_use]
    pub fn is_current(&self) -> bool {
        let cache = self.cache;
        // ORDER(cache-use): the caller's reads through the lease come before the loads that follow.
        // Partner: `set_dead`. If weaker, the reads could see the memory after the change, while
        // the loads still find the region live.
        fence(Ordering::Acquire);
        let known = cache.freshness.is_current() || cache.freshness.settle::<R::Error>().is_ok();
        known && !cache.index.page.is_inherited() && self.region().is_live()
    }
}

impl<R: Registrar> Drop for Lease<'_, R> {
    #[inline(always)]
    fn drop(&mut self) {
        self.cache.end(&self.held);
    }
}

impl<R: Registrar> fmt::Debug for Lease<'_, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("range", &self.range())
            .field("is_current", &self.is_current())
            .finish_non_exhaustive()
    }
}
