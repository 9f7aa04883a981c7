//! Finds the watches that an event touches.
//!
//! The address space is cut into granules of [`LEVELS`] sizes: 4 KiB, 64 KiB, ... A watch belongs
//! to the finest level at which it touches at most two granules, and is linked into the chain of
//! each. For each level that has watches, an event searches the chains of the granules that it
//! touches. If an event touches too many granules of a level, all watches are searched instead.
//!
//! Only [`Table::with_room`] and [`enter`] allocate, because the lock around a table may be taken
//! inside `free`. A full table is replaced by a larger one, which is made outside of the lock.

use mmu_notifier::VaRange;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The number of granule sizes. The last level has a single granule.
const LEVELS: usize = 14;
/// An event that touches more granules of a level than this searches all watches.
const SPAN: u64 = 32;
const NONE: u32 = u32::MAX;

/// Whether the range of a watch was touched.
#[derive(Debug, Default)]
pub(crate) struct Word(AtomicBool);

impl Word {
    #[inline]
    pub(crate) fn is_touched(&self) -> bool {
        // Relaxed: each source orders this load itself.
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn touch(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Node {
    /// `None` if the node is free. Then `next[0]` is the next free node.
    watched: Option<Watched>,
    /// The successors in the chains of the first and the second granule. A link is twice the index
    /// of a node, plus 0 for the chain of its first granule or 1 for that of its second.
    next: [u32; 2],
}

#[derive(Debug)]
struct Watched {
    range: VaRange,
    level: usize,
    /// Only events with a higher sequence number touch the watch. All others began before the
    /// watch.
    base: u64,
    word: Arc<Word>,
}

/// The watches of one source.
#[derive(Debug)]
pub(crate) struct Table {
    nodes: Vec<Node>,
    /// The first link of each chain. The number of chains is a power of two.
    heads: Vec<u32>,
    free: u32,
    counts: [u32; LEVELS],
}

/// Identifies a watch in its table.
#[derive(Debug)]
pub(crate) struct Id(u32);

fn granule(address: u64, level: usize) -> u64 {
    address.checked_shr(12 + 4 * level as u32).unwrap_or(0)
}

fn granules(range: VaRange, level: usize) -> (u64, u64) {
    (
        granule(range.start().get(), level),
        granule(range.last().get(), level),
    )
}

fn level(range: VaRange) -> usize {
    let touches_two = |level: &usize| {
        let (first, last) = granules(range, *level);
        last - first < 2
    };
    (0..LEVELS)
        .find(touches_two)
        .expect("the last level has one granule")
}

impl Table {
    /// Makes a table with room for `watches` watches.
    pub(crate) fn with_room(watches: usize) -> Self {
        let empty = || Node {
            watched: None,
            next: [NONE; 2],
        };
        let mut table = Self {
            nodes: (0..watches).map(|_| empty()).collect(),
            heads: vec![NONE; (2 * watches).next_power_of_two()],
            free: NONE,
            counts: [0; LEVELS],
        };
        (0..watches as u32)
            .rev()
            .for_each(|number| table.free_node(number));
        table
    }

    pub(crate) fn room(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.free == NONE
    }

    fn free_node(&mut self, number: u32) {
        self.nodes[number as usize].next[0] = self.free;
        self.free = number;
    }

    fn chain(&self, level: usize, granule: u64) -> usize {
        let hash = (granule ^ (level as u64) << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (hash >> 32) as usize & (self.heads.len() - 1)
    }

    /// Adds a watch. The table must not be full.
    pub(crate) fn insert(&mut self, range: VaRange, base: u64, word: Arc<Word>) -> Id {
        let number = self.free;
        self.free = self.nodes[number as usize].next[0];
        self.link(
            number,
            Watched {
                range,
                level: level(range),
                base,
                word,
            },
        );
        Id(number)
    }

    fn link(&mut self, number: u32, watched: Watched) {
        let (first, last) = granules(watched.range, watched.level);
        self.counts[watched.level] += 1;
        for (which, granule) in (first..=last).enumerate() {
            let chain = self.chain(watched.level, granule);
            self.nodes[number as usize].next[which] = self.heads[chain];
            self.heads[chain] = 2 * number + which as u32;
        }
        self.nodes[number as usize].watched = Some(watched);
    }

    /// Removes a watch. The caller must drop the returned value outside of the lock, because the
    /// drop may free memory, and the lock may be taken inside `free`.
    pub(crate) fn remove(&mut self, id: &Id) -> Option<Arc<Word>> {
        let number = id.0;
        let watched = self.nodes[number as usize].watched.take()?;
        self.counts[watched.level] -= 1;
        let (first, last) = granules(watched.range, watched.level);
        for (which, granule) in (first..=last).enumerate() {
            let (entry, after) = (
                2 * number + which as u32,
                self.nodes[number as usize].next[which],
            );
            let chain = self.chain(watched.level, granule);
            if self.heads[chain] == entry {
                self.heads[chain] = after;
                continue;
            }
            let mut at = self.heads[chain];
            while at != NONE {
                let next = &mut self.nodes[at as usize / 2].next[at as usize % 2];
                if *next == entry {
                    *next = after;
                    break;
                }
                at = *next;
            }
        }
        self.free_node(number);
        Some(watched.word)
    }

    /// Makes a watch valid again: only events after `base` count.
    pub(crate) fn renew(&mut self, id: &Id, base: u64) {
        if let Some(watched) = &mut self.nodes[id.0 as usize].watched {
            watched.base = base;
            watched.word.0.store(false, Ordering::Relaxed);
        }
    }

    /// Marks the watches that overlap `range` and are older than the event `number`.
    pub(crate) fn touch(&self, range: VaRange, number: u64) {
        for level in 0..LEVELS {
            if self.counts[level] == 0 {
                continue;
            }
            let (first, last) = granules(range, level);
            if last - first >= SPAN {
                return self.touch_any(range, number);
            }
            for granule in first..=last {
                let mut at = self.heads[self.chain(level, granule)];
                while at != NONE {
                    let node = &self.nodes[at as usize / 2];
                    node.touch(range, number);
                    at = node.next[at as usize % 2];
                }
            }
        }
    }

    fn touch_any(&self, range: VaRange, number: u64) {
        self.nodes.iter().for_each(|node| node.touch(range, number));
    }

    /// Marks all watches that are older than the event `number`.
    pub(crate) fn touch_all(&self, number: u64) {
        self.touch_any(VaRange::ALL, number);
    }

    /// Moves all watches of a smaller table into this new one. Each keeps its `Id`.
    pub(crate) fn take_over(&mut self, smaller: &mut Self) {
        self.free = NONE;
        for number in (0..self.nodes.len()).rev() {
            match smaller
                .nodes
                .get_mut(number)
                .and_then(|node| node.watched.take())
            {
                Some(watched) => self.link(number as u32, watched),
                None => self.free_node(number as u32),
            }
        }
    }
}

/// Adds a watch to a table. `with` runs a function on the table, under the table's lock. Allocates
/// outside of the lock. Returns `None` if `with` has no table.
pub(crate) fn enter(
    with: impl Fn(&mut dyn FnMut(&mut Table)) -> Option<()>,
    range: VaRange,
    base: u64,
    word: &Arc<Word>,
) -> Option<Id> {
    loop {
        let (mut entered, mut room) = (None, 0);
        with(&mut |table| {
            room = table.room();
            if !table.is_full() {
                entered = Some(table.insert(range, base, Arc::clone(word)));
            }
        })?;
        if entered.is_some() {
            return entered;
        }
        let mut larger = Table::with_room(2 * room);
        with(&mut |table| {
            if table.room() < larger.room() {
                larger.take_over(table);
                std::mem::swap(table, &mut larger);
            }
        })?;
    }
}

impl Node {
    fn touch(&self, range: VaRange, number: u64) {
        let is_told = |watched: &&Watched| watched.range.overlaps(range) && number > watched.base;
        if let Some(watched) = self.watched.as_ref().filter(is_told) {
            watched.word.touch();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmu_notifier::Va;

    fn range(start: u64, len: u64) -> VaRange {
        VaRange::covering(Va::new(start), len).expect("a range")
    }

    #[test]
    fn a_watch_is_touched_only_by_ranges_that_overlap_it() {
        let sizes: Vec<u64> = (0..36)
            .map(|power| 4096 << power)
            .chain([5 << 12, 33 << 12])
            .collect();
        const AT: u64 = 0x7f12_3456_7000;
        for size in &sizes {
            for event in &sizes {
                for start in [
                    AT - 4096,
                    AT,
                    AT + size - 4096,
                    AT + size,
                    AT.saturating_sub(*event) + 4096,
                    AT & !0xffff_ffff,
                ] {
                    let mut table = Table::with_room(4);
                    let word = Arc::new(Word::default());
                    let other = Arc::new(Word::default());
                    table.insert(range(0x1000, 4096), 0, Arc::clone(&other));
                    table.insert(range(AT, *size), 5, Arc::clone(&word));
                    let event = range(start & !4095, *event);
                    table.touch(event, 5);
                    assert!(!word.is_touched(), "it began before the watch");
                    table.touch(event, 6);
                    assert_eq!(
                        word.is_touched(),
                        range(AT, *size).overlaps(event),
                        "{event} on {size:#x}"
                    );
                    assert_eq!(other.is_touched(), range(0x1000, 4096).overlaps(event));
                }
            }
        }
    }

    #[test]
    fn watches_come_and_go_and_a_larger_table_has_them_all() {
        let mut table = Table::with_room(2);
        let mut live = Vec::new();
        let mut seed = 1_u64;
        for round in 0..20_000_u64 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            if seed.is_multiple_of(5) && !live.is_empty() {
                let (id, _, _) = live.swap_remove(seed as usize / 8 % live.len());
                assert!(table.remove(&id).is_some());
            } else if live.len() < 500 {
                if table.is_full() {
                    let mut larger = Table::with_room(2 * table.room());
                    larger.take_over(&mut table);
                    table = larger;
                }
                let watched = range((seed >> 20) % 4096 * 4096, 1 << ((seed >> 40) % 20));
                let word = Arc::new(Word::default());
                live.push((
                    table.insert(watched, round, Arc::clone(&word)),
                    watched,
                    word,
                ));
            }
            let event = range((seed >> 8) % 4096 * 4096, 1 << ((seed >> 50) % 14));
            table.touch(event, round + 1);
            for (id, watched, word) in &live {
                assert_eq!(
                    word.is_touched(),
                    watched.overlaps(event),
                    "{event} on {watched}"
                );
                table.renew(id, round);
            }
        }
        assert!(table.room() > 256);
    }
}
