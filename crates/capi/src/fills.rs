//! Filling a cache: one interval over the whole address space gives the sequence number. It sees
//! the brackets of all sources and those that the program opens itself.
//!
//! A bracket calls intervals before subscribers. If the change's interval callback comes before the
//! fill's check of the sequence, the fill sees the new sequence and retries. If the interval
//! callback comes after the check, the subscriber's callback comes even later. The subscriber's
//! callback then waits for the cache's lock, and finds the new entry.

use mmu_notifier::raw::{Interval, RawIntervalOps};
use mmu_notifier::{InvalidateRange, MmWithUser, VaRange, WouldBlock};
use std::fmt;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

/// The sequence of fills. The interval is made at the first fill, because each interval makes every
/// bracket slower.
#[derive(Default)]
pub(crate) struct Fills {
    /// Null, or an interval that stays inserted until the drop of this value.
    interval: AtomicPtr<Interval<Whole>>,
    making: Mutex<()>,
}

/// The callback of the one interval, with the interval's address.
struct Whole(NonNull<Interval<Whole>>);

// SAFETY: Any thread may use an interval, and the value holds only an interval's address.
unsafe impl Send for Whole {}
// SAFETY: As for `Send`.
unsafe impl Sync for Whole {}

impl RawIntervalOps for Whole {
    fn invalidate(&self, _: &InvalidateRange<'_>, seq: u64) -> Result<(), WouldBlock> {
        // SAFETY: A reference needs a live interval. The core calls this function only while the
        // interval is inserted.
        unsafe { self.0.as_ref() }.set_seq(seq);
        Ok(())
    }
}

impl Fills {
    fn interval(&self) -> Option<&Interval<Whole>> {
        // ORDER(capi-fills): Acquire, for the interval's content. Partner: the store in `make`.
        // SAFETY: The pointer is null, or the interval stays inserted, and so live, until the drop
        // of `self`.
        unsafe { self.interval.load(Ordering::Acquire).as_ref() }
    }

    fn make(&self, mm: &MmWithUser) -> Option<&Interval<Whole>> {
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = self.interval() {
            return Some(made);
        }
        let place: NonNull<Interval<Whole>> = NonNull::from(Box::leak(Box::new(MaybeUninit::<
            Interval<Whole>,
        >::uninit(
        ))))
        .cast();
        // SAFETY: The place must be valid until the interval is removed. The box is leaked. It is
        // freed in `drop` after the removal, or below if the insert fails.
        if unsafe { Interval::insert(place, mm, VaRange::ALL, Whole(place)) }.is_err() {
            // SAFETY: The box was leaked above, and the failed insert has written nothing to it.
            drop(unsafe { Box::from_raw(place.cast::<MaybeUninit<Interval<Whole>>>().as_ptr()) });
            return None;
        }
        // ORDER(capi-fills): Release, for the content. Partner: the load in `interval`.
        self.interval.store(place.as_ptr(), Ordering::Release);
        self.interval()
    }

    /// Waits until no bracket is open and returns the sequence; `None` if this thread must not
    /// wait.
    pub(crate) fn begin(&self, mm: &MmWithUser) -> Option<u64> {
        let interval = self.interval().or_else(|| self.make(mm))?;
        Some(interval.read_begin()).filter(|seq| *seq != 0)
    }

    pub(crate) fn retry(&self, seq: u64) -> bool {
        self.interval()
            .is_none_or(|interval| interval.read_retry(seq))
    }
}

impl Drop for Fills {
    fn drop(&mut self) {
        let Some(interval) = NonNull::new(*self.interval.get_mut()) else {
            return;
        };
        // SAFETY: The interval is inserted, and only `self`, which is being dropped, leads to it.
        if unsafe { Interval::remove(interval) }.is_ok() {
            // SAFETY: The box was leaked in `make`, and `remove` has dropped the interval in it.
            drop(unsafe {
                Box::from_raw(interval.cast::<MaybeUninit<Interval<Whole>>>().as_ptr())
            });
        }
        // If the removal fails, this thread is in a callback or in the child of a fork. Then the
        // interval is leaked, which is harmless.
    }
}

impl fmt::Debug for Fills {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Fills").field(&self.interval()).finish()
    }
}
