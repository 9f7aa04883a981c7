//! Which ranges are armed, in a form that the BPF program can test in a time that does not depend
//! on their number.
//!
//! The address space is cut into granules at [`LEVELS`] sizes, 4 KiB, 64 KiB, ... 1 TiB. A range
//! belongs to the finest level at which it touches at most [`SPAN`] granules. Two tables of small
//! counters, shared with the program, have a piece for each of the finer levels and one for the
//! others, which have few granules: `sum` counts the ranges of this level *and of all finer ones*
//! that touch a granule, `own` those of this level alone.
//!
//! An event has a level by the same rule. Ranges of its own level or finer ones are found by its
//! granules in `sum` of its level (at most 16 counters, two cache lines); ranges of coarser levels
//! by its one or two granules of each in `own`. What is wider than 16 TiB is armed by a counter of
//! its own, and an event that wide counts as a hit.
//!
//! A granule has two counters, found by two hashes; it is armed if both are above zero, and the
//! second is looked at only if the first is. Counters are shared by granules with the same hash,
//! and stay for ever at their maximum once they have reached it. Both can only make hits out of
//! misses: a needless invalidation. With 10,000 pages armed, one event of one page in 190 or so is
//! one.

use super::sys::Shared;
use mmu_notifier::VaRange;
use std::sync::atomic::{AtomicU16, Ordering};

/// How many sizes of granules there are.
pub(super) const LEVELS: usize = 8;
/// The most granules of its level that a range touches.
pub(super) const SPAN: u64 = 16;
/// Counters of one part of one level, as a power of two.
const SLOTS: u32 = 18;
/// Where lines of 16 counters are told apart: so many bits of the hash.
pub(super) const LINE_BITS: u32 = SLOTS - 4;
/// The factors of the two hashes.
pub(super) const FACTORS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f];
/// The counters of one level, in bytes.
const LEVEL: usize = 2 << SLOTS;
/// How many levels have counters of their own. The coarser ones, where there are few granules,
/// share those of the last. A power of two.
const APART: usize = 4;
/// The size of a part, in bytes. The kernel takes 0.2 ms to make a MiB of it.
pub(super) const PART: usize = LEVEL * APART;
/// All that [`start_of`] can return, as a mask.
pub(super) const STARTS: usize = LEVEL * (APART - 1);

/// The counters.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) sum: Shared,
    pub(super) own: Shared,
}

/// Where a level begins in its part.
pub(super) const fn start_of(level: usize) -> usize {
    LEVEL * if level < APART { level } else { APART - 1 }
}

/// The size of a level's granules, as a power of two.
pub(super) const fn shift(level: usize) -> u32 {
    12 + 4 * level as u32
}

/// The program does the same sums.
fn slot(level: usize, granule: u64, factor: u64) -> usize {
    let line = (granule >> 4).wrapping_mul(factor) >> (64 - LINE_BITS);
    start_of(level) + 32 * line as usize + 2 * (granule & 15) as usize
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

/// Counts a range in.
pub(super) fn add(tables: &Tables, range: VaRange, own: usize) {
    for_each(tables, range, own, |counter| {
        update(counter, |count| count.saturating_add(1))
    });
}

/// Counts a range out.
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
    // ORDER: AcqRel for no partner in user space; `arm` has a full fence between these and its look
    // at the events.
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
