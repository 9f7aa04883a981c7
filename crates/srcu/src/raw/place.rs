//! Maps a thread's number to a place in a table of slots: a bucket, and an offset in the bucket.
//!
//! # Invariants
//! A [`Place`] comes only from `NONE` or `of`, possibly through a word. If it is not `NONE`, its
//! bucket exists and its offset is that of a slot in the bucket. The bucket of `NONE` is the one
//! past the end.

use super::slot::Slot;

/// The number of slots after the header in the domain's own page.
pub(crate) const INLINE: usize = 28;
/// The number of slots in the second bucket, which is one page.
const SECOND: usize = 32;
/// The number of buckets. The buckets have room for 28 + 32 * (2^17 - 1) = 2^22 - 4 threads. A
/// process has fewer, because Linux has at most 2^22 thread ids, some of them for its own threads.
pub(crate) const BUCKETS: usize = 18;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(super) bucket: u32,
    /// In bytes, so that finding the slot takes one addition.
    pub(super) offset: u32,
}

impl Place {
    pub(crate) const NONE: Place = Place {
        bucket: BUCKETS as u32,
        offset: 0,
    };

    pub(crate) fn of(id: usize) -> Option<Place> {
        let (bucket, at) = split(id);
        let offset = u32::try_from(at * size_of::<Slot>()).ok()?;
        (bucket < BUCKETS).then_some(Place {
            bucket: bucket as u32,
            offset,
        })
    }

    /// Returns the thread's number, which [`of`](Self::of) was given.
    pub(crate) fn id(self) -> usize {
        (0..self.bucket as usize).map(slots_in).sum::<usize>()
            + self.offset as usize / size_of::<Slot>()
    }

    pub(crate) const fn to_word(self) -> u64 {
        (self.offset as u64) << 32 | self.bucket as u64
    }

    /// Restores a place from its [`to_word`](Self::to_word).
    #[inline(always)]
    pub(crate) const fn from_word(word: u64) -> Self {
        Self {
            bucket: word as u32,
            offset: (word >> 32) as u32,
        }
    }
}

/// Returns the bucket of a thread's number, and its index there.
pub(crate) fn split(id: usize) -> (usize, usize) {
    if id < INLINE {
        return (0, id);
    }
    let shifted = id - INLINE + SECOND;
    let power = shifted.ilog2();
    (
        (power - SECOND.ilog2() + 1) as usize,
        shifted - (1 << power),
    )
}

pub(crate) fn slots_in(bucket: usize) -> usize {
    if bucket == 0 {
        INLINE
    } else {
        SECOND << (bucket - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_fill_the_buckets_without_gap_or_overlap() {
        let mut expected = (0, 0);
        for id in 0..5000 {
            assert_eq!(split(id), expected, "number {id}");
            expected.1 += 1;
            if expected.1 == slots_in(expected.0) {
                expected = (expected.0 + 1, 0);
            }
            let place = Place::of(id).expect("few enough");
            assert_eq!((place.id(), Place::from_word(place.to_word())), (id, place));
        }
    }

    #[test]
    fn there_is_a_place_for_every_thread_that_linux_can_have() {
        assert!(Place::of((1 << 22) - 1024).is_some());
        assert_eq!(Place::of(1 << 23), None);
    }
}
