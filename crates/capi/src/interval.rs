//! `struct mmu_interval_notifier`.

use crate::border::{die, export, guarded, warn_once};
use crate::mm::{self, MmStruct};
use crate::range::{self, Range};
use libc::{c_int, c_ulong};
use mmu_notifier::raw::{Interval, RawIntervalOps};
use mmu_notifier::{Blocking, InvalidateRange, MmWithUser, Va, VaRange, WouldBlock, WouldDeadlock};
use std::mem::MaybeUninit;
use std::ptr::NonNull;

/// `struct mmu_interval_notifier`.
#[repr(C)]
#[derive(Debug)]
pub struct IntervalNotifier {
    start: c_ulong,
    last: c_ulong,
    ops: *const IntervalOps,
    mm: *mut MmStruct,
    node: MaybeUninit<[usize; NODE_WORDS]>,
}

const NODE_WORDS: usize = 14;
const _: () = assert!(size_of::<Interval<Driver>>() <= NODE_WORDS * size_of::<usize>());
const _: () = assert!(align_of::<Interval<Driver>>() <= align_of::<usize>());

/// `struct mmu_interval_notifier_ops`.
#[repr(C)]
#[derive(Debug)]
pub struct IntervalOps {
    invalidate:
        Option<unsafe extern "C-unwind" fn(*mut IntervalNotifier, *const Range, c_ulong) -> bool>,
}

/// A driver's interval, as the core calls it.
struct Driver {
    me: NonNull<IntervalNotifier>,
    invalidate: unsafe extern "C-unwind" fn(*mut IntervalNotifier, *const Range, c_ulong) -> bool,
}

// SAFETY: The callback may run on any thread, in parallel (crate docs, Callbacks).
unsafe impl Send for Driver {}
// SAFETY: As for `Send`.
unsafe impl Sync for Driver {}

impl RawIntervalOps for Driver {
    fn invalidate(&self, range: &InvalidateRange<'_>, seq: u64) -> Result<(), WouldBlock> {
        // SAFETY: The function follows its prototype (crate docs, Callbacks). It gets the driver's
        // own interval, which is live, because the core calls only inserted intervals.
        let call = |told| unsafe { (self.invalidate)(self.me.as_ptr(), told, seq) };
        let done = guarded!(
            "mmu_interval_notifier_ops.invalidate",
            range::tell(range, call)
        );
        match range.blocking() {
            _ if done => Ok(()),
            Blocking::Forbidden => Err(WouldBlock),
            Blocking::Allowed => {
                warn_once!(
                    "invalidate of an interval returned false for a blockable range: it was ignored"
                );
                Ok(())
            }
        }
    }
}

/// Returns the interval of the core in an interval of C.
///
/// # Safety
/// `interval` must point to memory for an `IntervalNotifier`.
unsafe fn node(interval: NonNull<IntervalNotifier>) -> NonNull<Interval<Driver>> {
    // SAFETY: The field must be inside one allocation. `interval` points to memory for the whole
    // struct, as the caller promises.
    let node = unsafe { &raw mut (*interval.as_ptr()).node };
    NonNull::new(node.cast()).expect("the address of a field is not null")
}

/// Returns the core's interval behind an argument of an exported function. Ends the process if the
/// argument is null.
///
/// # Safety
/// `interval` must be null, or inserted as long as the reference lives.
unsafe fn inserted<'a>(function: &str, interval: *const IntervalNotifier) -> &'a Interval<Driver> {
    let Some(interval) = NonNull::new(interval.cast_mut()) else {
        die(function, "the interval is null")
    };
    // SAFETY: The caller promises an inserted interval, so `interval` points to a whole struct.
    let node = unsafe { node(interval) };
    // SAFETY: A reference needs a live node. The caller promises that the interval stays inserted.
    unsafe { node.as_ref() }
}

/// Checks the arguments of either insert function, and inserts with `insert`.
///
/// # Safety
/// `interval` must be null or point to memory for an interval, `mm` must be null or the bits of a
/// handle, and `ops` must be null or point to a table.
unsafe fn insert(
    interval: *mut IntervalNotifier,
    mm: *mut MmStruct,
    (start, length): (c_ulong, c_ulong),
    ops: *const IntervalOps,
    insert: impl FnOnce(&MmWithUser, NonNull<Interval<Driver>>, VaRange, Driver) -> Result<(), c_int>,
) -> c_int {
    let Some(me) = NonNull::new(interval).filter(|_| !mm.is_null()) else {
        return -libc::EINVAL;
    };
    // SAFETY: `ops` is null or points to a table, as the caller promises.
    let Some(invalidate) = unsafe { ops.as_ref() }.and_then(|ops| ops.invalidate) else {
        return -libc::EINVAL;
    };
    let start = Va::untagged(start);
    // Rounding the interval to whole pages causes no additional callback, because the ranges of
    // brackets are whole pages as well.
    let Ok(range) = VaRange::covering(start, length) else {
        return -libc::EOVERFLOW;
    };
    // SAFETY: `mm` is not null here, so it is the bits of a handle, as the caller promises. Until
    // this function returns, the caller keeps the handle.
    let user = unsafe { mm::borrow_user(&raw const mm) };
    let Some(user) = user.filter(|mm| !mm.is_inherited()) else {
        return -libc::EINVAL;
    };
    // SAFETY: `interval` is not null here, so it points to memory for an interval, as the caller
    // promises. No other code uses that memory before the insert.
    let place = unsafe { &mut *interval };
    let start = start.get();
    (place.start, place.last, place.ops, place.mm) = (start, start + (length - 1), ops, mm);
    // SAFETY: `me` points to memory for an interval, as the caller promises.
    let node = unsafe { node(me) };
    insert(user, node, range, Driver { me, invalidate }).map_or_else(|error| error, |()| 0)
}

