//! How a region is found by any of its addresses: through the granules that it touches.
//!
//! A granule is an aligned piece of the address space, of 4 KiB at level 0 and eight times as much
//! at each further level. A region belongs to the lowest level at which it touches few of them, and
//! is entered in the table under each. A look-up tries the granule of its first address at every
//! level that is in use: usually one or two.

use mmu_notifier::{Va, VaRange};

/// The level that has the whole address space in two granules is the last.
pub(crate) const LEVELS: u32 = 18;
/// The most granules that a region touches.
pub(crate) const MAX_GRANULES: u32 = 9;

/// Levels whose granules are smaller than a block.
pub(crate) const SMALL_LEVELS: u32 = 3;
/// Bits of an address within a block, the unit of the summary that walks skip by.
pub(crate) const BLOCK_SHIFT: u32 = 21;

/// One granule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Granule {
    pub(crate) level: u32,
    pub(crate) number: u64,
}

/// Bits of an address within a granule.
#[inline(always)]
pub(crate) const fn shift(level: u32) -> u32 {
    12 + 3 * level
}

/// The numbers of the first and last piece of `1 << shift` bytes that the range touches.
pub(crate) fn span(range: VaRange, shift: u32) -> (u64, u64) {
    (range.start().get() >> shift, range.last().get() >> shift)
}

/// The level a region belongs to.
pub(crate) fn level_of(range: VaRange) -> u32 {
    (0..LEVELS)
        .find(|level| {
            let (first, last) = span(range, shift(*level));
            last - first < u64::from(MAX_GRANULES)
        })
        .expect("the last level has two granules")
}

/// The granules of a region.
pub(crate) fn granules(range: VaRange) -> impl Iterator<Item = Granule> {
    let level = level_of(range);
    let (first, last) = span(range, shift(level));
    (first..=last).map(move |number| Granule { level, number })
}

/// What makes the hash of an address at a level.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lead {
    /// The bits of a granule's number.
    pub(crate) mask: u64,
    /// The golden section, as a part of what the number can be.
    pub(crate) factor: u64,
}

pub(crate) const fn lead(level: u32) -> Lead {
    Lead {
        mask: u64::MAX << shift(level),
        factor: 0x9e37_79b9_7f4a_7c15 >> shift(level) | 1,
    }
}

/// The hash of the granule that an address is in, at the level of `lead`: the upper half of the
/// product, in which neighbours are spread evenly (Fibonacci hashing).
#[inline(always)]
pub(crate) fn hash(address: Va, lead: Lead) -> u32 {
    ((address.get() & lead.mask).wrapping_mul(lead.factor) >> 32) as u32
}

impl Granule {
    pub(crate) fn hash(self) -> u32 {
        hash(Va::new(self.number << shift(self.level)), lead(self.level))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, pages: u64) -> VaRange {
        VaRange::covering(Va::new(first << 12), pages << 12).unwrap()
    }

    #[test]
    fn no_region_touches_more_granules_than_the_most() {
        for pages in (0..40)
            .map(|power| (1_u64 << power) - 1)
            .filter(|pages| *pages != 0)
        {
            for first in [0, 1, 7, 511, 12_345] {
                let count = granules(range(first, pages)).count();
                assert!(
                    (1..=MAX_GRANULES as usize).contains(&count),
                    "{pages} pages from {first}: {count}"
                );
            }
        }
        assert_eq!(granules(VaRange::ALL).count(), 2);
    }

    #[test]
    fn each_page_of_a_region_leads_to_one_of_its_granules() {
        let region = range(12_345, 3000);
        let found: Vec<_> = granules(region).collect();
        for page in 12_345..12_345 + 3000 {
            let hash = hash(Va::new(page << 12), lead(level_of(region)));
            assert!(found.iter().any(|granule| granule.hash() == hash));
        }
    }
}
