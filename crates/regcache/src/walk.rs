//! Chooses the granules in which to search for the regions that overlap a range.
//!
//! A short range has few granules at any level. In a long range, a summary tells which blocks of 2
//! MiB contain no region of a small level, and the walk skips these blocks. If the walk has
//! searched more granules than there are regions, examining every region is cheaper, and the walk
//! gives up.

use crate::granule::{BLOCK_SHIFT, Granule, LEVELS, SMALL_LEVELS, level_of, shift, span};
use crate::raw::memory::Array;
use mmu_notifier::{Va, VaRange};
use std::io;

const SMALL: u64 = (1 << SMALL_LEVELS) - 1;
const COUNTERS: usize = 4096;

/// How many regions there are at each level, and an upper bound for each block.
#[derive(Debug)]
pub(crate) struct Summary {
    levels: [u32; LEVELS as usize],
    /// A bit for each level that has regions.
    in_use: u64,
    /// The level that had the most regions when that was last computed.
    largest: u32,
    /// The number of regions of small levels, by block number modulo the array's length.
    blocks: Array<u32>,
}

impl Summary {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            levels: [0; LEVELS as usize],
            in_use: 0,
            largest: 0,
            blocks: Array::zeroes(COUNTERS)?,
        })
    }

    /// Adds a region. Returns whether the levels that look-ups read may have to be updated.
    pub(crate) fn add(&mut self, range: VaRange) -> Levels {
        let before = self.in_use;
        let level = self.change(range, 1);
        let largest = self.levels[level as usize] <= self.levels[self.largest as usize];
        if self.in_use == before && largest {
            Levels::Same
        } else {
            Levels::Others
        }
    }

    pub(crate) fn remove(&mut self, range: VaRange) {
        self.change(range, u32::MAX);
    }

    #[inline]
    fn change(&mut self, range: VaRange, by: u32) -> u32 {
        let level = level_of(range);
        let count = &mut self.levels[level as usize];
        *count = count.wrapping_add(by);
        self.in_use = self.in_use & !(1 << level) | u64::from(*count != 0) << level;
        if level < SMALL_LEVELS {
            let (first, last) = span(range, BLOCK_SHIFT);
            for block in first..=last {
                let count = &mut self.blocks[block as usize % COUNTERS];
                *count = count.wrapping_add(by);
            }
        }
        level
    }

    /// Computes the level with the most regions.
    pub(crate) fn find_largest(&mut self) -> u32 {
        let (mut levels, mut largest) = (self.in_use, self.in_use.trailing_zeros() % LEVELS);
        while levels != 0 {
            let level = levels.trailing_zeros();
            levels &= levels - 1;
            if self.levels[level as usize] > self.levels[largest as usize] {
                largest = level;
            }
        }
        self.largest = largest;
        largest
    }

    /// Returns an upper bound of the number of regions of small levels in a block.
    #[inline]
    fn block(&self, block: u64) -> u32 {
        self.blocks[block as usize % COUNTERS]
    }

    /// Returns a bit for each level that has regions.
    pub(crate) fn levels(&self) -> u64 {
        self.in_use
    }
}

/// Whether a new region changes the levels that look-ups read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Levels {
    /// The levels in use and the largest level are the same.
    Same,
    /// The levels in use or the largest level may have changed.
    Others,
}

/// How a walk ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Walked {
    /// All granules were searched.
    Done,
    /// Examining every region would be cheaper.
    TooFar,
}

/// Calls `ask` with the granules of `range` that may have regions. Gives up after about `budget`
/// granules.
///
/// `ask` may remove regions, but must not add any.
#[inline]
pub(crate) fn walk<T>(
    subject: &mut T,
    summary: impl Fn(&T) -> &Summary,
    range: VaRange,
    mut budget: u64,
    mut ask: impl FnMut(&mut T, Granule),
) -> Walked {
    let levels = summary(subject).levels();
    let (first, last) = span(range, BLOCK_SHIFT);
    if first == last {
        // Most ranges are within one block.
        let few = if summary(subject).block(first) == 0 {
            levels & !SMALL
        } else {
            levels
        };
        return ask_all(subject, few, range, &mut budget, &mut ask);
    }
    walk_blocks(subject, summary, range, budget, &mut ask)
}

