//! Which granules to ask for the regions that overlap a range.
//!
//! A short range has few granules at any level. In a long one, blocks of 2 MiB without a region of a small level are
//! skipped by a summary. When more granules were asked than there are regions, it is cheaper to look at each region.

use crate::granule::{BLOCK_SHIFT, Granule, LEVELS, SMALL_LEVELS, level_of, shift, span};
use crate::raw::memory::Array;
use mmu_notifier::{Va, VaRange};
use std::ops::RangeInclusive;

const SMALL: u64 = (1 << SMALL_LEVELS) - 1;
const COUNTERS: usize = 4096;

/// How many regions there are at each level, and about how many in each block.
#[derive(Debug)]
pub(crate) struct Summary {
    levels: [u32; LEVELS as usize],
    /// A bit for each level that has some.
    in_use: u64,
    /// Regions of small levels, by the number of the block, wrapped around.
    blocks: Array<u32>,
}

impl Summary {
    pub(crate) fn new() -> Self {
        Self { levels: [0; LEVELS as usize], in_use: 0, blocks: Array::zeroes(COUNTERS) }
    }

    pub(crate) fn add(&mut self, range: VaRange) {
        self.change(range, 1);
    }

    pub(crate) fn remove(&mut self, range: VaRange) {
        self.change(range, u32::MAX);
    }

    fn change(&mut self, range: VaRange, by: u32) {
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
    }

    /// The level that has the most regions.
    pub(crate) fn largest(&self) -> u32 {
        let (mut levels, mut largest) = (self.in_use, self.in_use.trailing_zeros() % LEVELS);
        while levels != 0 {
            let level = levels.trailing_zeros();
            levels &= levels - 1;
            if self.levels[level as usize] > self.levels[largest as usize] {
                largest = level;
            }
        }
        largest
    }

    /// A bit for each level that has regions.
    pub(crate) fn levels(&self) -> u64 {
        self.in_use
    }
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask for this granule.
    Ask(Granule),
    /// Look at every region, and be done.
    All,
    Done,
}

/// A walk over a range.
#[derive(Debug)]
pub(crate) struct Walk {
    range: VaRange,
    /// Levels still to do as a whole.
    large: u64,
    /// Small levels in use, and those still to do in the present block.
    small: u64,
    in_block: u64,
    block: VaRange,
    blocks: RangeInclusive<u64>,
    level: u32,
    numbers: RangeInclusive<u64>,
    budget: u64,
}

#[expect(clippy::reversed_empty_ranges, reason = "one that is done")]
const NOTHING: RangeInclusive<u64> = 1..=0;

impl Walk {
    /// A walk that asks for about `budget` granules before it gives up.
    pub(crate) fn new(range: VaRange, summary: &Summary, budget: u64) -> Self {
        let levels = summary.levels();
        let (first, last) = span(range, BLOCK_SHIFT);
        let blocks = if levels & SMALL == 0 { NOTHING } else { first..=last };
        Self {
            range,
            large: levels & !SMALL,
            small: levels & SMALL,
            in_block: 0,
            block: range,
            blocks,
            level: 0,
            numbers: NOTHING,
            budget,
        }
    }

    pub(crate) fn next(&mut self, summary: &Summary) -> Step {
        loop {
            if self.budget == 0 {
                return Step::All;
            }
            if let Some(number) = self.numbers.next() {
                self.budget -= 1;
                return Step::Ask(Granule { level: self.level, number });
            }
            let (levels, within) = if self.in_block != 0 {
                (&mut self.in_block, self.block)
            } else if self.large != 0 {
                (&mut self.large, self.range)
            } else {
                let Some(block) = self.blocks.next() else { return Step::Done };
                self.budget -= 1;
                if summary.blocks[block as usize % COUNTERS] != 0 {
                    self.in_block = self.small;
                    let whole = VaRange::covering(Va::new(block << BLOCK_SHIFT), 1 << BLOCK_SHIFT);
                    self.block = whole.ok().and_then(|whole| whole.intersection(self.range)).unwrap_or(self.range);
                }
                continue;
            };
            self.level = levels.trailing_zeros();
            *levels &= *levels - 1;
            let (first, last) = span(within, shift(self.level));
            self.numbers = first..=last;
        }
    }
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
        let regions = [range(0, 1), range(511, 3), range(5000, 70), range(1 << 20, 1 << 16), range(0, 100_000)];
        let mut summary = Summary::new();
        regions.iter().for_each(|region| summary.add(*region));
        for walked in [range(0, 1), range(512, 1), range(600, 5000), range(1 << 20, 1), range(0, 1 << 21)] {
            let mut walk = Walk::new(walked, &summary, u64::MAX);
            let steps = std::iter::from_fn(|| match walk.next(&summary) {
                Step::Ask(granule) => Some(granule),
                Step::All | Step::Done => None,
            });
            let asked: Vec<_> = steps.collect();
            for region in regions.iter().filter(|region| region.overlaps(walked)) {
                assert!(granules(*region).any(|granule| asked.contains(&granule)), "{region} in {walked}");
            }
        }
        regions.iter().for_each(|region| summary.remove(*region));
        assert_eq!((summary.levels(), summary.blocks.iter().sum::<u32>()), (0, 0));
    }

    #[test]
    fn a_walk_over_everything_gives_up() {
        let mut summary = Summary::new();
        summary.add(range(0, 1));
        let mut walk = Walk::new(VaRange::ALL, &summary, 1000);
        assert_eq!(std::iter::from_fn(|| Some(walk.next(&summary))).find(|step| *step == Step::All), Some(Step::All));
    }
}
