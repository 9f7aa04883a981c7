//! Finds a region by any of its addresses, through the granules that the region touches.
//!
//! A granule is an aligned piece of the address space: 4 KiB at level 0, and eight times as much at
//! each further level. A region belongs to the lowest level at which it touches at most
//! [`MAX_GRANULES`] granules, and the table has an entry for each of these. A look-up tries the
//! granule of its first address at every level in use. Usually one or two levels are in use.

use mmu_notifier::{Va, VaRange};

/// The number of levels. At the last level, two granules make up the whole address space.
pub(crate) const LEVELS: u32 = 18;
/// The largest number of granules that a region touches.
pub(crate) const MAX_GRANULES: u32 = 9;

/// The levels whose granules are smaller than a block.
pub(crate) const SMALL_LEVELS: u32 = 3;
/// The number of address bits within a block. Walks skip empty blocks with the help of the summary.
pub(crate) const BLOCK_SHIFT: u32 = 21;

/// One granule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Granule {
    pub(crate) level: u32,
    pub(crate) number: u64,
}

/// The number of address bits within a granule.
#[inline(always)]
pub(crate) const fn shift(level: u32) -> u32 {
    12 + 3 * level
}

/// Divides the address space into pieces of `1 << shift` bytes. Returns the numbers of the first
/// and the last piece that the range touches.
pub(crate) fn span(range: VaRange, shift: u32) -> (u64, u64) {
    (range.start().get() >> shift, range.last().get() >> shift)
}

/// Returns the level of a region.
pub(crate) fn level_of(range: VaRange) -> u32 {
    (0..LEVELS)
        .find(|level| {
            let (first, last) = span(range, shift(*level));
            last - first < u64::from(MAX_GRANULES)
        })
        .expect("the last level has two granules")
}

/// Returns the granules of a region.
pub(crate) fn granules(range: VaRange) -> impl Iterator<Item = Granule> {
    let level = level_of(range);
    let (first, last) = span(range, shift(level));
    (first..=last).map(move |number| Granule { level, number })
}

/// The constants for hashing an address at one level.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lead {
    /// Selects the bits of a granule's number.
    pub(crate) mask: u64,
    /// The golden ratio, scaled to the range of these numbers.
    pub(crate) factor: u64,
}

pub(crate) const fn lead(level: u32) -> Lead {
    Lead {
        mask: u64::MAX << shift(level),
        factor: 0x9e37_79b9_7f4a_7c15 >> shift(level) | 1,
    }
}

/// Returns the hash of the granule that contains an address, at the level of `lead`. The hash is
/// the upper half of the product, which spreads neighbours evenly (Fibonacci hashing).
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
