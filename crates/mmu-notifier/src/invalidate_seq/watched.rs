//! The ranges that a shadow covers.

use crate::VaRange;
use crate::sync::Arc;

/// Sorted ranges, none of which overlaps or touches another.
#[derive(Debug, Clone)]
pub(super) struct Watched(Arc<Vec<VaRange>>);

impl Watched {
    pub(super) fn new(ranges: impl IntoIterator<Item = VaRange>) -> Self {
        let mut sorted: Vec<_> = ranges.into_iter().collect();
        sorted.sort_unstable();
        let mut merged: Vec<VaRange> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match merged.last_mut() {
                Some(last) if last.end().is_none_or(|end| range.start() <= end) => {
                    *last = last.hull(range)
                }
                _ => merged.push(range),
            }
        }
        Self(Arc::new(merged))
    }

    /// Returns the first range that does not end before `range` begins.
    fn candidate(&self, range: VaRange) -> Option<VaRange> {
        let at = self
            .0
            .partition_point(|watched| watched.last() < range.start());
        self.0.get(at).copied()
    }

    /// Tells whether any page of `range` is watched.
    pub(super) fn meets(&self, range: VaRange) -> bool {
        self.candidate(range)
            .is_some_and(|watched| watched.overlaps(range))
    }

    /// Tells whether every page of `range` is watched.
    pub(super) fn holds(&self, range: VaRange) -> bool {
        self.candidate(range)
            .is_some_and(|watched| watched.intersection(range) == Some(range))
    }
}

#[cfg(all(test, not(mmun_loom)))]
mod tests {
    use super::*;
    use crate::Va;

    fn pages(first: u64, count: u64) -> VaRange {
        VaRange::covering(Va::new(first << 12), count << 12).unwrap()
    }

    #[test]
    fn touching_ranges_are_one() {
        let watched = Watched::new([pages(4, 2), pages(1, 2), pages(3, 1), pages(9, 1)]);
        assert_eq!(*watched.0, [pages(1, 5), pages(9, 1)]);
        assert!(
            watched.holds(pages(2, 4))
                && !watched.holds(pages(5, 2))
                && !watched.holds(pages(7, 1))
        );
        assert!(
            watched.meets(pages(5, 2)) && !watched.meets(pages(6, 3)) && watched.meets(pages(6, 4))
        );
    }

    #[test]
    fn everything_may_be_watched() {
        let watched = Watched::new([pages(3, 1), VaRange::ALL, pages(7, 1)]);
        assert_eq!(*watched.0, [VaRange::ALL]);
        assert!(watched.holds(VaRange::ALL));
        assert!(!Watched::new([]).meets(VaRange::ALL));
    }
}
