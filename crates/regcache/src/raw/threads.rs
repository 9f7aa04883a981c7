//! Where leases are counted without a shared write: for each thread a block of slots, each of which
//! names one region or none.
//!
//! Only a slot's own thread writes a region into it; the thread that ends the lease, which may be
//! another, empties it. A thread whose slots are all in use, and one without a number, counts in
//! the region itself. So does a signal handler that has interrupted its thread between the look at
//! a free slot and the write to it: see [`Block::begin`].

use super::barrier::light;
use super::memory::{Zero, boxed};
use super::number;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::unless;

/// Slots of one thread.
const SLOTS: usize = if cfg!(mmun_loom) { 2 } else { 124 };
/// Slots that a hit looks at before it gives up.
const PROBES: usize = if cfg!(mmun_loom) { 1 } else { 8 };

/// One thread's slots in one cache: eight lines, the first of which does for a thread with few
/// leases.
#[repr(C, align(128))]
#[derive(Debug)]
pub(crate) struct Block {
    /// Twice the hits, plus one while the thread takes a slot.
    hits: AtomicU64,
    /// Where the owner looks if the first slot is in use.
    cursor: AtomicU32,
    /// The last slot that was ever used.
    last: AtomicU32,
    slots: [Slot; SLOTS],
}

// SAFETY: Integers.
unsafe impl Zero for Block {
    fn zero() -> Self {
        Self {
            hits: AtomicU64::new(0),
            cursor: AtomicU32::new(0),
            last: AtomicU32::new(0),
            slots: std::array::from_fn(|_| Slot(AtomicU32::new(0))),
        }
    }
}

/// A place that can name a region.
#[derive(Debug)]
pub(crate) struct Slot(AtomicU32);

/// The blocks of all threads that have a number: address space, which takes memory when a thread
/// comes.
#[derive(Debug)]
pub(crate) struct Threads {
    /// Empty if slots cannot be used.
    blocks: Box<[Block]>,
}

impl Slot {
    /// Names a region, and orders that before what the caller reads next.
    #[inline(always)]
    pub(crate) fn publish(&self, name: u32) {
        self.publish_locked(name);
        // ORDER(cache-lease): The name, before the look at the region's state. Partner: the heavy
        // fence in `harvest`, between the state and the look at the slots. Without it a region is
        // deregistered under a fresh lease. Model: loom `a_hit_racing_an_invalidation`.
        if !crate::sync::mutant("no_fence_in_hit") {
            light();
        }
    }

    /// Names a region, for a caller that holds the lock of the cache.
    #[inline(always)]
    pub(crate) fn publish_locked(&self, name: u32) {
        // ORDER(cache-done): Release, and the Acquire in `is_free`: who finds this name has to know
        // that the lease before, whose end it overwrites, is over. A plain store breaks the release
        // sequence of `clear`.
        self.0
            .store(name, unless("publish_relaxed", Ordering::Release));
    }

    /// The name of the region, for who holds the lease.
    #[inline(always)]
    pub(crate) fn name(&self) -> u32 {
        // Relaxed: no other thread writes to it meanwhile.
        self.0.load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn is_free(&self) -> bool {
        // ORDER(cache-done): Acquire, for the lease that another thread may have ended. Partner:
        // `clear`.
        self.0.load(unless("is_free_relaxed", Ordering::Acquire)) == 0
    }

    /// Names none, and orders that before what the caller reads next.
    #[inline(always)]
    pub(crate) fn clear(&self) {
        // ORDER(cache-done): Release for what was done under the lease. Partner: the Acquire in
        // `each`. If weaker, the deregistration could overtake the last use.
        self.0.store(0, unless("clear_relaxed", Ordering::Release));
        // ORDER(cache-unlease): The end, before the look at the region's state. Partner: the heavy
        // fence in `harvest`. Without it both sides leave the deregistration to each other. Model:
        // loom `the_last_lease_deregisters`.
        if !crate::sync::mutant("no_fence_in_drop") {
            light();
        }
    }
}

impl Block {
    /// The slot to take, if it is free: the first, whose address is known without a look into
    /// memory, or the one that was used last. A processor that may not read ahead of a store whose
    /// place it does not know yet is twice as fast so. The caller is the block's thread.
    #[inline(always)]
    pub(crate) fn next_slot(&self) -> Option<&Slot> {
        if self.slots[0].is_free() {
            return Some(&self.slots[0]);
        }
        let slot = self
            .slots
            .get(self.cursor.load(Ordering::Relaxed) as usize)?;
        slot.is_free().then_some(slot)
    }

