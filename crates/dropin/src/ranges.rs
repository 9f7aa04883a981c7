//! The ranges that libfabric's caches have registered, and which of them are stale.
//!
//! A change of memory is reported in the thread that makes it, perhaps inside `free`, with the
//! allocator's lock held. Registrations are entered under libfabric's lock and this table's, and
//! entering allocates. So the callback must not wait for the table: it *tries* the lock. If the
//! lock is held, the callback leaves a note: one bit in `pending` for each group of granules
//! ([`granules`]). The next thread that locks the table marks every range that shares a bit. So a
//! note can mark a valid range, and libfabric registers that range anew. A note never misses a
//! stale range.
//!
//! | | state of a range | leaves it by |
//! | --- | --- | --- |
//! | 1 | valid: `stale` is `None` | a change or a note that overlaps it (2), last unsubscription |
//! | 2 | stale, counted in `dirty` | last unsubscription |
//!
//! # Invariants
//! `dirty` is the count of stale ranges, and is changed under the lock only. `pending` is 0 or
//! holds the bits of changes that have not been entered yet. So if both are 0, every range is
//! valid.

use crate::counts::Change;
use mmu_notifier::VaRange;
use mmu_source::Watch;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How often a callback tries to take the lock before it leaves a note. The lock is held for some
/// hundred instructions, unless its holder is preempted or is the callback's own thread.
const TURNS: usize = 64;

/// Start and length in bytes, as libfabric gave them.
type Key = (u64, u64);

#[derive(Debug)]
struct Entry {
    /// How many caches have subscribed this range: libfabric does not say which cache subscribes.
    count: usize,
    stale: Option<Change>,
    /// Whether the kernel has changed the range since its registration. `None` if the kernel source
    /// is not in use.
    watch: Option<Watch>,
}

impl Entry {
    /// Tells whether a change that is reported now makes a valid range stale. The range stays valid
    /// if the kernel has counted no change of the range since its registration. The change is then
    /// older than the registration, or it has not begun, and the kernel source will report it
    /// again.
    fn is_met(&self) -> bool {
        self.stale.is_none() && !self.watch.as_ref().is_some_and(Watch::is_valid)
    }

    /// Stale if a change was reported, or if the kernel has counted a change that is not reported
    /// yet.
    fn verdict(&self, start: u64, len: u64) -> Verdict {
        match (&self.stale, &self.watch) {
            (Some(change), _) => Verdict::Stale(*change),
            (None, Some(watch)) if !watch.is_valid() => Verdict::Stale(Change {
                event: "a change that the kernel counted",
                range: covering(start, len).unwrap_or(VaRange::ALL),
            }),
            (None, _) => Verdict::Valid,
        }
    }
}

/// Ranges by class of length, then by start: class `n` has lengths from `2^n` to `2^(n+1) - 1`. So
/// a range of class `n` that overlaps an address starts less than `2^(n+1)` bytes before it.
#[derive(Debug)]
struct Table {
    classes: [BTreeMap<Key, Entry>; 64],
    /// The classes that are not empty.
    used: u64,
}

/// The watched ranges; the module's documentation describes them.
#[derive(Debug)]
pub(crate) struct Ranges {
    table: Mutex<Table>,
    dirty: AtomicUsize,
    pending: AtomicU64,
}

/// The result of a look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Valid,
    Stale(Change),
    /// The range was not subscribed in this process, but in its parent, before a fork.
    Unknown,
}

impl Ranges {
    pub(crate) const fn new() -> Ranges {
        let table = Table {
            classes: [const { BTreeMap::new() }; 64],
            used: 0,
        };
        Ranges {
            table: Mutex::new(table),
            dirty: AtomicUsize::new(0),
            pending: AtomicU64::new(0),
        }
    }

    /// Enters a registration of `start..start + len`. A range that is already entered keeps its
    /// first watch. A stale range stays stale: another cache registered it before the change.
    pub(crate) fn subscribe(&self, start: u64, len: u64, watch: Option<Watch>) {
        let mut table = self.lock();
        let class = class(len);
        table.used |= 1 << class;
        let mut watch = watch;
        let entry = table.classes[class].entry((start, len));
        let entry = entry.or_insert_with(|| Entry {
            count: 0,
            stale: None,
            watch: watch.take(),
        });
        entry.count += 1;
        // A watch that is not needed is dropped without the lock held, because the drop takes a
        // lock of the kernel source.
        drop(table);
        drop(watch);
    }

    /// Marks a registration as stale because no source can watch it.
    pub(crate) fn give_up(&self, start: u64, len: u64, change: Change) {
        let mut table = self.lock();
        let entry = table.classes[class(len)].get_mut(&(start, len));
        if let Some(entry) = entry.filter(|entry| entry.stale.is_none()) {
            entry.stale = Some(change);
            // ORDER(dropin-dirty): Release. Partner: `is_clean`.
            self.dirty.fetch_add(1, Ordering::Release);
        }
    }

    /// Removes one registration of `start..start + len`, if there is one.
    pub(crate) fn unsubscribe(&self, start: u64, len: u64) {
        let mut table = self.lock();
        let class = class(len);
        let Some(entry) = table.classes[class].get_mut(&(start, len)) else {
            return;
        };
        entry.count -= 1;
        if entry.count == 0 {
            let was_stale = entry.stale.is_some();
            let removed = table.classes[class].remove(&(start, len));
            if table.classes[class].is_empty() {
                table.used &= !(1 << class);
            }
            if was_stale {
                // ORDER(dropin-dirty): Relaxed suffices, because every change holds the lock.
                self.dirty.fetch_sub(1, Ordering::Relaxed);
            }
            drop(table);
            drop(removed);
        }
    }

