//! `struct mm_struct`: handles of an address space, and its write lock.
//!
//! # Safety
//! In C a handle is a pointer that is never dereferenced: the bits of an [`Mm`] or [`MmWithUser`],
//! which are one word each. `mmgrab`, `mmget` and `mmget_not_zero` clone a handle, and `mmdrop` and
//! `mmput` drop a handle. Every other function borrows the caller's handle.

use crate::border::{SELF_WAIT, die, export};
use mmu_notifier::{Mm, MmWithUser, MmapWriteGuard, WouldDeadlock};
use std::cell::{Cell, UnsafeCell};
use std::mem::{self, ManuallyDrop, MaybeUninit};
use std::ptr;

/// `struct mm_struct` of C, an opaque type: only pointers to it exist.
#[repr(C)]
#[derive(Debug)]
pub struct MmStruct {
    opaque: [u8; 0],
}

const _: () = assert!(
    size_of::<Mm>() == size_of::<*mut MmStruct>() && size_of::<MmWithUser>() == size_of::<Mm>()
);

/// Returns the bits of a handle, without counting one more handle.
#[inline(always)]
pub(crate) fn bits(mm: &Mm) -> *mut MmStruct {
    // SAFETY: Both are one word (asserted above), and any word is a valid pointer if it is never
    // dereferenced.
    unsafe { mem::transmute_copy(mm) }
}

/// Returns the handle whose bits lie at `place`.
///
/// # Safety
/// `place` must hold the bits of a handle that is counted for as long as the reference lives.
#[inline(always)]
pub(crate) unsafe fn borrow<'a>(place: *const *mut MmStruct) -> &'a Mm {
    // SAFETY: A reference needs a live `Mm`. `place` holds the bits of a counted handle, as the
    // caller promises.
    unsafe { &*place.cast() }
}

/// Returns the user whose bits lie at `place`, or `None` if the address space has ended.
///
/// # Safety
/// As for `borrow`. If the address space is alive now, the caller must keep it alive as long as the
/// reference lives.
#[inline(always)]
pub(crate) unsafe fn borrow_user<'a>(place: *const *mut MmStruct) -> Option<&'a MmWithUser> {
    // SAFETY: The caller makes the promise of `borrow` for `place`.
    let mm = unsafe { borrow(place) };
    // SAFETY: A reference needs a live `MmWithUser`. It is one word like `Mm`, and the caller
    // promises to keep the address space alive.
    (mm.mm_users() != 0).then(|| unsafe { &*place.cast() })
}

/// Takes a handle over from C.
///
/// # Safety
/// `mm` must be null, or the bits of a `T` that the caller owns and gives up. With `ManuallyDrop`
/// as `T`, the caller keeps its handle.
unsafe fn take<T>(function: &str, mm: *mut MmStruct) -> T {
    const { assert!(size_of::<T>() == size_of::<*mut MmStruct>()) };
    if mm.is_null() {
        die(function, "the address space is null");
    }
    // SAFETY: Both types are one word (asserted above), and `mm` is the bits of a `T`, as the
    // caller promises.
    unsafe { mem::transmute_copy(&mm) }
}

export! {
    /// Takes one more handle (`mm_count`).
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmgrab(mm: *mut MmStruct) {
        // SAFETY: `mm` is null or a handle of the caller (crate docs, Address spaces), which
        // `ManuallyDrop` leaves with the caller.
        let mm = unsafe { take::<ManuallyDrop<Mm>>("mmgrab", mm) };
        mem::forget(Mm::clone(&mm));
    }

    /// Drops a handle.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmdrop(mm: *mut MmStruct) {
        // SAFETY: `mm` is null or a handle (crate docs, Address spaces), which the caller gives up.
        drop(unsafe { take::<Mm>("mmdrop", mm) });
    }

    /// Takes one more user (`mm_users`).
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmget(mm: *mut MmStruct) {
        // SAFETY: `mm` is null or a user of the caller (crate docs, Address spaces), which
        // `ManuallyDrop` leaves with the caller.
        let mm = unsafe { take::<ManuallyDrop<MmWithUser>>("mmget", mm) };
        mem::forget(MmWithUser::clone(&mm));
    }

    /// Takes one more user unless the address space has ended.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmget_not_zero(mm: *mut MmStruct) -> bool {
        // SAFETY: `mm` is null or a handle of the caller (crate docs, Address spaces), which
        // `ManuallyDrop` leaves with the caller.
        let mm = unsafe { take::<ManuallyDrop<Mm>>("mmget_not_zero", mm) };
        mm.mmget_not_zero().map(mem::forget).is_some()
    }

    /// Drops a user; dropping the last user is exit.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmput(mm: *mut MmStruct) {
        // SAFETY: `mm` is null or a user (crate docs, Address spaces), which the caller gives up.
        drop(unsafe { take::<MmWithUser>("mmput", mm) });
    }

    /// Returns the address space of this process. The pointer is not counted, and is valid as long
    /// as the process runs.
    ///
    /// # Safety
    /// Has no preconditions.
    fn mmun_current_mm() -> *mut MmStruct {
        bits(mmu_source::current_ref())
    }

    /// Makes an address space with one user.
    ///
    /// # Safety
    /// Has no preconditions.
    fn mmun_mm_new() -> *mut MmStruct {
        bits(&ManuallyDrop::new(MmWithUser::new()))
    }

    /// Returns whether a bracket would call a callback.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mm_has_notifiers(mm: *mut MmStruct) -> bool {
        // SAFETY: `mm` is null or a handle of the caller (crate docs, Address spaces), which
        // `ManuallyDrop` leaves with the caller.
        unsafe { take::<ManuallyDrop<Mm>>("mm_has_notifiers", mm) }.has_notifiers()
    }

    /// Takes the write lock.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmap_write_lock(mm: *mut MmStruct) {
        if mm.is_null() {
            die("mmap_write_lock", "the address space is null");
        }
        // SAFETY: `mm` is a handle that the caller keeps until it unlocks (crate docs, Address
        // spaces).
        if let Err(WouldDeadlock) = unsafe { lock(mm) } {
            die("mmap_write_lock", "this thread holds the lock, or is inside an invalidation: it would wait for itself");
        }
    }

    /// Releases the write lock.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmap_write_unlock(mm: *mut MmStruct) {
        if !unlock(mm) {
            die("mmap_write_unlock", "this thread does not hold the lock");
        }
    }
}

