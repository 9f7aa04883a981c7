//! Where leases are counted without a shared write: for each thread a block of slots, each of which names one region or none.
//!
//! A slot goes from none to a region by its own thread only, and back by whoever ends the lease, on any thread. A thread
//! whose slots are all in use, and one without a number, counts in the region itself.

use super::barrier::light;
use super::memory::{Zero, boxed_array};
use super::number;
use crate::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::ptr::{self, NonNull};

/// Slots of one thread: as many as a cursor can tell apart, so that it needs no check.
const SLOTS: usize = if cfg!(mmun_loom) { 2 } else { 256 };
/// Slots that a hit looks at before it gives up.
const PROBES: usize = if cfg!(mmun_loom) { 1 } else { 8 };

/// One thread's slots in one cache: a kilobyte, the first line of which does for a thread with few leases.
#[repr(C, align(128))]
#[derive(Debug)]
pub(crate) struct Block {
    hits: AtomicU64,
    /// Where the owner looks first.
    cursor: AtomicU8,
    /// How many of the slots were ever used.
    used: AtomicU32,
    slots: [Slot; SLOTS],
}

/// A place that can name a region.
#[derive(Debug)]
pub(crate) struct Slot(AtomicU32);

/// The blocks of all threads.
#[derive(Debug)]
pub(crate) struct Threads {
    /// A box of the one size there is, so that the check of a number needs none.
    blocks: Box<[BlockPtr; number::MAX]>,
    /// Whether slots can be used. If not, there is no block.
    slots: bool,
}

/// # Invariants
/// Null, or a block that lives as long as the table.
#[derive(Debug)]
#[repr(transparent)]
struct BlockPtr(AtomicPtr<Block>);

// SAFETY: Zero is the null pointer.
unsafe impl Zero for BlockPtr {
    fn zero() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }
}

impl Slot {
    /// Names a region, and orders that before what the caller reads next.
    #[inline(always)]
    pub(crate) fn publish(&self, name: u32) {
        self.publish_locked(name);
        // ORDER(cache-lease): The name, before the look at the region's state. Partner: the heavy fence in `harvest`, between the state and
        // the look at the slots. Without it a region is deregistered under a fresh lease. Model: loom
        // `a_hit_racing_an_invalidation`.
        if !crate::sync::mutant("no_fence_in_hit") {
            light();
        }
    }

    /// Names a region, for a caller that holds the lock of the cache.
    #[inline(always)]
    pub(crate) fn publish_locked(&self, name: u32) {
        // ORDER(cache-done): Release, and the Acquire in `is_free`: who finds this name has to know that the lease before, whose
        // end it overwrites, is over. A plain store breaks the release sequence of `clear`.
        self.0.store(name, Ordering::Release);
    }

    /// The name of the region, for who holds the lease.
    #[inline(always)]
    pub(crate) fn name(&self) -> u32 {
        // Relaxed: nobody else writes to it meanwhile.
        self.0.load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn is_free(&self) -> bool {
        // ORDER(cache-done): Acquire, for the lease that another thread may have ended. Partner: `clear`.
        self.0.load(Ordering::Acquire) == 0
    }

    /// Names none, and orders that before what the caller reads next.
    #[inline(always)]
    pub(crate) fn clear(&self) {
        // ORDER(cache-done): Release for what was done under the lease. Partner: the Acquire in `each`. Weaker, the
        // deregistration could overtake the last use.
        self.0.store(0, Ordering::Release);
        // ORDER(cache-unlease): The end, before the look at the region's state. Partner: the heavy fence in `harvest`. Without it both
        // sides leave the deregistration to each other. Model: loom `the_last_lease_deregisters`.
        if !crate::sync::mutant("no_fence_in_drop") {
            light();
        }
    }
}

impl Block {
    fn new() -> Box<Self> {
        Box::new(Self {
            hits: AtomicU64::new(0),
            cursor: AtomicU8::new(0),
            used: AtomicU32::new(1),
            slots: std::array::from_fn(|_| Slot(AtomicU32::new(0))),
        })
    }

