//! The look-up: what a hit reads and writes, without a lock.
//!
//! ```text
//!   reader, a hit                              killer: an invalidation or eviction
//!   -------------                              -----------------------------------
//!   1. header -> table -> region R
//!   2. slot of this thread = R                 1. R is dead
//!      (light fence)                           2. (heavy fence)
//!   3. is R live, and does it cover            3. is R in any slot?
//!      what was asked for?                          yes: R stays registered until that lease ends
//!        yes: R is leased                           no:  R is deregistered
//!        no:  empty the slot again
//! ```
//!
//! 1. The page of the header leads to the table. The table leads to a region that has an entry
//!    under the granule of the first address.
//! 2. The reader writes the region's number into a slot of its own thread. From now on the region
//!    is leased, provided it is still live.
//! 3. If the region is live and covers the request, the lease stands. If not, the reader empties
//!    the slot again.
//!
//! An invalidation or eviction is the *killer* of a region. There are two cases:
//!
//! * If the reader writes its slot before the killer's fence, the killer's scan finds the lease,
//!   and the region stays registered until the lease ends.
//! * If the fence comes first, step 3 of the reader finds the region dead, and the reader empties
//!   its slot.
//!
//! The end of a lease works in the reverse order: it empties the slot, and then checks whether the
//! region is still live. If the region is dead, the thread takes the lock and finds out whether
//! this was the last lease.

use crate::granule::{hash, lead};
use crate::raw::barrier;
use crate::raw::held::{Held, Place};
use crate::raw::memory::Array;
use crate::raw::page::Page;
use crate::raw::region::Region;
use crate::raw::threads::{Block, Threads};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use mmu_notifier::VaRange;
use std::{io, ptr};

/// The data that look-ups read.
#[derive(Debug)]
pub(crate) struct Index {
    pub(crate) page: Page,
    /// The regions by name. A region's name is its number plus one, and name 0 means "no region".
    regions: Array<Region>,
    pub(crate) threads: Threads,
    /// The number of hits whose leases were counted in their regions instead of a slot.
    counted_hits: AtomicU64,
    /// Whether a lease of a dead region has ended without the check whether it was the region's
    /// last lease, for example in a signal handler.
    unasked: AtomicBool,
}

/// The result of a look-up.
#[derive(Debug)]
pub(crate) enum Look<'a> {
    Hit(Held<'a>),
    /// The look-up found this region, but the region died before its lease was published. The
    /// failed lease may have been the region's last one, so the caller must check under the lock.
    Dead(u32),
    Miss,
}

impl Index {
    pub(crate) fn new(regions: u32) -> io::Result<Self> {
        Ok(Self {
            page: Page::new()?,
            regions: Array::zeroes(regions as usize + 1)?,
            threads: Threads::new(barrier::prepare())?,
            counted_hits: AtomicU64::new(0),
            unasked: AtomicBool::new(false),
        })
    }

    #[inline(always)]
    pub(crate) fn region(&self, region: u32) -> &Region {
        &self.regions[region as usize + 1]
    }

    fn name_of(&self, region: &Region) -> u32 {
        let offset = ptr::from_ref(region).addr() - self.regions.as_ptr().addr();
        (offset / size_of::<Region>()) as u32
    }

    pub(crate) fn hits(&self) -> u64 {
        self.threads.hits() + self.counted_hits.load(Ordering::Relaxed)
    }

    /// The fast path: leases a live region that covers `range`, with this thread's next slot, and
    /// only if the region is at the level with the most regions. Nearly all hits succeed here.
    ///
    /// `Err(Some(held))` is a lease of a region that is dead or does not cover `range`. The caller
    /// must end that lease.
    #[inline(always)]
    pub(crate) fn quick(&self, range: VaRange) -> Result<Held<'_>, Option<Held<'_>>> {
        let page = self.page.fields();
        let block = self.threads.mine().ok_or(None)?;
        let view = page.view().ok_or(None)?;
        let taking = block.begin().ok_or(None)?;
        let Some(slot) = block.next_slot() else {
            taking.end(false);
            return Err(None);
        };
        let found = view.probe_names(hash(range.start(), page.lead()), |name| {
            let region = self.regions.get(name as usize)?;
            slot.publish(name);
            // Check after the publication, not before: when the table was read, the place may have
            // belonged to another region.
            Some(region.visit(range))
        });
        taking.end(found == Some(true));
        match found {
            Some(true) => Ok(Held::in_slot(slot)),
            Some(false) => Err(Some(Held::in_slot(slot))),
            None => Err(None),
        }
    }

    /// Tells whether `quick` finds a region at any level in use, and has a slot for its lease.
    pub(crate) fn quick_sees_all(&self) -> bool {
        // Relaxed: if this load does not see a new level yet, the request becomes a miss, which
        // searches again under the lock.
        let one_level = self.page.levels.load(Ordering::Relaxed).is_power_of_two();
        one_level && self.threads.mine().and_then(Block::next_slot).is_some()
    }

