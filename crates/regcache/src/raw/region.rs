//! What is kept for each region: the part that look-ups read, and the part that the lock guards.

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
    /// `LIVE` or not, and `VISITED` if it was used since the hand of the eviction passed.
    state: AtomicU32,
    /// Leases that are in no slot.
    counted: AtomicU32,
}

const VISITED: u32 = 1;
/// Found by look-ups. The higher bit, so that one comparison tells.
const LIVE: u32 = 2;

// SAFETY: Integers.
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
    /// The range. Certain only for who holds the lock, or has a lease.
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
        // ORDER(cache-live): Acquire for the range and the handle. Partner: the Release in
        // `set_live`. If weaker, a lease could show the handle of the region that had this place
        // before.
        self.state.load(Ordering::Acquire)
    }

    /// Whether it is live and covers `range`, and if so, notes a use. Writes only if the hand of
    /// the eviction has passed since the last one.
    #[inline(always)]
    pub(crate) fn visit(&self, range: VaRange) -> bool {
        // In this order: see `state`.
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
        // Relaxed: a hint. On a region that has died or is another one by now it does no harm.
        self.state.fetch_or(VISITED, Ordering::Relaxed);
        true
    }

    /// Forgets the uses; tells whether there were any.
    pub(crate) fn forget_visits(&self) -> bool {
        let visited = self.state.load(Ordering::Relaxed) & VISITED != 0;
        if visited {
            self.state.fetch_and(!VISITED, Ordering::Relaxed);
        }
        visited
    }

    pub(crate) fn set_live(&self) {
        // ORDER(cache-live): Release, partner in `state`.
        self.state.store(LIVE, Ordering::Release);
    }

    pub(crate) fn set_dead(&self) {
        // Relaxed: the heavy fence orders it, ORDER(cache-lease). ORDER(cache-use): It comes before
        // the change, as the system call that makes the change does not begin before. Partner: the
        // fence in `Lease::is_current`. A swap and no store, for loom: it would not know that a
        // `mark` this overwrites comes before it, and go on showing the mark.
        self.state.swap(0, Ordering::Relaxed);
    }

    /// Counts a lease for which there is no slot, and orders that before what the caller reads
    /// next.
    pub(crate) fn count(&self) {
        // So many can only be forgotten ones. Should the count wrap, a region would be deregistered
        // under its leases.
        if self.counted.fetch_add(1, Ordering::Relaxed) > u32::MAX / 2 {
            std::process::abort();
        }
        // ORDER(cache-lease): As in `Slot::publish`.
        full();
    }

    pub(crate) fn uncount(&self) {
        // ORDER(cache-done): As in `Slot::clear`.
        self.counted
            .fetch_sub(1, unless("uncount_relaxed", Ordering::Release));
        // ORDER(cache-unlease): As in `Slot::clear`.
        full();
    }

    pub(crate) fn is_counted(&self) -> bool {
        // ORDER(cache-done): Acquire, partner in `uncount`.
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

/// What a region is going through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    /// 1. Unused. On the free list, or never used so far.
    Free = 0,
    /// 2. The registrar is at it. On the list of those.
    Registering = 1,
    /// 3. Registered, and found by look-ups. On the list of the eviction.
    Live = 2,
    /// 4. Out of the look-up; the slots have not been scanned for its leases yet. On the list of
    ///    the killed.
    Killed = 3,
    /// 5. Out of the look-up, and leased: the end of the last lease moves it on. On no list.
    Leased = 4,
    /// 6. Without a lease: the owner of the chain that it is in deregisters it, and frees the
    ///    place.
    Reaping = 5,
}

/// The part that the lock guards.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Entry {
    /// Neighbours on a list; a region's number plus one, zero at the end.
    pub(crate) next: u32,
    pub(crate) prev: u32,
    /// The last scan that found it leased.
    pub(crate) scan: u32,
    pub(crate) status: Status,
    /// Whether its range was invalidated while it was being registered.
    pub(crate) hit: bool,
}

// SAFETY: Zeroes are integers, the status `Free` and `false`.
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