    /// A slot that names none, if there is one: mostly the one that was used last. The caller is the block's thread.
    #[inline(always)]
    pub(crate) fn free_slot(&self) -> Option<&Slot> {
        match self.slots.get(self.cursor.load(Ordering::Relaxed) as usize) {
            Some(slot) if slot.is_free() => Some(slot),
            _ => self.search(),
        }
    }

    /// Looks further. Not much further: a thread with very many leases finds its way back by and by.
    #[cold]
    #[inline(never)]
    fn search(&self) -> Option<&Slot> {
        let from = self.cursor.load(Ordering::Relaxed) as usize;
        for at in (from + 1..=from + PROBES).map(|at| at % SLOTS) {
            self.cursor.store(at as u8, Ordering::Relaxed);
            let slot = &self.slots[at];
            if slot.is_free() {
                // Relaxed: whoever finds the slot in use with certainty, after its fence, finds this store, too.
                self.used.fetch_max(at as u32 + 1, Ordering::Relaxed);
                return Some(slot);
            }
        }
        None
    }

    /// Counts a hit. The caller is the block's thread.
    #[inline(always)]
    pub(crate) fn count_hit(&self) {
        self.hits.store(self.hits.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

impl Threads {
    /// Without slots there are no blocks, and every lease is counted in its region.
    pub(crate) fn new(slots: bool) -> Self {
        Self { blocks: boxed_array(), slots }
    }

    /// This thread's block, if it has one here already.
    #[inline(always)]
    pub(crate) fn mine(&self) -> Option<&Block> {
        self.blocks.get(number::mine())?.get()
    }

    /// This thread's block, made if need be; none if there are too many threads, or this one is ending.
    #[cold]
    pub(crate) fn join(&self) -> Option<&Block> {
        if !self.slots {
            return None;
        }
        let place = self.blocks.get(number::claim()?)?;
        if place.get().is_none() {
            let block = Box::into_raw(Block::new());
            // INVARIANT: It is freed by the table's drop. Nobody else makes one: the number is this thread's.
            // ORDER(cache-block): Release for the zeroes. Partner: the Acquire in `get`.
            place.0.store(block, Ordering::Release);
        }
        place.get()
    }

    /// Calls `f` with each region that a slot names, as often as one does.
    pub(crate) fn each(&self, mut f: impl FnMut(u32)) {
        for block in self.blocks.iter().take(number::high()).filter_map(BlockPtr::get) {
            for slot in &block.slots[..block.used.load(Ordering::Relaxed) as usize] {
                // ORDER(cache-done): Acquire, partner in `clear`.
                if let Some(region) = slot.0.load(Ordering::Acquire).checked_sub(1) {
                    f(region);
                }
            }
        }
    }

    /// The hits of all threads so far.
    pub(crate) fn hits(&self) -> u64 {
        let blocks = self.blocks.iter().take(number::high()).filter_map(BlockPtr::get);
        blocks.map(|block| block.hits.load(Ordering::Relaxed)).sum()
    }
}

impl BlockPtr {
    #[inline(always)]
    fn get(&self) -> Option<&Block> {
        // ORDER(cache-block): Acquire, partner in `join`. A scan that misses the pointer reads null after its heavy fence, so no slot
        // of the block names anything that was live then.
        let block = NonNull::new(self.0.load(Ordering::Acquire))?;
        // SAFETY: A reference needs a live block that nobody has `&mut` to: type invariant; blocks are only ever shared.
        Some(unsafe { block.as_ref() })
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        for block in self.blocks.iter() {
            if let Some(block) = NonNull::new(block.0.load(Ordering::Relaxed)) {
                // SAFETY: A box needs the unique pointer that came from one: `join` leaked it, and nobody is left, as the
                // table is being dropped.
                drop(unsafe { Box::from_raw(block.as_ptr()) });
            }
        }
    }
}