/// Calls `ask` with the granules of `levels` in `within`.
#[inline(always)]
fn ask_all<T>(
    subject: &mut T,
    mut levels: u64,
    within: VaRange,
    budget: &mut u64,
    ask: &mut impl FnMut(&mut T, Granule),
) -> Walked {
    while levels != 0 {
        let level = levels.trailing_zeros();
        levels &= levels - 1;
        let (first, last) = span(within, shift(level));
        if last - first >= *budget {
            return Walked::TooFar;
        }
        *budget -= last - first + 1;
        (first..=last).for_each(|number| ask(subject, Granule { level, number }));
    }
    Walked::Done
}

/// Like `walk`, for a range that touches several blocks.
#[cold]
#[inline(never)]
fn walk_blocks<T>(
    subject: &mut T,
    summary: impl Fn(&T) -> &Summary,
    range: VaRange,
    mut budget: u64,
    ask: &mut impl FnMut(&mut T, Granule),
) -> Walked {
    let levels = summary(subject).levels();
    if ask_all(subject, levels & !SMALL, range, &mut budget, ask) == Walked::TooFar {
        return Walked::TooFar;
    }
    if levels & SMALL == 0 {
        return Walked::Done;
    }
    let (first, last) = span(range, BLOCK_SHIFT);
    for block in first..=last {
        if budget == 0 {
            return Walked::TooFar;
        }
        budget -= 1;
        if summary(subject).block(block) == 0 {
            continue;
        }
        let whole = VaRange::covering(Va::new(block << BLOCK_SHIFT), 1 << BLOCK_SHIFT);
        let within = whole
            .ok()
            .and_then(|whole| whole.intersection(range))
            .unwrap_or(range);
        if ask_all(subject, levels & SMALL, within, &mut budget, ask) == Walked::TooFar {
            return Walked::TooFar;
        }
    }
    Walked::Done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::granule::granules;

    fn range(first: u64, pages: u64) -> VaRange {
        VaRange::covering(Va::new(first << 12), pages << 12).unwrap()
    }

    #[test]
    fn a_walk_asks_for_a_granule_of_each_region_that_overlaps() {
        let regions = [
            range(0, 1),
            range(511, 3),
            range(5000, 70),
            range(1 << 20, 1 << 16),
            range(0, 100_000),
        ];
        let mut summary = Summary::new().expect("there is memory");
        regions.iter().for_each(|region| _ = summary.add(*region));
        for walked in [
            range(0, 1),
            range(512, 1),
            range(600, 5000),
            range(1 << 20, 1),
            range(0, 1 << 21),
        ] {
            let mut asked = Vec::new();
            let walked_all = walk(
                &mut summary,
                |summary| summary,
                walked,
                u64::MAX,
                |_, granule| asked.push(granule),
            );
            assert_eq!(walked_all, Walked::Done);
            for region in regions.iter().filter(|region| region.overlaps(walked)) {
                assert!(
                    granules(*region).any(|granule| asked.contains(&granule)),
                    "{region} in {walked}"
                );
            }
        }
        regions.iter().for_each(|region| summary.remove(*region));
        assert_eq!(
            (summary.levels(), summary.blocks.iter().sum::<u32>()),
            (0, 0)
        );
    }

    #[test]
    fn a_walk_over_everything_gives_up() {
        let mut summary = Summary::new().expect("there is memory");
        let _: Levels = summary.add(range(0, 1));
        let walked_all = walk(
            &mut summary,
            |summary| summary,
            VaRange::ALL,
            1000,
            |_, _| (),
        );
        assert_eq!(walked_all, Walked::TooFar);
    }
}