    /// Searches all levels, still without a lock or an allocation.
    pub(crate) fn look_up(&self, range: VaRange) -> Look<'_> {
        let block = self.threads.mine().or_else(|| self.threads.join());
        let Some(taking) = block.and_then(Block::begin) else {
            return self.look_up_counted(range);
        };
        let Some(slot) = taking.block().free_slot() else {
            taking.end(false);
            return self.look_up_counted(range);
        };
        let look = self.search(range, |name| {
            let region = self.regions.get(name as usize)?;
            slot.publish(name);
            if region.visit(range) {
                return Some(Look::Hit(Held::in_slot(slot)));
            }
            // The slot still belongs to this thread: until `taking` ends, a signal handler on this
            // thread takes no slot.
            self.retract(&Held::in_slot(slot))
        });
        taking.end(matches!(look, Look::Hit(_)));
        look
    }

    /// Like `look_up`, but counts the lease in the region. For a thread without a free slot, and
    /// for a signal handler that has interrupted its thread while the thread was taking a slot.
    #[cold]
    fn look_up_counted(&self, range: VaRange) -> Look<'_> {
        self.search(range, |name| {
            let region = self.regions.get(name as usize)?;
            // Count only in a region that covers `range`, because the count is a write to shared
            // memory.
            if !region.covers(range) {
                return None;
            }
            region.count();
            if region.visit(range) {
                self.counted_hits.fetch_add(1, Ordering::Relaxed);
                return Some(Look::Hit(Held::in_region(region)));
            }
            self.retract(&Held::in_region(region))
        })
    }

    /// Calls `f` with the name of each region that the table has for the first page of `range`,
    /// until `f` returns a result.
    fn search<'a>(
        &'a self,
        range: VaRange,
        mut f: impl FnMut(u32) -> Option<Look<'a>>,
    ) -> Look<'a> {
        // Relaxed: if this load does not see a new level yet, the request becomes a miss, which
        // searches again under the lock.
        let mut levels = self.page.levels.load(Ordering::Relaxed);
        let Some(view) = self.page.view() else {
            return Look::Miss;
        };
        while levels != 0 {
            let hash = hash(range.start(), lead(levels.trailing_zeros()));
            levels &= levels - 1;
            if let Some(look) = view.probe_names(hash, &mut f) {
                return look;
            }
        }
        Look::Miss
    }

    /// Undoes a lease attempt of a region that is dead or does not cover the request. Returns
    /// `Look::Dead` if the region is dead.
    fn retract(&self, held: &Held<'_>) -> Option<Look<'_>> {
        self.end(held).map(Look::Dead)
    }

    /// Leases a region. The caller holds the lock of the cache, and has made the region or checked
    /// that it is live.
    pub(crate) fn lease_locked(&self, number: u32) -> Held<'_> {
        let region = self.region(number);
        region.visit(region.range());
        if let Some(taking) = self.threads.mine().and_then(Block::begin) {
            let slot = taking.block().free_slot();
            if let Some(slot) = slot {
                slot.publish_locked(number + 1);
            }
            taking.end(false);
            if let Some(slot) = slot {
                return Held::in_slot(slot);
            }
        }
        region.count();
        Held::in_region(region)
    }

    /// Returns the number of a leased region.
    #[inline]
    pub(crate) fn leased(&self, held: &Held<'_>) -> u32 {
        match held.place() {
            Place::Slot(slot) => slot.name() - 1,
            Place::Region(region) => self.name_of(region) - 1,
        }
    }

    /// Ends a lease. If the region is dead, returns its number. Then the caller must find out
    /// whether this was the region's last lease.
    #[inline(always)]
    #[must_use]
    pub(crate) fn end(&self, held: &Held<'_>) -> Option<u32> {
        let Place::Slot(slot) = held.place() else {
            return self.end_counted(held);
        };
        let name = slot.name();
        let region = &self.regions[name as usize];
        slot.clear();
        if region.is_live() {
            None
        } else {
            Some(name - 1)
        }
    }

    /// Leaves the check whether this was the last lease of its region to the next caller of
    /// [`take_unasked`](Self::take_unasked).
    pub(crate) fn leave_unasked(&self) {
        // ORDER(cache-unasked): Release, for the end of the lease. Partner: the Acquire in
        // `take_unasked`. If weaker, the scan could still see the lease, and no later scan would
        // check again.
        self.unasked.store(true, Ordering::Release);
    }

    /// Returns and clears the mark that `leave_unasked` sets. If the mark was set, the caller must
    /// check all dead regions for leases.
    pub(crate) fn take_unasked(&self) -> bool {
        // ORDER(cache-unasked): Acquire; partner in `leave_unasked`. The load comes first, because
        // a swap at each miss would write to shared memory.
        self.unasked.load(Ordering::Relaxed) && self.unasked.swap(false, Ordering::Acquire)
    }

    #[cold]
    #[inline(never)]
    fn end_counted(&self, held: &Held<'_>) -> Option<u32> {
        let number = self.leased(held);
        let region = self.region(number);
        region.uncount();
        (!region.is_live()).then_some(number)
    }
}
