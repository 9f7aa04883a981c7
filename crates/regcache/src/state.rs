//! The data that the lock of a cache guards: the regions, and the status of each (see [`Status`]).
//!
//! A region has a *place*: a number that selects the region's entry here, its data in the index,
//! and its handle. After the region was deregistered, another region may get the place.
//!
//! The lock is taken in callbacks that may run in the middle of `free`. So nothing here allocates,
//! frees, waits or calls the registrar. Memory is allocated before the lock is taken. Lists are
//! links between the regions' entries.

mod evict;
mod list;
mod open;

pub(crate) use list::Chain;

use crate::granule::{Granule, MAX_GRANULES, granules, hash, lead};
use crate::index::Index;
use crate::options::{Merge, Options, size, within};
use crate::raw::barrier;
use crate::raw::memory::Array;
use crate::raw::region::{Entry, Status};
use crate::raw::table::Table;
use crate::sync::atomic::Ordering;
use crate::sync::mutant;
use crate::walk::{Levels, Summary, Walked, walk};
use list::List;
use mmu_notifier::{PAGE_SIZE, VaRange};
use open::Open;
use std::io;

/// How many regions may overlap in one granule. If there are as many, a further request is merged
/// with them, even with `Merge::Never`.
const MAX_OVERLAPPING: usize = 64;

/// The counters of events so far.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    pub(crate) waits: u64,
    pub(crate) registered: u64,
    pub(crate) deregistered: u64,
    pub(crate) failed: u64,
    pub(crate) invalidated: u64,
    pub(crate) replaced: u64,
    pub(crate) evicted: u64,
    pub(crate) flushed: u64,
    pub(crate) collisions: u64,
}

/// What to do for a request.
#[derive(Debug)]
pub(crate) enum Target {
    /// This live region covers the request.
    Found(u32),
    /// Register this range for the request. The new region may replace regions that it covers.
    New { range: VaRange, replaces: bool },
}

#[derive(Debug)]
pub(crate) struct State {
    entries: Array<Entry>,
    free: u32,
    /// How many places were ever used: the places with the numbers below this one.
    high: u32,
    live: List,
    /// The live region that the eviction examines next.
    hand: u32,
    registering: List,
    killed: u32,
    scan: u32,
    summary: Summary,
    /// The number of places that are not free.
    pub(crate) regions: u32,
    /// The bytes of the regions in these places.
    pub(crate) bytes: u128,
    pub(crate) live_regions: u32,
    pub(crate) live_bytes: u128,
    open: Open,
    /// The number of regions in the chains of threads that are deregistering them.
    pub(crate) reaping: u32,
    /// Whether the address space has exited.
    pub(crate) closed: bool,
    /// The number of threads that sleep until a registration ends or a place becomes free.
    pub(crate) waiters: u32,
    pub(crate) counts: Counts,
}

/// Returns the range extended by one page on each side.
fn with_neighbours(range: VaRange) -> VaRange {
    let first = range.start().get().saturating_sub(PAGE_SIZE);
    let last = range.last().get().saturating_add(PAGE_SIZE);
    match (last - first).checked_add(1) {
        Some(len) => VaRange::covering(mmu_notifier::Va::new(first), len).unwrap_or(VaRange::ALL),
        None => VaRange::ALL,
    }
}

impl State {
    pub(crate) fn new(regions: u32) -> io::Result<Self> {
        Ok(Self {
            entries: Array::zeroes(regions as usize)?,
            free: 0,
            high: 0,
            live: List::default(),
            hand: 0,
            registering: List::default(),
            killed: 0,
            scan: 0,
            summary: Summary::new()?,
            regions: 0,
            bytes: 0,
            live_regions: 0,
            live_bytes: 0,
            open: Open::new(),
            reaping: 0,
            closed: false,
            waiters: 0,
            counts: Counts::default(),
        })
    }

    fn entry(&mut self, region: u32) -> &mut Entry {
        &mut self.entries[region as usize]
    }

    pub(crate) fn status(&self, region: u32) -> Status {
        self.entries[region as usize].status
    }

    /// Returns all places that were ever used, with their statuses. For the drop of the cache.
    pub(crate) fn used(&self) -> impl Iterator<Item = (u32, Status)> {
        (0..self.high).map(|region| (region, self.status(region)))
    }

