//! The free I/O virtual addresses of a container.

use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Hands out free addresses by first fit.
///
/// While the lock is held, the allocator is never called. The allocator may unmap memory, and then
/// a source runs the cache's callback on this thread. So such a callback never finds this lock held
/// by its own thread, even if it deregisters a region.
#[derive(Debug)]
pub(super) struct Gaps(Mutex<List>);

#[derive(Debug)]
struct List {
    /// The first address and the length of each gap, by ascending addresses. No two gaps touch.
    ///
    /// The capacity is at least the number of gaps plus the number of regions, because each
    /// returned region may become a gap of its own.
    gaps: Vec<(u64, u64)>,
    /// The number of regions that are handed out.
    regions: usize,
}

impl Gaps {
    /// Makes the list from gaps in ascending order, no two of which touch.
    pub(super) fn new(gaps: Vec<(u64, u64)>) -> Self {
        Self(Mutex::new(List { gaps, regions: 0 }))
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `size` addresses from the beginning of the first gap that is large enough.
    pub(super) fn take(&self, size: u64) -> Option<u64> {
        // `spare` is declared before the guard, so its drop frees the replaced storage after the
        // guard is dropped.
        let mut spare = Vec::new();
        loop {
            let mut list = self.lock();
            let needed = list.gaps.len() + list.regions + 1;
            if list.gaps.capacity() < needed {
                if spare.capacity() < needed {
                    drop(list);
                    spare = Vec::with_capacity(2 * needed);
                    continue;
                }
                // Does not allocate, because the capacity was just checked.
                spare.extend_from_slice(&list.gaps);
                mem::swap(&mut list.gaps, &mut spare);
            }
            let at = list.gaps.iter().position(|(_, length)| *length >= size)?;
            let (start, length) = list.gaps[at];
            if length > size {
                list.gaps[at] = (start + size, length - size);
            } else {
                list.gaps.remove(at);
            }
            list.regions += 1;
            return Some(start);
        }
    }

    /// Returns the addresses of a region to the list, and joins gaps that touch.
    pub(super) fn give(&self, start: u64, size: u64) {
        let mut list = self.lock();
        list.regions -= 1;
        let gaps = &mut list.gaps;
        let at = gaps.partition_point(|(first, _)| *first < start);
        let joins_next = gaps.get(at).is_some_and(|(next, _)| *next == start + size);
        let before = at.checked_sub(1).map(|before| &mut gaps[before]);
        match before.filter(|(first, length)| *first + *length == start) {
            Some((_, length)) if !joins_next => *length += size,
            Some((_, length)) => {
                *length += size;
                let (_, next) = gaps.remove(at);
                gaps[at - 1].1 += next;
            }
            None if joins_next => {
                let (_, next) = gaps[at];
                gaps[at] = (start, size + next);
            }
            // Does not allocate, because `take` reserved room for this region.
            None => gaps.insert(at, (start, size)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(gaps: &Gaps) -> Vec<(u64, u64)> {
        gaps.lock().gaps.clone()
    }

    #[test]
    fn addresses_are_given_out_once_and_gaps_are_joined() {
        let gaps = Gaps::new(vec![(0x1000, 0x3000), (0x8000, 0x2000)]);
        let (one, two) = (gaps.take(0x1000), gaps.take(0x2000));
        assert_eq!((one, two), (Some(0x1000), Some(0x2000)));
        assert_eq!(gaps.take(0x4000), None);
        assert_eq!(gaps.take(0x2000), Some(0x8000));
        gaps.give(0x1000, 0x1000);
        gaps.give(0x8000, 0x2000);
        gaps.give(0x2000, 0x2000);
        assert_eq!(content(&gaps), [(0x1000, 0x3000), (0x8000, 0x2000)]);
        // Between two gaps, and before a gap.
        let taken = [(); 3].map(|()| gaps.take(0x1000).unwrap());
        gaps.give(taken[0], 0x1000);
        gaps.give(taken[2], 0x1000);
        assert_eq!(content(&gaps).len(), 3);
        gaps.give(taken[1], 0x1000);
        assert_eq!(content(&gaps), [(0x1000, 0x3000), (0x8000, 0x2000)]);
        let (first, second) = (gaps.take(0x1000).unwrap(), gaps.take(0x1000).unwrap());
        gaps.give(second, 0x1000);
        gaps.give(first, 0x1000);
        assert_eq!(content(&gaps), [(0x1000, 0x3000), (0x8000, 0x2000)]);
    }

    #[test]
    fn what_comes_back_finds_its_room_made() {
        let gaps = Gaps::new(vec![(0, 1 << 20); 1]);
        let taken: Vec<u64> = (0..64).map(|_| gaps.take(0x1000).unwrap()).collect();
        let storage = gaps.lock().gaps.as_ptr();
        // Every second region, so that none touches another gap.
        for start in taken.iter().step_by(2) {
            gaps.give(*start, 0x1000);
        }
        assert_eq!(content(&gaps).len(), 33);
        assert_eq!(gaps.lock().gaps.as_ptr(), storage);
        for start in taken.iter().skip(1).step_by(2) {
            gaps.give(*start, 0x1000);
        }
        assert_eq!(content(&gaps), [(0, 1 << 20)]);
        assert_eq!(gaps.lock().regions, 0);
    }
}
