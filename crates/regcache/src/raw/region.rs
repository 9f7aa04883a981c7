//! The data of each region: the part that look-ups read, and the part that the lock guards.

use super::barrier::full;
use super::memory::Zero;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::{mutant, unless};
use mmu_notifier::{Va, VaRange};

/// The part that look-ups read. Two regions share a cache line.
#[derive(Debug)]
#[cfg_attr(not(mmun_loom), repr(C, align(32)))]
pub(crate) struct Region {
    first: AtomicU64,
    last: AtomicU64,
    /// `LIVE` is set if look-ups find the region. `VISITED` is set if the region was used since the
    /// eviction hand last passed it.
    state: AtomicU32,
    /// The number of leases that are in no slot.
    counted: AtomicU32,
}

const VISITED: u32 = 1;
/// Look-ups find the region. `LIVE` is the higher bit, so that one comparison tests it.
const LIVE: u32 = 2;

// SAFETY: zeroes are valid integers.
unsafe impl Zero for Region {
    fn zero() -> Self {
        Self {
            first: AtomicU64::new(0),
            last: AtomicU64::new(0),
            state: AtomicU32::new(0),
            counted: AtomicU32::new(0),
        }
    }
}

impl Region {
    /// Returns the range. The range is stable only for a caller that holds the lock or a lease.
    #[inline(always)]
    pub(crate) fn range(&self) -> VaRange {
        range(
            self.first.load(Ordering::Relaxed),
            self.last.load(Ordering::Relaxed),
        )
    }

    #[inline(always)]
    pub(crate) fn covers(&self, range: VaRange) -> bool {
        self.first.load(Ordering::Relaxed) <= range.start().get()
            && range.last().get() <= self.last.load(Ordering::Relaxed)
    }

    pub(crate) fn overlaps(&self, range: VaRange) -> bool {
        self.first.load(Ordering::Relaxed) <= range.last().get()
            && range.start().get() <= self.last.load(Ordering::Relaxed)
    }

    /// Sets the range of a region that is not live.
    pub(crate) fn set_range(&self, range: VaRange) {
        self.first.store(range.start().get(), Ordering::Relaxed);
        self.last.store(range.last().get(), Ordering::Relaxed);
    }

    #[inline(always)]
    pub(crate) fn is_live(&self) -> bool {
        self.state() >= LIVE
    }

    #[inline(always)]
    fn state(&self) -> u32 {
        // ORDER(cache-live): Acquire, for the range and the handle. Partner: the Release in
        // `set_live`. If weaker, a lease could return the handle of the region that had this place
        // before.
        self.state.load(Ordering::Acquire)
    }

    /// Tells whether the region is live and covers `range`. If so, records a use. The record is
    /// written only if the eviction hand has passed since the last use.
    #[inline(always)]
    pub(crate) fn visit(&self, range: VaRange) -> bool {
        // The state must be loaded before the range: see `state`.
        let early = mutant("range_before_state") && self.covers(range);
        let state = self.state();
        if state < LIVE || !(early || self.covers(range) || mutant("no_second_look")) {
            return false;
        }
        state == LIVE | VISITED || self.mark()
    }

    #[cold]
    #[inline(never)]
    fn mark(&self) -> bool {
        // Relaxed: `VISITED` is only a hint for the eviction. If the region has died meanwhile, or
        // its place belongs to another region now, the hint does no harm.
        self.state.fetch_or(VISITED, Ordering::Relaxed);
        true
    }

    /// Clears the record of a use. Returns whether there was such a record.
    pub(crate) fn forget_visits(&self) -> bool {
        let visited = self.state.load(Ordering::Relaxed) & VISITED != 0;
        if visited {
            self.state.fetch_and(!VISITED, Ordering::Relaxed);
        }
        visited
    }

    pub(crate) fn set_live(&self) {
        // ORDER(cache-live): Release; partner in `state`.
        self.state.store(LIVE, Ordering::Release);
    }

    pub(crate) fn set_dead(&self) {
        // Relaxed: the heavy fence orders this store, ORDER(cache-lease).
        // ORDER(cache-use): the store comes before the change, because the system call that makes
        // the change begins later. Partner: the fence in `Lease::is_current`. The swap could be a
        // store, but loom would not order the read-modify-write in `mark` before a plain store, and
        // would still show its result afterwards.
        self.state.swap(0, Ordering::Relaxed);
    }

    /// Counts a lease for which there is no slot, and orders the count before the caller's next
    /// reads.
    pub(crate) fn count(&self) {
        // Only forgotten leases can reach this count. If the count wrapped around, the region would
        // be deregistered under its leases.
        if self.counted.fetch_add(1, Ordering::Relaxed) > u32::MAX / 2 {
            std::process::abort();
        }
        // ORDER(cache-lease): as in `Slot::publish`.
        full();
    }

    pub(crate) fn uncount(&self) {
        // ORDER(cache-done): as in `Slot::clear`.
        self.counted
            .fetch_sub(1, unless("uncount_relaxed", Ordering::Release));
        // ORDER(cache-unlease): as in `Slot::clear`.
        full();
    }

    pub(crate) fn is_counted(&self) -> bool {
        // ORDER(cache-done): Acquire; partner in `uncount`.
        self.counted
            .load(unless("count_read_relaxed", Ordering::Acquire))
            != 0
    }
}

#[inline(always)]
fn range(first: u64, last: u64) -> VaRange {
    match (last.wrapping_sub(first)).checked_add(1) {
        Some(len) => VaRange::covering(Va::new(first), len.max(1)).unwrap_or(VaRange::ALL),
        None => VaRange::ALL,
    }
}

/// The states of a region, in the order in which it passes through them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    /// 1. Unused: on the free list, or never used so far.
    Free = 0,
    /// 2. The registrar is registering the region. On the list of registrations in progress.
    Registering = 1,
    /// 3. Registered, and look-ups find it. On the eviction list.
    Live = 2,
    /// 4. Out of the look-up. The slots have not been scanned for its leases yet. On the list of
    ///    killed regions.
    Killed = 3,
    /// 5. Out of the look-up, and leased. The end of the last lease makes it `Reaping`. On no list.
    Leased = 4,
    /// 6. Without a lease. The owner of the chain that contains it deregisters it and frees its
    ///    place.
    Reaping = 5,
}

/// The part that the lock guards.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Entry {
    /// The neighbours on a list, as a region's number plus one. Zero marks the end.
    pub(crate) next: u32,
    pub(crate) prev: u32,
    /// The number of the last scan that found a lease of the region.
    pub(crate) scan: u32,
    pub(crate) status: Status,
    /// Whether the region's range was invalidated while the region was being registered.
    pub(crate) hit: bool,
}

// SAFETY: zeroes are valid integers, the status `Free` and `false`.
unsafe impl Zero for Entry {
    fn zero() -> Self {
        Self {
            next: 0,
            prev: 0,
            scan: 0,
            status: Status::Free,
            hit: false,
        }
    }
}
