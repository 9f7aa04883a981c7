//! Records leases without a write to memory that several threads write to. Each thread has a block
//! of slots, and each slot names one region or none.
//!
//! Only the slot's own thread writes a region's name into the slot. The thread that ends the lease,
//! which may be another thread, empties the slot. A lease is counted in the region itself in three
//! cases: if the thread finds no free slot, if the thread has no number, and if a signal handler
//! has interrupted the thread between checking a free slot and writing to it (see
//! [`Block::begin`]).

use super::barrier::light;
use super::memory::{Zero, boxed};
use super::number;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::unless;
use std::io;

/// The number of slots of one thread.
const SLOTS: usize = if cfg!(mmun_loom) { 2 } else { 124 };
/// How many slots a hit examines before it gives up.
const PROBES: usize = if cfg!(mmun_loom) { 1 } else { 8 };

/// One thread's slots in one cache. A block has eight cache lines, and a thread with few leases
/// uses only the first.
#[repr(C, align(128))]
#[derive(Debug)]
pub(crate) struct Block {
    /// Twice the number of hits, plus one while the thread takes a slot.
    hits: AtomicU64,
    /// The index of the slot that the owner examines if the first slot is in use.
    cursor: AtomicU32,
    /// The highest index of a slot that was ever used.
    last: AtomicU32,
    slots: [Slot; SLOTS],
}

// SAFETY: zeroes are valid integers.
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

/// The blocks of all threads with a number, in reserved address space. The kernel allocates memory
/// for a block when its thread first uses the block.
#[derive(Debug)]
pub(crate) struct Threads {
    /// Empty if the process has no `membarrier`, without which slots cannot be used.
    blocks: Box<[Block]>,
}

impl Slot {
    /// Writes a region's name into the slot, and orders that store before the caller's next reads.
    #[inline(always)]
    pub(crate) fn publish(&self, name: u32) {
        self.publish_locked(name);
        // ORDER(cache-lease): the name comes before the load of the region's state. Partner: the
        // heavy fence in `harvest`, between the state and the scan of the slots. Without it, a
        // region could be deregistered under a new lease. Model: loom
        // `a_hit_racing_an_invalidation`.
        if !crate::sync::mutant("no_fence_in_hit") {
            light();
        }
    }

    /// Writes a region's name into the slot, without the fence. The caller holds the lock of the
    /// cache, or executes the fence itself.
    #[inline(always)]
    pub(crate) fn publish_locked(&self, name: u32) {
        // ORDER(cache-done): Release here and Acquire in `is_free`. This store overwrites the end
        // of the slot's previous lease. A thread that sees this name must also see that end, and a
        // plain store would break the release sequence of `clear`.
        self.0
            .store(name, unless("publish_relaxed", Ordering::Release));
    }

    /// Returns the name of the region. The caller holds the lease.
    #[inline(always)]
    pub(crate) fn name(&self) -> u32 {
        // Relaxed: no other thread writes to the slot until the lease ends.
        self.0.load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn is_free(&self) -> bool {
        // ORDER(cache-done): Acquire, for a lease that another thread may have ended. Partner:
        // `clear`.
        self.0.load(unless("is_free_relaxed", Ordering::Acquire)) == 0
    }

    /// Empties the slot, and orders that store before the caller's next reads.
    #[inline(always)]
    pub(crate) fn clear(&self) {
        // ORDER(cache-done): Release, for the accesses under the lease. Partner: the Acquire in
        // `each`. If weaker, the deregistration could overtake the last use.
        self.0.store(0, unless("clear_relaxed", Ordering::Release));
        // ORDER(cache-unlease): the store comes before the load of the region's state. Partner: the
        // heavy fence in `harvest`. Without it, this thread could find the region live while the
        // scan still finds the lease, and neither would deregister the region. Model: loom
        // `the_last_lease_deregisters`.
        if !crate::sync::mutant("no_fence_in_drop") {
            light();
        }
    }
}

impl Block {
    /// Returns the first slot if it is free, otherwise the slot at the cursor if that is free. The
    /// address of the first slot is known without a load. Some processors do not execute loads
    /// before a store whose address is still unknown, and are twice as fast with a known address.
    /// The caller is the block's thread.
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

    /// Returns an empty slot, if there is one. The caller is the block's thread.
    pub(crate) fn free_slot(&self) -> Option<&Slot> {
        self.next_slot().or_else(|| self.search())
    }

    /// Searches a few slots after the cursor, and moves the cursor along. So if a thread has very
    /// many leases, its cursor reaches a free slot after several calls.
    #[cold]
    #[inline(never)]
    fn search(&self) -> Option<&Slot> {
        let from = self.cursor.load(Ordering::Relaxed) as usize;
        for at in (from + 1..=from + PROBES).map(|at| at % SLOTS) {
            self.cursor.store(at as u32, Ordering::Relaxed);
            let slot = &self.slots[at];
            if slot.is_free() {
                // Relaxed: a scan that must find this slot in use comes after the heavy fence, and
                // so sees this store too.
                self.last.fetch_max(at as u32, Ordering::Relaxed);
                return Some(slot);
            }
        }
        None
    }

    /// Begins to take a slot. Returns `None` in a signal handler that has interrupted this thread
    /// while it was taking a slot. Then the handler's lease must be counted in its region: the
    /// interrupted code may have seen any slot as free, and would overwrite it. The caller is the
    /// block's thread.
    #[inline(always)]
    pub(crate) fn begin(&self) -> Option<Taking<'_>> {
        let before = self.hits.load(Ordering::Relaxed);
        if before & 1 != 0 {
            return None;
        }
        self.hits.store(before + 1, Ordering::Relaxed);
        // ORDER: the mark comes before the load of a slot, for signal handlers on this thread. Only
        // the compiler could reorder them.
        compiler_fence();
        Some(Taking {
            block: self,
            before,
        })
    }
}

/// A mark that this thread is taking a slot, until [`end`](Self::end).
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

    /// Clears the mark, whether a slot was taken or not. Counts a hit if `hit` is true.
    #[inline(always)]
    pub(crate) fn end(self, hit: bool) {
        // ORDER: the write to the slot comes before the mark is cleared, as in `begin`.
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
    pub(crate) fn new(slots: bool) -> io::Result<Self> {
        let blocks = boxed(if slots { number::MAX } else { 0 })?;
        Ok(Self { blocks })
    }

    /// Returns this thread's block, if the thread has a number already.
    #[inline(always)]
    pub(crate) fn mine(&self) -> Option<&Block> {
        self.blocks.get(number::mine())
    }

    /// Returns this thread's block, and claims a number for the thread if necessary. Returns `None`
    /// if the number is too high, or slots cannot be used.
    #[cold]
    pub(crate) fn join(&self) -> Option<&Block> {
        if self.blocks.is_empty() {
            return None;
        }
        self.blocks.get(number::claim())
    }

    /// Calls `f` with the region of each slot in use.
    pub(crate) fn each(&self, mut f: impl FnMut(u32)) {
        for block in self.blocks.iter().take(number::high()) {
            for slot in &block.slots[..=block.last.load(Ordering::Relaxed) as usize] {
                // ORDER(cache-done): Acquire; partner in `clear`.
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

    /// Returns the hits of all threads so far.
    pub(crate) fn hits(&self) -> u64 {
        self.blocks
            .iter()
            .take(number::high())
            .map(|block| block.hits.load(Ordering::Relaxed) / 2)
            .sum()
    }
}
