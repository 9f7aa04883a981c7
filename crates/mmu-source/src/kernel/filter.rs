//! Which ranges are armed, in a form that the BPF program can test in a time that does not depend on their number.
//!
//! The address space is cut into granules at [`LEVELS`] sizes, 4 KiB, 64 KiB, ... 1 TiB. A range belongs to the finest level
//! at which it touches at most [`SPAN`] granules. A table of small counters, shared with the program, has two parts for each
//! level: `Sum` counts the ranges of this level *and of all finer ones* that touch a granule, `Own` those of this level alone.
//!
//! An event has a level by the same rule. Ranges of its own level or finer ones are found by its granules in `Sum` of its
//! level (at most 16 counters, two cache lines); ranges of each coarser level by its one or two granules in `Own` of that level.
//! What is wider than 16 TiB is armed by a counter of its own, and an event that wide counts as a hit.
//!
//! Counters are shared by granules with the same hash, and stay for ever at their maximum once they have reached it. Both can
//! only make hits out of misses: a needless invalidation. With 10,000 pages armed, one event of one page in twelve or so is one.

use super::sys::Shared;
use mmu_notifier::VaRange;
use std::sync::atomic::{AtomicU16, Ordering};

/// How many sizes of granules there are.
pub(super) const LEVELS: usize = 8;
/// The most granules of its level that a range touches.
pub(super) const SPAN: u64 = 16;
/// Counters of one part of one level, as a power of two.
const SLOTS: u32 = 17;
/// Where lines of 16 counters are told apart: so many bits of the hash.
pub(super) const LINE_BITS: u32 = SLOTS - 4;
/// 2^64 divided by the golden ratio.
pub(super) const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
/// The size of one part of one level, in bytes.
const PART: usize = 2 << SLOTS;
/// The size of the table, in bytes. The kernel refuses values of more than 4 MiB.
pub(super) const TABLE: usize = PART * 2 * LEVELS;

/// The two parts of a level.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part {
    Sum,
    Own,
}

/// Where a part of a level begins in the table.
pub(super) const fn part(level: usize, part: Part) -> usize {
    PART * (2 * level + part as usize)
}

/// The size of a level's granules, as a power of two.
pub(super) const fn shift(level: usize) -> u32 {
    12 + 4 * level as u32
}

/// The program does the same sums.
fn slot(level: usize, which: Part, granule: u64) -> usize {
    let line = (granule >> 4).wrapping_mul(FACTOR) >> (64 - LINE_BITS);
    part(level, which) + 32 * line as usize + 2 * (granule & 15) as usize
}

/// The granules that a range touches.
fn granules(range: VaRange, level: usize) -> std::ops::RangeInclusive<u64> {
    range.start().get() >> shift(level)..=range.last().get() >> shift(level)
}

/// The level a range belongs to; `None` if it is wider than all.
pub(super) fn level(range: VaRange) -> Option<usize> {
    (0..LEVELS).find(|level| granules(range, *level).end() - granules(range, *level).start() < SPAN)
}

/// Calls `f` for every counter that `range` has a part in.
fn for_each(range: VaRange, own: usize, mut f: impl FnMut(usize)) {
    granules(range, own).for_each(|granule| f(slot(own, Part::Own, granule)));
    for level in own..LEVELS {
        granules(range, level).for_each(|granule| f(slot(level, Part::Sum, granule)));
    }
}

/// Counts a range in.
pub(super) fn add(table: &Shared, range: VaRange, own: usize) {
    for_each(range, own, |offset| update(table.u16(offset), |count| count.saturating_add(1)));
}

/// Counts a range out.
pub(super) fn remove(table: &Shared, range: VaRange, own: usize) {
    for_each(range, own, |offset| update(table.u16(offset), |count| if count == u16::MAX { count } else { count - 1 }));
}

fn update(counter: &AtomicU16, change: impl Fn(u16) -> u16) {
    let mut count = counter.load(Ordering::Relaxed);
    // ORDER: AcqRel for no partner in user space; `arm` has a full fence between these and its look at the events.
    while let Err(now) = counter.compare_exchange_weak(count, change(count), Ordering::AcqRel, Ordering::Relaxed) {
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
        assert_eq!(level(range(0x7f00_0000_1000, 1 << 30)), Some(4), "five granules of 256 MiB");
        assert_eq!(level(VaRange::ALL), None);
    }

    #[test]
    fn every_counter_lies_in_its_part() {
        for level in 0..LEVELS {
            for granule in (0..1 << 20).step_by(97) {
                let offset = slot(level, Part::Own, granule);
                assert!((part(level, Part::Own)..part(level, Part::Own) + PART).contains(&offset), "{offset}");
            }
        }
        assert_eq!(part(LEVELS - 1, Part::Own) + PART, TABLE);
    }
}