    /// A slot that names none, if there is one. The caller is the block's thread.
    pub(crate) fn free_slot(&self) -> Option<&Slot> {
        self.next_slot().or_else(|| self.search())
    }

    /// Looks further. Not much further: a thread with very many leases finds its way back by and
    /// by.
    #[cold]
    #[inline(never)]
    fn search(&self) -> Option<&Slot> {
        let from = self.cursor.load(Ordering::Relaxed) as usize;
        for at in (from + 1..=from + PROBES).map(|at| at % SLOTS) {
            self.cursor.store(at as u32, Ordering::Relaxed);
            let slot = &self.slots[at];
            if slot.is_free() {
                // Relaxed: a scan that must find the slot in use comes after the heavy fence, and
                // finds this store, too.
                self.last.fetch_max(at as u32, Ordering::Relaxed);
                return Some(slot);
            }
        }
        None
    }

    /// Begins to take a slot; none if this thread is at that already, which a signal handler has
    /// interrupted. The handler's lease goes elsewhere: the interrupted code may have seen any slot
    /// free, and would write over it. The caller is the block's thread.
    #[inline(always)]
    pub(crate) fn begin(&self) -> Option<Taking<'_>> {
        let before = self.hits.load(Ordering::Relaxed);
        if before & 1 != 0 {
            return None;
        }
        self.hits.store(before + 1, Ordering::Relaxed);
        // ORDER: The mark before the look at a slot, for handlers on this thread: the compiler
        // alone could change the order.
        compiler_fence();
        Some(Taking {
            block: self,
            before,
        })
    }
}

/// A slot is being taken by this thread, until `end`.
#[must_use = "all later leases would be counted in their regions"]
#[derive(Debug)]
pub(crate) struct Taking<'a> {
    block: &'a Block,
    before: u64,
}

impl<'a> Taking<'a> {
    #[inline(always)]
    pub(crate) fn block(&self) -> &'a Block {
        self.block
    }

    /// A slot was taken, or none was; counts a hit if it was one.
    #[inline(always)]
    pub(crate) fn end(self, hit: bool) {
        // ORDER: The write to the slot before the mark goes, as in `begin`.
        compiler_fence();
        self.block
            .hits
            .store(self.before + 2 * u64::from(hit), Ordering::Relaxed);
    }
}

/// Models have no signal handlers.
#[inline(always)]
fn compiler_fence() {
    #[cfg(not(mmun_loom))]
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
}

impl Threads {
    /// Without slots there are no blocks, and every lease is counted in its region.
    pub(crate) fn new(slots: bool) -> Self {
        Self {
            blocks: boxed(if slots { number::MAX } else { 0 }),
        }
    }

    /// This thread's block, if it has a number already.
    #[inline(always)]
    pub(crate) fn mine(&self) -> Option<&Block> {
        self.blocks.get(number::mine())
    }

    /// This thread's block, with a number if need be; none if there are too many threads.
    #[cold]
    pub(crate) fn join(&self) -> Option<&Block> {
        if self.blocks.is_empty() {
            return None;
        }
        self.blocks.get(number::claim())
    }

    /// Calls `f` with each region that a slot names, as often as one does.
    pub(crate) fn each(&self, mut f: impl FnMut(u32)) {
        for block in self.blocks.iter().take(number::high()) {
            for slot in &block.slots[..=block.last.load(Ordering::Relaxed) as usize] {
                // ORDER(cache-done): Acquire, partner in `clear`.
                if let Some(region) = slot
                    .0
                    .load(unless("each_relaxed", Ordering::Acquire))
                    .checked_sub(1)
                {
                    f(region);
                }
            }
        }
    }

    /// The hits of all threads so far.
    pub(crate) fn hits(&self) -> u64 {
        self.blocks
            .iter()
            .take(number::high())
            .map(|block| block.hits.load(Ordering::Relaxed) / 2)
            .sum()
    }
}