export! {
    /// Inserts an interval.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_interval_insert(
        interval: *mut IntervalNotifier,
        mm: *mut MmStruct,
        start: c_ulong,
        length: c_ulong,
        ops: *const IntervalOps,
    ) -> c_int {
        let into = |user: &_, node, range, driver| {
            // SAFETY: The field is large enough and aligned (asserted above). The driver keeps it
            // at its place until the removal (crate docs, Objects).
            unsafe { Interval::insert(node, user, range, driver) }.map_err(|WouldDeadlock| -libc::EDEADLK)
        };
        // SAFETY: The arguments are as `insert` demands (crate docs, Pointers and Address spaces).
        unsafe { insert(interval, mm, (start, length), ops, into) }
    }

    /// Like `mmun_interval_insert`, for a caller that holds the write lock.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_interval_insert_locked(
        interval: *mut IntervalNotifier,
        mm: *mut MmStruct,
        start: c_ulong,
        length: c_ulong,
        ops: *const IntervalOps,
    ) -> c_int {
        let into = |_: &_, node, range, driver| {
            let Some(guard) = mm::held(mm) else {
                warn_once!("mmu_interval_notifier_insert_locked: this thread does not hold the write lock: refused");
                return Err(-libc::EINVAL);
            };
            // SAFETY: `held` returns an initialised guard of this thread. No other code of this
            // thread uses the guard before `insert_locked` returns, because no callback runs there.
            let guard = unsafe { &mut *guard };
            // SAFETY: The field is large enough and aligned (asserted above). The driver keeps it
            // at its place until the removal (crate docs, Objects).
            unsafe { Interval::insert_locked(node, guard, range, driver) }.map_err(|WouldDeadlock| -libc::EDEADLK)
        };
        // SAFETY: The arguments are as `insert` demands (crate docs, Pointers and Address spaces).
        unsafe { insert(interval, mm, (start, length), ops, into) }
    }

    /// Removes an interval.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_interval_remove(interval: *mut IntervalNotifier) {
        const NAME: &str = "mmu_interval_notifier_remove";
        // SAFETY: The interval is null or inserted (crate docs, Objects).
        if unsafe { inserted(NAME, interval) }.mm().is_inherited() {
            // The interval belongs to the parent; no bracket of the child calls it.
            return;
        }
        let Some(interval) = NonNull::new(interval) else { die(NAME, "the interval is null") };
        // SAFETY: The interval is inserted, so the pointer points to a whole struct.
        let node = unsafe { node(interval) };
        // SAFETY: The interval is inserted, and only this thread uses it (crate docs, Objects).
        mm::must_not_wait(NAME, unsafe { Interval::remove(node) });
    }

    /// Waits until no invalidation of the interval is running, and returns its sequence.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_interval_read_begin(interval: *mut IntervalNotifier) -> c_ulong {
        // SAFETY: The interval is null or inserted (crate docs, Objects).
        unsafe { inserted("mmu_interval_read_begin", interval) }.read_begin()
    }

    /// Returns whether the range was invalidated since `seq` was read.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_interval_read_retry(interval: *mut IntervalNotifier, seq: c_ulong) -> bool {
        // SAFETY: The interval is null or inserted (crate docs, Objects).
        unsafe { inserted("mmu_interval_read_retry", interval) }.read_retry(seq)
    }

    /// Stores the sequence number that the core has passed to the callback.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_interval_set_seq(interval: *mut IntervalNotifier, seq: c_ulong) {
        // SAFETY: The interval is null or inserted (crate docs, Objects).
        unsafe { inserted("mmu_interval_set_seq", interval) }.set_seq(seq);
    }
}

crate::layout::layout! {
    "mmu_interval_notifier" = IntervalNotifier { start as "interval_tree", ops, mm, node as "mmun_private" }
    "mmu_interval_notifier_ops" = IntervalOps { invalidate }
}