    /// Returns a live region that covers `range`.
    fn find(&self, index: &Index, range: VaRange) -> Option<u32> {
        let view = index.page.view()?;
        let mut levels = self.summary.levels();
        while levels != 0 {
            let hash = hash(range.start(), lead(levels.trailing_zeros()));
            levels &= levels - 1;
            let found = view.probe(hash, |region| {
                (self.status(region) == Status::Live && index.region(region).covers(range))
                    .then_some(region)
            });
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// Tells whether so many regions have entries under a granule of `range` that look-ups there
    /// are slow.
    fn is_crowded(&self, index: &Index, range: VaRange) -> bool {
        let Some(view) = index.page.view() else {
            return false;
        };
        granules(range).any(|granule| {
            let mut passed = 0;
            view.probe(granule.hash(), |_| {
                passed += 1;
                (passed == MAX_OVERLAPPING).then_some(())
            })
            .is_some()
        })
    }

    /// Calls `f` with every granule that may have an entry of a region that overlaps `range`. Gives
    /// up if there are more such granules than regions (plus 64), because then it is cheaper to
    /// examine every region.
    fn walk(&mut self, range: VaRange, f: impl FnMut(&mut Self, Granule)) -> Walked {
        let limit = u64::from(self.high) + 64;
        walk(self, |state| &state.summary, range, limit, f)
    }

    /// Calls `f` with every live region that overlaps `range`, possibly more than once.
    fn each_overlapping(&mut self, index: &Index, range: VaRange, mut f: impl FnMut(u32)) {
        let Some(view) = index.page.view() else {
            return;
        };
        let walked = self.walk(range, |state, granule| {
            let _: Option<()> = view.probe(granule.hash(), |region| {
                if state.is_live_in(index, region, range) {
                    f(region);
                }
                None
            });
        });
        if walked == Walked::TooFar {
            (0..self.high)
                .filter(|region| self.is_live_in(index, *region, range))
                .for_each(&mut f);
        }
    }

    fn is_live_in(&self, index: &Index, region: u32, range: VaRange) -> bool {
        self.status(region) == Status::Live && index.region(region).overlaps(range)
    }

    /// Decides what to do for `request`: lease a live region that covers it, or register a range.
    pub(crate) fn target(&mut self, index: &Index, options: &Options, request: VaRange) -> Target {
        let (mut target, mut replaces, mut found) = (request, false, None);
        if options.merge == Merge::Never {
            if let Some(region) = self.find(index, request) {
                return Target::Found(region);
            }
            if !self.is_crowded(index, request) {
                return Target::New {
                    range: request,
                    replaces,
                };
            }
        }
        loop {
            let around = match options.merge {
                Merge::Never | Merge::Overlapping => target,
                Merge::Adjacent => with_neighbours(target),
            };
            let mut grown = target;
            self.each_overlapping(index, around, |region| {
                replaces = true;
                let other = index.region(region);
                if other.covers(request) {
                    found = Some(region);
                }
                let union = grown.hull(other.range());
                if within(size(union), options.max_region_bytes) {
                    grown = union;
                }
            });
            match found {
                Some(region) => return Target::Found(region),
                None if grown == target => {
                    return Target::New {
                        range: target,
                        replaces,
                    };
                }
                None => target = grown,
            }
        }
    }

    /// Tells whether the request should wait for a registration in progress.
    pub(crate) fn has_to_wait(&self, index: &Index, merge: Merge, range: VaRange) -> bool {
        let mut next = self.registering.head;
        while let Some(region) = next.checked_sub(1) {
            let other = index.region(region);
            let entry = &self.entries[region as usize];
            // If an invalidation has hit a registration, no look-up will find its region, so there
            // is nothing to wait for.
            if !entry.hit
                && (other.covers(range) || (merge != Merge::Never && other.overlaps(range)))
            {
                return true;
            }
            next = entry.next;
        }
        false
    }

    /// Takes a free place for a region that is about to be registered.
    pub(crate) fn begin(&mut self, index: &Index, range: VaRange) -> Option<u32> {
        let region = match self.free.checked_sub(1) {
            Some(region) => {
                self.free = self.entries[region as usize].next;
                region
            }
            None if (self.high as usize) < self.entries.len() => {
                self.high += 1;
                self.high - 1
            }
            None => return None,
        };
        self.regions += 1;
        self.bytes += size(range);
        index.region(region).set_range(range);
        // An invalidation that has already begun may change the pages after they were registered.
        let hit = self.is_invalidating(range) && !mutant("forget_open_brackets");
        *self.entry(region) = Entry {
            next: 0,
            prev: 0,
            scan: 0,
            status: Status::Registering,
            hit,
        };
        self.registering.push(&mut self.entries, region);
        Some(region)
    }

    /// Removes a region from the list of registrations in progress. Tells whether other requests
    /// may find the region.
    pub(crate) fn finish(&mut self, region: u32) -> bool {
        self.registering.remove(&mut self.entries, region);
        let may_be_found =
            !self.closed && (!self.entry(region).hit || mutant("publish_what_was_hit"));
        self.entry(region).status = Status::Reaping;
        may_be_found
    }

    /// Tells whether the table has room for one more region.
    pub(crate) fn has_table(&self, index: &Index) -> bool {
        index
            .page
            .tables()
            .newest()
            .is_some_and(|table| table.has_room(MAX_GRANULES as usize))
    }

    /// Publishes a region that was just registered. If `replaces` is set, removes the other regions
    /// that the new region covers from the look-up.
    ///
    /// `replaces` was decided before the registration. It is still right: since then no other
    /// region inside this one was published, because a request for such a region waits until this
    /// registration ends.
    pub(crate) fn publish(&mut self, index: &Index, region: u32, replaces: bool) {
        let range = index.region(region).range();
        if replaces {
            self.counts.replaced += self.kill_where(index, range, |other| range.covers(other));
        }
        let Some(table) = index.page.tables().newest() else {
            return;
        };
        granules(range).for_each(|granule| table.insert(granule.hash(), region));
        let levels = self.summary.add(range);
        self.live_regions += 1;
        self.live_bytes += size(range);
        self.entry(region).status = Status::Live;
        self.live.push(&mut self.entries, region);
        index.region(region).set_live();
        if levels == Levels::Others {
            self.tell_levels(index);
        }
    }

    /// Stores the levels in use, and the level with the most regions, in the header page, where
    /// look-ups read them.
    fn tell_levels(&mut self, index: &Index) {
        index.page.set_lead(lead(self.summary.find_largest()));
        index
            .page
            .levels
            .store(self.summary.levels(), Ordering::Relaxed);
    }

    /// Keeps a registered region out of the look-up. Only the caller's lease keeps the region
    /// registered.
    pub(crate) fn keep_for_lease(&mut self, region: u32) {
        self.entry(region).status = Status::Leased;
    }

    /// Removes a live region from the look-up.
    fn kill(&mut self, index: &Index, table: &Table, region: u32) {
        let range = index.region(region).range();
        index.region(region).set_dead();
        for granule in granules(range) {
            table.remove(granule.hash(), region);
        }
        self.summary.remove(range);
        self.live_regions -= 1;
        self.live_bytes -= size(range);
        if self.hand == region + 1 {
            self.hand = self.entry(region).prev;
        }
        self.live.remove(&mut self.entries, region);
        self.entries[region as usize].status = Status::Killed;
        self.entries[region as usize].next = self.killed;
        self.killed = region + 1;
    }

    /// Removes all live regions that overlap `range` and that `wanted` accepts from the look-up.
    /// Returns how many it removed.
    fn kill_where(
        &mut self,
        index: &Index,
        range: VaRange,
        wanted: impl Fn(VaRange) -> bool,
    ) -> u64 {
        let Some(table) = index.page.tables().newest() else {
            return 0;
        };
        let mut killed = 0;
        let walked = self.walk(range, |state, granule| {
            while let Some(region) = state.first_in(index, table, granule, range, &wanted) {
                state.kill(index, table, region);
                killed += 1;
            }
        });
        if walked == Walked::TooFar {
            for region in 0..self.high {
                if self.is_live_in(index, region, range) && wanted(index.region(region).range()) {
                    self.kill(index, table, region);
                    killed += 1;
                }
            }
        }
        if killed != 0 {
            self.tell_levels(index);
        }
        killed
    }

    fn first_in(
        &self,
        index: &Index,
        table: &Table,
        granule: Granule,
        range: VaRange,
        wanted: impl Fn(VaRange) -> bool,
    ) -> Option<u32> {
        table.view().probe(granule.hash(), |region| {
            (self.is_live_in(index, region, range) && wanted(index.region(region).range()))
                .then_some(region)
        })
    }

    /// Begins an invalidation: until its end, no look-up finds a region that overlaps `range`.
    pub(crate) fn invalidate_start(&mut self, index: &Index, range: VaRange) {
        self.open.begin(range);
        self.invalidate(index, range);
    }

    /// Ends an invalidation.
    pub(crate) fn invalidate_end(&mut self, range: VaRange) {
        self.open.end(range);
    }

    /// Tells whether an invalidation is open that may overlap `range`.
    pub(crate) fn is_invalidating(&self, range: VaRange) -> bool {
        self.open.overlaps(range)
    }

    /// Removes every region that overlaps `range` from the look-up, and marks overlapping
    /// registrations in progress.
    pub(crate) fn invalidate(&mut self, index: &Index, range: VaRange) {
        if !mutant("invalidate_nothing") {
            self.counts.invalidated += self.kill_where(index, range, |_| true);
        }
        let mut next = self.registering.head;
        while let Some(region) = next.checked_sub(1) {
            let entry = &mut self.entries[region as usize];
            entry.hit |= index.region(region).overlaps(range);
            next = entry.next;
        }
    }

    /// Removes every region from the look-up. Returns how many were live.
    pub(crate) fn kill_all(&mut self, index: &Index) -> u64 {
        self.kill_where(index, VaRange::ALL, |_| true)
    }

    /// Finds the killed regions without a lease. The caller must deregister them.
    pub(crate) fn harvest(&mut self, index: &Index) -> Chain {
        let mut chain = Chain(0);
        if index.take_unasked() {
            self.ask_again();
        }
        // ORDER(cache-lease, cache-unlease): heavy fence between the deaths of the regions and the
        // scan of the slots. Partner: the light fences in `Slot::publish` and `Slot::clear`.
        if self.killed == 0 || (!mutant("no_fence_in_harvest") && !barrier::heavy()) {
            return chain;
        }
        self.scan_leases(index);
        let mut next = std::mem::take(&mut self.killed);
        while let Some(region) = next.checked_sub(1) {
            next = self.entry(region).next;
            self.settle(index, region, &mut chain);
        }
        chain
    }

    /// Moves the leased dead regions to the list of killed regions, so that the next scan checks
    /// them again.
    #[cold]
    fn ask_again(&mut self) {
        for region in 0..self.high {
            if self.status(region) == Status::Leased {
                let next = std::mem::replace(&mut self.killed, region + 1);
                let entry = self.entry(region);
                (entry.status, entry.next) = (Status::Killed, next);
            }
        }
    }

    /// Stores the number of this scan in the entry of each region that a slot names.
    fn scan_leases(&mut self, index: &Index) {
        self.scan = self.scan.wrapping_add(1).max(1);
        let (scan, entries) = (self.scan, &mut self.entries);
        index.threads.each(|region| {
            if let Some(entry) = entries.get_mut(region as usize) {
                entry.scan = scan;
            }
        });
    }

    fn is_leased(&self, index: &Index, region: u32) -> bool {
        self.entries[region as usize].scan == self.scan || index.region(region).is_counted()
    }

    /// Adds a dead region to the chain if the last scan found no lease of it.
    fn settle(&mut self, index: &Index, region: u32, chain: &mut Chain) {
        if self.is_leased(index, region) {
            self.entry(region).status = Status::Leased;
        } else {
            self.link(region, chain);
        }
    }

    fn link(&mut self, region: u32, chain: &mut Chain) {
        let entry = self.entry(region);
        entry.status = Status::Reaping;
        entry.next = chain.0;
        chain.0 = region + 1;
        self.reaping += 1;
    }

    /// Makes a chain of one region, which is registered and in no look-up.
    pub(crate) fn chain_of(&mut self, region: u32) -> Chain {
        let mut chain = Chain(0);
        self.link(region, &mut chain);
        chain
    }

    /// Tells whether a registration is in progress.
    pub(crate) fn is_registering(&self) -> bool {
        self.registering.head != 0
    }

    /// Handles the end of a lease of a region that was already dead. Another region may have taken
    /// over its place meanwhile, so the status in the place decides.
    pub(crate) fn lease_ended(&mut self, index: &Index, region: u32) -> Chain {
        match self.status(region) {
            // This scan needs no fence. No new lease of the region can begin. If the scan still
            // sees another lease, the thread that ends that lease takes the lock later and scans
            // again.
            Status::Leased => {
                let mut chain = Chain(0);
                self.scan_leases(index);
                self.settle(index, region, &mut chain);
                chain
            }
            Status::Killed => self.harvest(index),
            _ => Chain(0),
        }
    }

    /// Takes the next region off the chain.
    pub(crate) fn next_of(&mut self, chain: &mut Chain) -> Option<u32> {
        let region = chain.0.checked_sub(1)?;
        chain.0 = self.entry(region).next;
        Some(region)
    }

    /// Frees the place of a region that was in a chain.
    pub(crate) fn reaped(&mut self, index: &Index, region: u32) {
        self.free(index, region);
        self.reaping -= 1;
        self.counts.deregistered += 1;
    }

    /// Frees the place of a region that is not registered.
    pub(crate) fn free(&mut self, index: &Index, region: u32) {
        self.regions -= 1;
        self.bytes -= size(index.region(region).range());
        let free = std::mem::replace(&mut self.free, region + 1);
        *self.entry(region) = Entry {
            next: free,
            prev: 0,
            scan: 0,
            status: Status::Free,
            hit: false,
        };
    }

    /// Tells whether another region of `size` bytes is within the limits.
    pub(crate) fn has_room(&self, options: &Options, size: u128) -> bool {
        self.regions < options.max_regions && within(self.bytes + size, options.max_bytes)
    }
}
