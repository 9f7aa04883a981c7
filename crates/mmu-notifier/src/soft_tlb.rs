//! A software TLB: translations of pages in memory of a fixed size.

use crate::{InvalidateRange, PAGE_SIZE, ShadowOps, Va, VaRange};

/// A software TLB: a fixed number of page translations, which can be the shadow of an
/// [`InvalidateSeq`](crate::InvalidateSeq).
///
/// A `SoftTlb` replaces a map of pages under a lock. When a callback removes entries, a map frees
/// nodes, which a callback must not do (see [`Notifier`](crate::Notifier)). When a thread adds
/// entries, a map allocates, which no holder of a lock that a callback takes may do. A `SoftTlb`
/// allocates once, in [`new`](Self::new), and frees in its drop.
///
/// Like a processor's TLB, a `SoftTlb` may evict entries: each page has one place, and inserting a
/// page evicts the page that had the place. The next use of the evicted page is a miss, and the
/// user must look the page up again. A run of adjacent pages that is no longer than the capacity
/// does not evict its own pages.
///
/// # Examples
/// ```
/// use mmu_notifier::{Event, InvalidateSeq, MmWithUser, Registration, SoftTlb, Va, VaRange};
///
/// let mm = MmWithUser::new();
/// let shadow = Registration::new(&mm, InvalidateSeq::new([VaRange::ALL], SoftTlb::new(64)))?;
///
/// let page = VaRange::covering(Va::new(0x7000), 1)?;
/// let snapshot = shadow.snapshot(page);
/// let frame = 42; // Looked up here, however long it takes.
/// shadow.try_install(snapshot, |tlb| tlb.insert(page.start(), frame))?;
/// assert_eq!(shadow.with_shadow(|tlb| tlb.get(Va::new(0x7123))), Some(42));
///
/// drop(mm.invalidate(page, Event::Unmap));
/// assert_eq!(shadow.with_shadow(|tlb| tlb.get(page.start())), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct SoftTlb<V> {
    /// Each place holds a page number and its translation. The number of places is a power of two.
    places: Box<[Option<(u64, V)>]>,
}

impl<V: Copy> SoftTlb<V> {
    /// Makes an empty table for `capacity` pages, rounded up to a power of two, and at least one.
    ///
    /// # Panics
    /// If there is not enough memory.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            places: vec![None; capacity.max(1).next_power_of_two()].into(),
        }
    }

    /// Returns how many pages the table has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.places.len()
    }

    /// Returns the translation of the page with this address. `None` is a miss: look it up and
    /// [`insert`](Self::insert) it.
    #[inline]
    #[must_use]
    pub fn get(&self, address: Va) -> Option<V> {
        let page = page(address);
        self.places[self.place(page)]
            .filter(|(of, _)| *of == page)
            .map(|(_, value)| value)
    }

    /// Inserts the page with this address, and evicts the page that had its place.
    #[inline]
    pub fn insert(&mut self, address: Va, value: V) {
        let page = page(address);
        let place = self.place(page);
        self.places[place] = Some((page, value));
    }

    /// Drops every page of a range. Takes as many steps as the range has pages or the table has
    /// places, whichever number is smaller.
    pub fn zap(&mut self, range: VaRange) {
        let (first, last) = (page(range.start()), page(range.last()));
        if last - first < self.places.len() as u64 {
            for page in first..=last {
                let place = self.place(page);
                self.places[place].take_if(|(of, _)| *of == page);
            }
        } else {
            for place in &mut self.places {
                place.take_if(|(of, _)| (first..=last).contains(of));
            }
        }
    }

    /// Tells whether the table holds no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.iter().all(Option::is_none)
    }

    #[inline]
    fn place(&self, page: u64) -> usize {
        page as usize & (self.places.len() - 1)
    }
}

impl<V: Copy + Send + 'static> ShadowOps for SoftTlb<V> {
    fn zap(&mut self, range: &InvalidateRange<'_>) {
        self.zap(range.range());
    }
}

#[inline]
fn page(address: Va) -> u64 {
    address.get() / PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(first: u64, count: u64) -> VaRange {
        VaRange::covering(Va::new(first * PAGE_SIZE), count * PAGE_SIZE).expect("it is not empty")
    }

    fn held(tlb: &SoftTlb<u64>) -> Vec<u64> {
        (0..64)
            .filter(|page| tlb.get(Va::new(page * PAGE_SIZE)) == Some(*page))
            .collect()
    }

    #[test]
    fn a_range_leaves_and_its_neighbours_stay() {
        let mut tlb = SoftTlb::new(7);
        assert_eq!(tlb.capacity(), 8);
        for page in 0..8 {
            tlb.insert(Va::new(page * PAGE_SIZE + 5), page);
        }
        tlb.zap(pages(2, 3));
        assert_eq!(held(&tlb), [0, 1, 5, 6, 7]);
        // A range with as many pages as there are places, and a longer one.
        tlb.zap(pages(6, 8));
        assert_eq!(held(&tlb), [0, 1, 5]);
        tlb.zap(pages(1, 9));
        assert_eq!(held(&tlb), [0]);
        tlb.zap(VaRange::ALL);
        assert!(tlb.is_empty());
    }

    #[test]
    fn a_page_evicts_another_one_and_is_not_taken_for_it() {
        let mut tlb = SoftTlb::new(8);
        tlb.insert(Va::new(PAGE_SIZE), 1);
        assert_eq!(tlb.get(Va::new(9 * PAGE_SIZE)), None);
        tlb.insert(Va::new(9 * PAGE_SIZE), 9);
        assert_eq!(
            (tlb.get(Va::new(PAGE_SIZE)), tlb.get(Va::new(9 * PAGE_SIZE))),
            (None, Some(9))
        );
        // Zapping the page that was evicted leaves the other one alone.
        tlb.zap(pages(1, 1));
        assert_eq!(held(&tlb), [9]);
    }
}
