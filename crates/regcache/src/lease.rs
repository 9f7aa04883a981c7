//! Leases: what keeps a region registered.

use crate::Registrar;
use crate::cache::Cache;
use crate::raw::held::{Held, Place};
use crate::raw::region::Region;
use crate::sync::atomic::{Ordering, fence};
use mmu_notifier::VaRange;
use std::fmt;
use std::mem::ManuallyDrop;

/// A region that stays registered until this is dropped. From
/// [`RegCache::get`](crate::RegCache::get).
///
/// It can be sent to another thread and dropped there. One that is forgotten ([`std::mem::forget`])
/// keeps its region registered for ever.
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

    /// The same, to be ended by the caller.
    pub(crate) fn into_held(self) -> Held<'a> {
        let this = ManuallyDrop::new(self);
        match this.held.place() {
            Place::Slot(slot) => Held::in_slot(slot),
            Place::Region(region) => Held::in_region(region),
        }
    }

    /// Ends the lease without a lock and without the registrar, as a signal handler must.
    ///
    /// If it was the last lease of a stale region, the next miss, invalidation,
    /// [`reap`](crate::RegCache::reap) or [`flush`](crate::RegCache::flush) deregisters that.
    pub fn end_later(self) {
        let cache = self.cache;
        cache.end_later(&self.into_held());
    }

    fn region(&self) -> &Region {
        self.cache.index.region(self.cache.index.leased(&self.held))
    }

    /// Returns what the registrar made of the region.
    #[must_use]
    #[inline]
    #[expect(unsafe_code, reason = "the one place where a handle is read")]
    pub fn handle(&self) -> &R::Handle {
        // SAFETY: The region must be leased as long as the reference lives: it is by `self`, which
        // the reference borrows.
        &unsafe { self.cache.handles.get(self.cache.index.leased(&self.held)) }.handle
    }

    /// Returns the registered region, which covers what was asked for.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.region().range()
    }

    /// Tells whether the region still stands for the memory at its addresses.
    ///
    /// False from the moment on at which some of it was about to change, and also if the region was
    /// merged into another one, evicted or flushed. A transfer through a region that is false
    /// afterwards may have gone to memory that is not there any more: if the program unmaps buffers
    /// that are in use, it has to look.
    ///
    /// # Blocking
    /// While callbacks run, if the cache asks the kernel source and that has something to tell.
    #[must_use]
    pub fn is_current(&self) -> bool {
        let cache = self.cache;
        // ORDER(cache-use): What the caller has read through the lease comes before the looks that
        // follow. Partner: `set_dead`. If weaker, it could be of the memory that came afterwards,
        // and the answer from before.
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