    /// Tells whether no range is stale and no note is pending. Costs two loads.
    #[inline]
    pub(crate) fn is_clean(&self) -> bool {
        // ORDER(dropin-dirty): Acquire, `pending` first. A change that happens before this call is
        // counted in `dirty`, or noted in `pending` if its callback did not get the lock. If the
        // first load sees the note, the result is false. If `enter_notes` has cleared the note, it
        // added to `dirty` first, which the second load sees. If `dirty` were loaded first, both
        // could be missed. Partner: `mark`, `enter_notes`.
        self.pending.load(Ordering::Acquire) == 0 && self.dirty.load(Ordering::Acquire) == 0
    }

    /// Looks up `start..start + len`: stale if a reported change or its watch says that the range
    /// has changed since it was subscribed. Runs no callback.
    #[cold]
    pub(crate) fn look(&self, start: u64, len: u64) -> Verdict {
        let table = self.lock();
        let entry = table.classes[class(len)].get(&(start, len));
        entry.map_or(Verdict::Unknown, |entry| entry.verdict(start, len))
    }

    /// Marks the ranges that `change` overlaps as stale. Returns whether a range may be newly
    /// stale.
    ///
    /// For callbacks: allocates nothing and waits for no thread.
    pub(crate) fn changed(&self, change: Change) -> bool {
        for _ in 0..TURNS {
            if let Ok(mut table) = self.table.try_lock() {
                return self.mark(&mut table, change);
            }
            std::hint::spin_loop();
        }
        // ORDER(dropin-dirty): Release: the change itself follows this note. Partner: `is_clean`,
        // `lock`.
        self.pending
            .fetch_or(granules(change.range), Ordering::AcqRel);
        true
    }

    /// The ranges that are stale.
    pub(crate) fn stale(&self) -> Vec<Key> {
        let table = self.lock();
        let all = table.classes.iter().flatten();
        all.filter(|(_, entry)| entry.stale.is_some())
            .map(|(key, _)| *key)
            .collect()
    }

    /// How many ranges there are; `None` if the lock is held, perhaps by a thread that was stopped.
    pub(crate) fn count(&self) -> Option<usize> {
        let table = self.table.try_lock().ok()?;
        Some(table.classes.iter().map(BTreeMap::len).sum())
    }

    /// Locks the table and enters every note.
    fn lock(&self) -> MutexGuard<'_, Table> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        // ORDER(dropin-dirty): Acquire. Partner: `changed`.
        if self.pending.load(Ordering::Acquire) != 0 {
            self.enter_notes(&mut table);
        }
        table
    }

    #[cold]
    fn enter_notes(&self, table: &mut Table) {
        // Ranges are marked before the bits are cleared, so a stale range never looks clean.
        // ORDER(dropin-dirty): Acquire. Partner: `changed`.
        let bits = self.pending.load(Ordering::Acquire);
        let mut marked = 0;
        for ((start, len), entry) in table.classes.iter_mut().flatten() {
            let Some(range) = covering(*start, *len) else {
                continue;
            };
            if granules(range) & bits != 0 && entry.is_met() {
                entry.stale = Some(Change {
                    event: "a change nearby",
                    range,
                });
                marked += 1;
            }
        }
        // ORDER(dropin-dirty): Release, before the bits are cleared. Partner: `is_clean`.
        self.dirty.fetch_add(marked, Ordering::Release);
        // Bits that were set meanwhile stay. A bit of `bits` that was set again may be cleared:
        // each range that has it is stale, or has a valid watch. The kernel source reports a later
        // change of a watched range again, see `Entry::is_met`.
        // ORDER(dropin-dirty): Release: publishes the new `dirty` before the bits are cleared.
        // Partner: `is_clean`.
        self.pending.fetch_and(!bits, Ordering::AcqRel);
    }

    fn mark(&self, table: &mut Table, change: Change) -> bool {
        let start = change.range.start().get();
        // `None` is the end of the address space.
        let end = change.range.end().map(|end| end.get());
        let mut marked = 0;
        let mut used = table.used;
        while used != 0 {
            let class = used.trailing_zeros() as usize;
            used &= used - 1;
            let longest = (2_u64 << class).wrapping_sub(1);
            let from = start.saturating_sub(longest);
            let entries = table.classes[class].range_mut((from, 0)..);
            let entries = entries.take_while(|((at, _), _)| end.is_none_or(|end| *at < end));
            for ((at, len), entry) in entries {
                if at.saturating_add(*len) > start && entry.is_met() {
                    entry.stale = Some(change);
                    marked += 1;
                }
            }
        }
        if marked != 0 {
            // ORDER(dropin-dirty): Release. Partner: `is_clean`.
            self.dirty.fetch_add(marked, Ordering::Release);
        }
        marked != 0
    }
}

fn class(len: u64) -> usize {
    len.max(1).ilog2() as usize
}

fn covering(start: u64, len: u64) -> Option<VaRange> {
    VaRange::covering(mmu_notifier::Va::new(start), len).ok()
}

/// One bit for each granule of 2 MiB that a range overlaps, modulo 64.
fn granules(range: VaRange) -> u64 {
    const SHIFT: u32 = 21;
    let first = range.start().get() >> SHIFT;
    let last = range.end().map_or(u64::MAX, |end| end.get() - 1) >> SHIFT;
    if last - first >= 63 {
        return u64::MAX;
    }
    let bits = (2_u64 << (last - first)) - 1;
    bits.rotate_left((first % 64) as u32)
}

#[cfg(test)]
mod tests;
