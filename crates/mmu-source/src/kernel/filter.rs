//! Holds the armed ranges in a form that the BPF program can test in constant time, however many
//! ranges there are.
//!
//! The address space is cut into granules of [`LEVELS`] sizes: 4 KiB, 64 KiB, ... 1 TiB. A range
//! belongs to the finest level at which it touches at most [`SPAN`] granules. Two tables of small
//! counters are shared with the program. In each table the three finest levels have one section
//! each, and the coarser levels, which have few granules, share one. For each granule, `own` counts
//! the ranges that belong to the granule's level and touch the granule. `sum` counts the ranges
//! that belong to this level *or to a finer level* and touch the granule.
//!
//! The same rule gives an event its level. To find ranges of that level and of finer levels, the
//! program reads the counters of the event's granules in `sum`: at most 16 counters for each hash,
//! in two lines of 32 bytes. To find ranges of a coarser level, it reads the counters of the
//! event's one or two granules of that level in `own`. Ranges that are too wide for the last level
//! (some 16 TiB) are only counted, in one counter. While that counter is above zero, every event is
//! a hit. An event that is too wide for the last level is a hit if any range is armed.
//!
//! Each granule has two counters, at positions given by two hashes. A granule counts as armed if
//! both counters are above zero. The program reads the second counter only if the first is above
//! zero. Granules with equal hashes share a counter, and a counter that has reached its maximum
//! stays there for ever. Both effects can only turn a miss into a hit, which costs a needless
//! invalidation. With 10,000 armed pages that happens to about one in 190 events of one page.

use super::sys::Shared;
use mmu_notifier::VaRange;
use std::sync::atomic::{AtomicU16, Ordering};

/// The number of granule sizes.
pub(super) const LEVELS: usize = 8;
/// The largest number of granules of its own level that a range touches.
pub(super) const SPAN: u64 = 16;
/// The number of counters of one section, as a power of two.
const SLOTS: u32 = 18;
/// The number of hash bits that select a line of 16 counters.
pub(super) const LINE_BITS: u32 = SLOTS - 4;
/// The multipliers of the two hashes.
pub(super) const FACTORS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f];
/// The size of one section in bytes.
const LEVEL: usize = 2 << SLOTS;
/// How many sections there are. The last is shared by all coarser levels, which have few granules.
/// A power of two.
const APART: usize = 4;
/// The size of a table in bytes. The kernel takes 0.2 ms to make a MiB of a table.
pub(super) const PART: usize = LEVEL * APART;
/// A mask of all bits that [`start_of`] can return.
pub(super) const STARTS: usize = LEVEL * (APART - 1);

/// The two tables of counters.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) sum: Shared,
    pub(super) own: Shared,
}

/// Returns the offset of a level's section in its table.
pub(super) const fn start_of(level: usize) -> usize {
    LEVEL * if level < APART { level } else { APART - 1 }
}

/// Returns the size of a level's granules, as a power of two.
pub(super) const fn shift(level: usize) -> u32 {
    12 + 4 * level as u32
}

/// Returns the offset of a granule's counter. The program does the same computation.
fn slot(level: usize, granule: u64, factor: u64) -> usize {
    let line = (granule >> 4).wrapping_mul(factor) >> (64 - LINE_BITS);
    start_of(level) + 32 * line as usize + 2 * (granule & 15) as usize
}

/// Returns the granules that a range touches.
fn granules(range: VaRange, level: usize) -> std::ops::RangeInclusive<u64> {
    range.start().get() >> shift(level)..=range.last().get() >> shift(level)
}

/// Returns the level of a range, or `None` if the range is too wide for all of them.
pub(super) fn level(range: VaRange) -> Option<usize> {
    (0..LEVELS).find(|level| granules(range, *level).end() - granules(range, *level).start() < SPAN)
}

/// Calls `f` for every counter that counts `range`.
fn for_each(tables: &Tables, range: VaRange, own: usize, f: impl Fn(&AtomicU16)) {
    let both = |table: &Shared, level, granule| {
        FACTORS
            .iter()
            .for_each(|factor| f(table.u16(slot(level, granule, *factor))));
    };
    granules(range, own).for_each(|granule| both(&tables.own, own, granule));
    for level in own..LEVELS {
        granules(range, level).for_each(|granule| both(&tables.sum, level, granule));
    }
}

/// Adds a range to its counters.
pub(super) fn add(tables: &Tables, range: VaRange, own: usize) {
    for_each(tables, range, own, |counter| {
        update(counter, |count| count.saturating_add(1))
    });
}

/// Removes a range from its counters.
pub(super) fn remove(tables: &Tables, range: VaRange, own: usize) {
    for_each(tables, range, own, |counter| {
        update(
            counter,
            |count| if count == u16::MAX { count } else { count - 1 },
        )
    });
}

fn update(counter: &AtomicU16, change: impl Fn(u16) -> u16) {
    let mut count = counter.load(Ordering::Relaxed);
    // ORDER: AcqRel; it has no partner in user space. `arm` has a full fence between these counters
    // and its load of `dirty`.
    while let Err(now) =
        counter.compare_exchange_weak(count, change(count), Ordering::AcqRel, Ordering::Relaxed)
    {
        count = now;
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
    fn a_range_belongs_to_the_finest_level_that_it_does_not_overfill() {
        assert_eq!(level(range(0x1000, 1)), Some(0));
        assert_eq!(level(range(0, 16 << 12)), Some(0));
        assert_eq!(level(range(0, 17 << 12)), Some(1));
        assert_eq!(
            level(range(0x7f00_0000_1000, 1 << 30)),
            Some(4),
            "five granules of 256 MiB"
        );
        assert_eq!(level(VaRange::ALL), None);
    }

    #[test]
    fn every_counter_lies_in_its_level() {
        for level in 0..LEVELS {
            for granule in (0..1 << 20).step_by(97) {
                for factor in FACTORS {
                    let offset = slot(level, granule, factor);
                    assert!(
                        (start_of(level)..start_of(level) + LEVEL).contains(&offset),
                        "{offset}"
                    );
                }
            }
        }
    }
}
