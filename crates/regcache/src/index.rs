//! The look-up: what a hit reads and writes, without a lock.
//!
//! 1. The page of the header leads to the table, the table to a region that was entered under the granule of the first address.
//! 2. The region's number goes into a slot of this thread's own. From now on the region is leased, if it still is one.
//! 3. If the region is live and covers what is asked for, the lease stands. If not, the slot is emptied again.
//!
//! Whoever takes a region out marks it dead, executes the heavy fence and then looks at all slots. Of the two sides one sees
//! the other: either step 3 finds the region dead, or the look at the slots finds the lease, and the region stays
//! registered until the lease ends. The end of a lease is the same in reverse: it empties the slot and then looks whether the region
//! is still live; if not, it asks under the lock whether it was the last.

use crate::granule::{hash, lead};
use crate::raw::barrier;
use crate::raw::memory::Array;
use crate::raw::page::Page;
use crate::raw::region::Region;
use crate::raw::threads::{Block, Slot, Threads};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::mutant;
use mmu_notifier::VaRange;
use std::{io, ptr};

/// What look-ups read.
#[derive(Debug)]
pub(crate) struct Index {
    pub(crate) page: Page,
    pub(crate) regions: Array<Region>,
    pub(crate) threads: Threads,
    /// Hits of leases that are in no slot.
    counted_hits: AtomicU64,
}

/// A region that is leased, and where that is written down.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    region: &'a Region,
    /// None: in the region.
    slot: Option<&'a Slot>,
}

impl<'a> Held<'a> {
    pub(crate) fn region(&self) -> &'a Region {
        self.region
    }
}

/// What a look-up came to.
#[derive(Debug)]
pub(crate) enum Look<'a> {
    Hit(Held<'a>),
    /// This region was found and is dead by now; if its last lease seemed to be this one, the caller has to see to it.
    Dead(&'a Region),
    Miss,
}

/// What a quick look came to.
#[derive(Debug)]
pub(crate) enum Quick<'a> {
    Hit(Held<'a>),
    /// This was the wrong region: the lease has to be ended.
    Retract(Held<'a>),
    Miss,
}

impl Index {
    pub(crate) fn new(regions: u32) -> io::Result<Self> {
        Ok(Self {
            page: Page::new()?,
            regions: Array::zeroes(regions as usize),
            threads: Threads::new(barrier::prepare()),
            counted_hits: AtomicU64::new(0),
        })
    }

    pub(crate) fn region(&self, region: u32) -> &Region {
        &self.regions[region as usize]
    }

    /// The number of a region.
    pub(crate) fn number(&self, region: &Region) -> u32 {
        let offset = ptr::from_ref(region).addr() - self.regions.as_ptr().addr();
        (offset / size_of::<Region>()) as u32
    }

    pub(crate) fn hits(&self) -> u64 {
        self.threads.hits() + self.counted_hits.load(Ordering::Relaxed)
    }

    /// Leases a live region that covers `range`, if it is found at once: in this thread's next slot, at the level that has the most
    /// regions. Nearly all hits are.
    #[inline(always)]
    pub(crate) fn quick(&self, range: VaRange) -> Quick<'_> {
        let Some(block) = self.threads.mine() else { return Quick::Miss };
        let Some(slot) = block.next_slot() else { return Quick::Miss };
        let Some(view) = self.page.view() else { return Quick::Miss };
        let found = view.probe(hash(range.start(), self.page.lead.load(Ordering::Relaxed)), |number| {
            let region = self.regions.get(number as usize)?;
            slot.publish(number);
            // Now, and not before: the place may have been another region's when the table was read.
            let stands = region.is_live() && (region.covers(range) || mutant("no_second_look"));
            Some((Held { region, slot: Some(slot) }, stands))
        });
        match found {
            Some((held, true)) => {
                held.region.visit();
                block.count_hit();
                Quick::Hit(held)
            }
            Some((held, false)) => Quick::Retract(held),
            None => Quick::Miss,
        }
    }

    /// Looks everywhere, still without a lock.
    pub(crate) fn look_up(&self, range: VaRange) -> Look<'_> {
        let block = self.threads.mine().or_else(|| self.threads.join());
        let Some((block, slot)) = block.and_then(|block| Some((block, block.free_slot()?))) else {
            return self.look_up_counted(range);
        };
        self.search(range, |number| {
            let region = self.regions.get(number as usize)?;
            slot.publish(number);
            let held = Held { region, slot: Some(slot) };
            if region.is_live() && region.covers(range) {
                region.visit();
                block.count_hit();
                return Some(Look::Hit(held));
            }
            self.retract(held)
        })
    }

    /// The same for a thread that has no free slot.
    #[cold]
    fn look_up_counted(&self, range: VaRange) -> Look<'_> {
        self.search(range, |number| {
            let region = self.regions.get(number as usize)?;
            // Not every region that hashes alike: this is a shared write.
            if !region.covers(range) {
                return None;
            }
            region.count();
            if region.is_live() && region.covers(range) {
                region.visit();
                self.counted_hits.fetch_add(1, Ordering::Relaxed);
                return Some(Look::Hit(Held { region, slot: None }));
            }
            self.retract(Held { region, slot: None })
        })
    }

    /// Calls `f` with the regions that the table has for the first page of `range`, until it returns something.
    fn search<'a>(&'a self, range: VaRange, mut f: impl FnMut(u32) -> Option<Look<'a>>) -> Look<'a> {
        // Relaxed: a level that is missed is a miss.
        let mut levels = self.page.levels.load(Ordering::Relaxed);
        let Some(view) = self.page.view() else { return Look::Miss };
        while levels != 0 {
            let hash = hash(range.start(), lead(levels.trailing_zeros()));
            levels &= levels - 1;
            if let Some(look) = view.probe(hash, &mut f) {
                return look;
            }
        }
        Look::Miss
    }

    /// Takes a lease back that did not come to stand.
    fn retract<'a>(&'a self, held: Held<'a>) -> Option<Look<'a>> {
        self.end(&held).then_some(Look::Dead(held.region))
    }

    /// Leases a region for a caller that holds the lock of the cache, and has seen that the region is live or made it.
    pub(crate) fn lease_locked(&self, number: u32) -> Held<'_> {
        let region = self.region(number);
        region.visit();
        let slot = self.threads.mine().and_then(Block::free_slot);
        match slot {
            Some(slot) => slot.publish_locked(number),
            None => region.count(),
        }
        Held { region, slot }
    }

    /// Ends a lease. True if the region is not live, and the caller has to ask whether this was the last one.
    #[inline(always)]
    #[must_use]
    pub(crate) fn end(&self, held: &Held<'_>) -> bool {
        match held.slot {
            Some(slot) => slot.clear(),
            None => held.region.uncount(),
        }
        !held.region.is_live()
    }
}
