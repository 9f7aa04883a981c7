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

use crate::granule::granule_at;
use crate::raw::barrier::{self, Light};
use crate::raw::memory::zeroes;
use crate::raw::page::Page;
use crate::raw::region::Region;
use crate::raw::threads::{Block, Slot, Threads};
use crate::sync::atomic::Ordering;
use crate::sync::mutant;
use mmu_notifier::VaRange;
use std::io;

/// What look-ups read.
#[derive(Debug)]
pub(crate) struct Index {
    pub(crate) page: Page,
    pub(crate) regions: Box<[Region]>,
    pub(crate) threads: Threads,
    light: Light,
}

/// A region that is leased, and where that is written down.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    pub(crate) region: u32,
    /// None: in the region.
    slot: Option<&'a Slot>,
}

/// What a look-up came to.
#[derive(Debug)]
pub(crate) enum Look<'a> {
    Hit(Held<'a>),
    /// This region was found and is dead by now; if its last lease seemed to be this one, the caller has to see to it.
    Dead(u32),
    Miss,
}

impl Index {
    pub(crate) fn new(regions: u32) -> io::Result<Self> {
        Ok(Self {
            page: Page::new()?,
            regions: zeroes(regions as usize),
            threads: Threads::new(),
            light: barrier::prepare(),
        })
    }

    pub(crate) fn region(&self, region: u32) -> &Region {
        &self.regions[region as usize]
    }

    /// Leases a live region that covers `range`, if this finds one.
    #[inline(always)]
    pub(crate) fn look_up(&self, range: VaRange) -> Look<'_> {
        let Some(block) = self.threads.mine() else { return Look::Miss };
        let Some(slot) = block.free_slot() else { return Look::Miss };
        self.look_up_in(block, slot, range)
    }

    #[inline(always)]
    fn look_up_in<'a>(&'a self, block: &'a Block, slot: &'a Slot, range: VaRange) -> Look<'a> {
        let Some(view) = self.page.view() else { return Look::Miss };
        // Relaxed: a level that is missed is a miss.
        let mut levels = self.page.levels.load(Ordering::Relaxed);
        while levels != 0 {
            let hash = granule_at(range.start(), levels.trailing_zeros()).hash();
            levels &= levels - 1;
            let found = view.probe(hash, |number| {
                let region = self.regions.get(number as usize)?;
                if !region.covers(range) {
                    return None;
                }
                slot.publish(number, self.light);
                // Again: the place may have been another region's before.
                if region.is_live() && (region.covers(range) || mutant("no_second_look")) {
                    region.visit();
                    block.count_hit();
                    return Some(Look::Hit(Held { region: number, slot: Some(slot) }));
                }
                slot.clear(self.light);
                Some(Look::Dead(number))
            });
            if let Some(look) = found {
                return look;
            }
        }
        Look::Miss
    }

    /// Leases a region for a caller that holds the lock of the cache, and has seen that the region is live or made it.
    pub(crate) fn lease_locked(&self, number: u32) -> Held<'_> {
        self.region(number).visit();
        let block = self.threads.mine();
        let slot = block.and_then(Block::free_slot);
        match slot {
            Some(slot) => slot.publish_locked(number),
            None => self.region(number).count(self.light),
        }
        Held { region: number, slot }
    }

    /// Ends a lease. True if the region is not live, and the caller has to ask whether this was the last one.
    #[inline(always)]
    #[must_use]
    pub(crate) fn end(&self, held: &Held<'_>) -> bool {
        match held.slot {
            Some(slot) => slot.clear(self.light),
            None => self.region(held.region).uncount(self.light),
        }
        !self.region(held.region).is_live()
    }
}
