//! The invalidations that have begun and have not ended.

use mmu_notifier::VaRange;

/// How many open invalidations are recorded with their exact ranges. More are open only if more
/// than 16 threads change memory at the same moment.
const EXACT: usize = 16;

/// The open invalidations.
///
/// # Invariants
/// Each open invalidation is one of `exact[..len]`, or one of the `others`, whose ranges are inside
/// `around`.
#[derive(Debug)]
pub(super) struct Open {
    exact: [VaRange; EXACT],
    len: usize,
    others: u32,
    around: VaRange,
}

impl Open {
    pub(super) fn new() -> Self {
        Self {
            exact: [VaRange::ALL; EXACT],
            len: 0,
            others: 0,
            around: VaRange::ALL,
        }
    }

    pub(super) fn begin(&mut self, range: VaRange) {
        if let Some(place) = self.exact.get_mut(self.len) {
            *place = range;
            self.len += 1;
        } else {
            self.around = if self.others == 0 {
                range
            } else {
                self.around.hull(range)
            };
            self.others += 1;
        }
    }

    /// Ends an invalidation that began with the same range.
    pub(super) fn end(&mut self, range: VaRange) {
        match self.exact[..self.len]
            .iter()
            .position(|open| *open == range)
        {
            Some(at) => {
                self.len -= 1;
                self.exact[at] = self.exact[self.len];
            }
            None => self.others = self.others.saturating_sub(1),
        }
    }

    /// Tells whether an open invalidation overlaps `range`. If more than [`EXACT`] are open, the
    /// result may be true although none overlaps.
    pub(super) fn overlaps(&self, range: VaRange) -> bool {
        self.exact[..self.len]
            .iter()
            .any(|open| open.overlaps(range))
            || self.others != 0 && self.around.overlaps(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmu_notifier::Va;

    #[test]
    fn whatever_is_open_is_known_however_many_there_are() {
        let page = |number: usize| VaRange::covering(Va::new((number as u64) << 12), 1).unwrap();
        let mut open = Open::new();
        let pages: Vec<_> = (0..3 * EXACT).map(|number| page(2 * number)).collect();
        pages.iter().for_each(|page| open.begin(*page));
        assert!(pages.iter().all(|page| open.overlaps(*page)) && !open.overlaps(page(1)));
        for (at, page) in pages.iter().enumerate() {
            open.end(*page);
            assert!(pages[at + 1..].iter().all(|page| open.overlaps(*page)));
        }
        assert!(!open.overlaps(VaRange::ALL));
    }
}
