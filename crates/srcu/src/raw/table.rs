//! The slots of a domain's threads, in buckets. A bucket is allocated when a thread first needs it,
//! and does not move while the domain lives.
//!
//! The first bucket is the rest of the domain's own page, so in a program with few threads each
//! domain needs one page. Every further bucket about doubles the room. A thread's number determines
//! the place of its slot, which is the same in every domain. Each thread computes its place once,
//! and keeps it in thread-local storage.
//!
//! # Safety
//! # Invariants
//! * A bucket pointer is null, or points to that bucket's full number of slots for as long as the
//!   domain lives. The slots are zeroed or in use.
//! * The bucket past the end is always null. Threads without a number look there, and so take the
//!   slow path.

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

    /// Makes a table whose first bucket is `first`.
    ///
    /// # Safety
    /// `first` points to `INLINE` zeroed slots that live as long as the table is used.
    pub(super) unsafe fn with_first(first: *mut Slot) -> Self {
        let table = Self::empty();
        // INVARIANT: the caller promises that `first` has the slots of the first bucket. No ORDER:
        // the table is not shared yet.
        table.buckets[0].store(first, Ordering::Relaxed);
        table
    }

    /// Returns this thread's slot, if it already has one here.
    #[inline(always)]
    pub(crate) fn mine(&self) -> Option<&Slot> {
        let place = ids::place();
        // SAFETY: the index must be in bounds. The bucket of a `Place` is below `BUCKETS`, or equal
        // to it for `NONE`.
        let bucket = unsafe { self.buckets.get_unchecked(place.bucket as usize) };
        // ORDER(srcu-bucket): Acquire: the zeroes of a new bucket are visible. Partner: the Release
        // in `install`.
        let first = NonNull::new(bucket.load(Ordering::Acquire))?;
        // SAFETY: the offset must be inside the allocation. This is the offset of a slot in this
        // bucket.
        let slot = unsafe { first.byte_add(place.offset as usize) };
        // SAFETY: `slot` must point to a live slot to which no `&mut` exists. Buckets live as long
        // as the domain, which `&self` keeps alive, and slots are only shared.
        Some(unsafe { slot.as_ref() })
    }

    /// Returns this thread's slot. If necessary, claims a thread number and makes the bucket, both
    /// without the allocator.
    #[cold]
    pub(crate) fn claim_mine(&self) -> &Slot {
        let place = ids::place_or_claim();
        let bucket = place.bucket as usize;
        // ORDER(srcu-bucket): Acquire; partner in `install`.
        if self.buckets[bucket].load(Ordering::Acquire).is_null() {
            self.install(bucket);
        }
        self.mine()
            .expect("the thread has a number and the bucket exists")
    }

    fn install(&self, bucket: usize) {
        let new = pages::alloc(bucket - 1);
        // INVARIANT: class `b - 1` is as large as bucket `b`, and is zeroed.
        // ORDER(srcu-bucket): Release, for the zeroes. If a grace period reads null after its heavy
        // fence, this thread has not counted yet either, ORDER(srcu-enter).
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

    /// Calls `f` for every slot in which a thread may have counted.
    pub(crate) fn each(&self, mut f: impl FnMut(&Slot)) {
        let mut left = ids::high();
        for (bucket, first) in self.buckets[..BUCKETS].iter().enumerate() {
            let slots = slots_in(bucket).min(left);
            // ORDER(srcu-bucket): Acquire; partner in `install`.
            let first = first.load(Ordering::Acquire);
            if !first.is_null() {
                for at in 0..slots {
                    // SAFETY: the offset must be inside the allocation. The bucket has at least
                    // `slots` slots.
                    let slot = unsafe { first.add(at) };
                    // SAFETY: `slot` must point to a live slot to which no `&mut` exists, as in
                    // `mine`.
                    f(unsafe { &*slot });
                }
            }
            left -= slots;
            if left == 0 {
                break;
            }
        }
    }

    /// Frees all buckets except the first, which is part of the page that contains the table.
    pub(super) fn free_buckets(&mut self) {
        for (bucket, first) in self.buckets.iter_mut().enumerate().skip(1) {
            if let Some(first) = NonNull::new(std::mem::replace(first.get_mut(), ptr::null_mut())) {
                pages::free(bucket - 1, first.cast());
            }
        }
    }
}
