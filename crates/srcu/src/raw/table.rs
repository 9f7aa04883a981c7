//! Where a thread's slot is: buckets of slots, allocated on first touch, never moved while the
//! domain lives.
//!
//! The first bucket is the rest of the domain's own page, so a program with few threads takes one
//! page a domain. Every further bucket doubles the room. A thread's number says where to look, the
//! same in every domain; it is worked out once a thread and kept in thread-local storage.
//!
//! # Safety
//! # Invariants
//! * A bucket pointer is null, or points to that bucket's full number of zeroed or used slots, for
//!   the domain's life.
//! * The bucket past the end is always null: threads without a number look there and so take the
//!   slow way.
//! * A `Place` comes only from `NONE` or `of`, perhaps by way of a word, so its bucket exists and
//!   its offset is that of a slot in it.

use super::slot::Slot;
use super::{ids, pages};
use crate::sync::{AtomicPtr, Ordering};
use std::ptr::{self, NonNull};

/// Slots behind the header in the domain's own page.
pub(crate) const INLINE: usize = 28;
/// Slots in the second bucket, which is one page.
const SECOND: usize = 32;
/// Room for 28 + 32 * (2^17 - 1) threads; Linux has at most 2^22.
pub(crate) const BUCKETS: usize = 18;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    bucket: u32,
    /// In bytes, so that the way to the slot is one addition.
    offset: u32,
}

impl Place {
    pub(crate) const NONE: Place = Place { bucket: BUCKETS as u32, offset: 0 };

    pub(crate) fn of(id: usize) -> Option<Place> {
        let (bucket, at) = split(id);
        let offset = u32::try_from(at * size_of::<Slot>()).ok()?;
        (bucket < BUCKETS).then_some(Place { bucket: bucket as u32, offset })
    }

    /// The number that [`of`](Self::of) was given.
    pub(crate) fn id(self) -> usize {
        (0..self.bucket as usize).map(slots_in).sum::<usize>() + self.offset as usize / size_of::<Slot>()
    }

    pub(crate) const fn to_word(self) -> u64 {
        (self.offset as u64) << 32 | self.bucket as u64
    }

    /// The place whose [`to_word`](Self::to_word) it is.
    #[inline(always)]
    pub(crate) const fn from_word(word: u64) -> Self {
        Self { bucket: word as u32, offset: (word >> 32) as u32 }
    }
}

/// The bucket of a thread's number and its index there.
pub(crate) fn split(id: usize) -> (usize, usize) {
    if id < INLINE {
        return (0, id);
    }
    let shifted = id - INLINE + SECOND;
    let power = shifted.ilog2();
    ((power - SECOND.ilog2() + 1) as usize, shifted - (1 << power))
}

pub(crate) fn slots_in(bucket: usize) -> usize {
    if bucket == 0 { INLINE } else { SECOND << (bucket - 1) }
}

pub(crate) struct Table {
    buckets: [AtomicPtr<Slot>; BUCKETS + 1],
}

impl Table {
    pub(crate) const fn empty() -> Self {
        Self { buckets: [const { AtomicPtr::new(ptr::null_mut()) }; BUCKETS + 1] }
    }

    /// A table whose first bucket is `first`.
    ///
    /// # Safety
    /// `first` points to `INLINE` zeroed slots that live as long as the table is used.
    pub(super) unsafe fn with_first(first: *mut Slot) -> Self {
        let table = Self::empty();
        // INVARIANT: The caller's duty is the invariant. No ORDER: the table is not shared yet.
        table.buckets[0].store(first, Ordering::Relaxed);
        table
    }

    /// This thread's slot, if it has one here already.
    #[inline(always)]
    pub(crate) fn mine(&self) -> Option<&Slot> {
        let place = ids::place();
        // SAFETY: The index must be in bounds: a `Place` has a bucket below `BUCKETS`, or is `NONE`
        // with exactly that.
        let bucket = unsafe { self.buckets.get_unchecked(place.bucket as usize) };
        // ORDER(srcu-bucket): Acquire, so that the zeroes of a new bucket are seen. Partner: the
        // Release in `install`.
        let first = NonNull::new(bucket.load(Ordering::Acquire))?;
        // SAFETY: The offset must stay within the allocation: it is that of a slot of this bucket.
        let slot = unsafe { first.byte_add(place.offset as usize) };
        // SAFETY: It must point to a live slot that nobody has `&mut` to: buckets live as long as
        // the domain, which `&self` shows to be alive, and slots are only ever shared.
        Some(unsafe { slot.as_ref() })
    }

    /// This thread's slot, claimed and allocated if need be, without the allocator.
    #[cold]
    pub(crate) fn claim_mine(&self) -> &Slot {
        let place = ids::place_or_claim();
        let bucket = place.bucket as usize;
        // ORDER(srcu-bucket): Acquire, partner in `install`.
        if self.buckets[bucket].load(Ordering::Acquire).is_null() {
            self.install(bucket);
        }
        self.mine().expect("the thread has a number and the bucket exists")
    }

    fn install(&self, bucket: usize) {
        let new = pages::alloc(bucket - 1);
        // INVARIANT: Class `b - 1` is as large as bucket `b`, and comes zeroed. ORDER(srcu-bucket):
        // Release for the zeroes. A grace period that misses the pointer reads null after its heavy
        // fence, so our count is not yet made either, ORDER(srcu-enter).
        let installed = self.buckets[bucket].compare_exchange(
            ptr::null_mut(),
            new.as_ptr().cast(),
            Ordering::Release,
            Ordering::Relaxed,
        );
        if installed.is_err() {
            pages::free(bucket - 1, new);
        }
    }

    /// Calls `f` for every slot that a thread may have counted in so far.
    pub(crate) fn each(&self, mut f: impl FnMut(&Slot)) {
        let mut left = ids::high();
        for (bucket, first) in self.buckets[..BUCKETS].iter().enumerate() {
            let slots = slots_in(bucket).min(left);
            // ORDER(srcu-bucket): Acquire, partner in `install`.
            let first = first.load(Ordering::Acquire);
            if !first.is_null() {
                for at in 0..slots {
                    // SAFETY: The offset must stay within the allocation: the bucket has at least
                    // `slots` slots.
                    let slot = unsafe { first.add(at) };
                    // SAFETY: It must be a live shared slot: as in `mine`.
                    f(unsafe { &*slot });
                }
            }
            left -= slots;
            if left == 0 {
                break;
            }
        }
    }

    /// Gives back all buckets but the first, which belongs to the page the table is in.
    pub(super) fn free_buckets(&mut self) {
        for (bucket, first) in self.buckets.iter_mut().enumerate().skip(1) {
            if let Some(first) = NonNull::new(std::mem::replace(first.get_mut(), ptr::null_mut())) {
                pages::free(bucket - 1, first.cast());
            }
        }
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
