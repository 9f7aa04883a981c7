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

use super::place::{BUCKETS, slots_in};
use super::slot::Slot;
use super::{ids, pages};
use crate::sync::{AtomicPtr, Ordering};
use std::ptr::{self, NonNull};

pub(crate) struct Table {
    buckets: [AtomicPtr<Slot>; BUCKETS + 1],
}

impl Table {
    pub(crate) const fn empty() -> Self {
        Self {
            buckets: [const { AtomicPtr::new(ptr::null_mut()) }; BUCKETS + 1],
        }
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
        // SAFETY: It must point to a live slot that has no `&mut`: buckets live as long as
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
        self.mine()
            .expect("the thread has a number and the bucket exists")
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