/// A write lock that C code holds.
struct Held {
    /// The bits of the locked address space's handle. Null if this entry holds no lock.
    mm: Cell<*mut MmStruct>,
    /// Initialised if `mm` is not null. Borrows the handle whose bits are in `mm`.
    guard: UnsafeCell<MaybeUninit<MmapWriteGuard<'static>>>,
}

/// How many address spaces a thread can have locked at once.
const AT_ONCE: usize = 4;

thread_local! {
    static HELD: [Held; AT_ONCE] = const {
        [const { Held { mm: Cell::new(ptr::null_mut()), guard: UnsafeCell::new(MaybeUninit::uninit()) } }; AT_ONCE]
    };
}

/// Takes the write lock; the same thread must call `unlock`.
///
/// # Safety
/// `mm` must be the bits of a handle that stays counted until `unlock`.
pub(crate) unsafe fn lock(mm: *mut MmStruct) -> Result<(), WouldDeadlock> {
    HELD.with(|held| {
        let Some(free) = held.iter().find(|held| held.mm.get().is_null()) else {
            die(
                "mmap_write_lock",
                "this thread holds the locks of four address spaces already",
            );
        };
        free.mm.set(mm);
        // SAFETY: `free.mm` holds the bits of a handle that stays counted until `unlock`, as the
        // caller promises, and `unlock` clears the bits after it has dropped the guard. The
        // address space may have no user any more, but taking the lock needs no user.
        let user: &'static MmWithUser = unsafe { &*free.mm.as_ptr().cast() };
        match user.mmap_write_lock() {
            Ok(guard) => {
                // SAFETY: The place must be writable and unused. It is a thread-local variable of
                // this thread, and the entry was free.
                unsafe { (*free.guard.get()).write(guard) };
                Ok(())
            }
            Err(refused) => {
                free.mm.set(ptr::null_mut());
                Err(refused)
            }
        }
    })
}

/// Releases the write lock of `mm`. Returns false if this thread does not hold it.
pub(crate) fn unlock(mm: *mut MmStruct) -> bool {
    let Some(guard) = held(mm) else { return false };
    // SAFETY: The guard must be initialised, unused and dropped once. `held` returns only
    // initialised guards. No other code of this thread is using the guard, because no callback runs
    // while a function uses it. The entry is cleared below, so the guard is not dropped again.
    unsafe { guard.drop_in_place() };
    HELD.with(|held| {
        held.iter()
            .filter(|held| held.mm.get() == mm)
            .for_each(|held| held.mm.set(ptr::null_mut()))
    });
    true
}

/// Returns this thread's guard if it has locked `mm`. The guard does not move before `unlock`.
pub(crate) fn held(mm: *mut MmStruct) -> Option<*mut MmapWriteGuard<'static>> {
    HELD.with(|held| {
        held.iter()
            .find(|held| !mm.is_null() && held.mm.get() == mm)
            .map(|held| held.guard.get().cast())
    })
}

/// Ends the process if a function without a result would have waited for its own thread.
pub(crate) fn must_not_wait(function: &str, waited: Result<(), WouldDeadlock>) {
    if let Err(WouldDeadlock) = waited {
        die(function, SELF_WAIT);
    }
}
