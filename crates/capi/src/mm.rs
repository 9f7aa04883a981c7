//! `struct mm_struct`: handles of an address space, and its write lock.
//!
//! # Safety
//! In C a handle is a pointer that is never dereferenced: the bits of an [`Mm`] or [`MmWithUser`],
//! which are one word. `mmgrab`, `mmget` and `mmget_not_zero` clone a handle, `mmdrop` and `mmput`
//! drop one; every other function borrows its caller's handle.

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

/// Returns the bits of a handle. The bits are not counted as a handle.
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
    // SAFETY: The place must hold an `Mm`: its bits, and the count, are the caller's duty.
    unsafe { &*place.cast() }
}

/// Returns the user whose bits lie at `place`, or `None` if the address space has ended.
///
/// # Safety
/// As for `borrow`. If the address space is alive now, the caller must keep it alive.
#[inline(always)]
pub(crate) unsafe fn borrow_user<'a>(place: *const *mut MmStruct) -> Option<&'a MmWithUser> {
    // SAFETY: The caller's duty is passed on.
    let mm = unsafe { borrow(place) };
    // SAFETY: The place must hold an `MmWithUser`: it is one word like `Mm`, and the caller keeps
    // the address space alive.
    (mm.mm_users() != 0).then(|| unsafe { &*place.cast() })
}

/// Takes a handle over from C.
///
/// # Safety
/// `mm` must be the bits of a handle that is the caller's to give.
unsafe fn take<T>(function: &str, mm: *mut MmStruct) -> T {
    const { assert!(size_of::<T>() == size_of::<*mut MmStruct>()) };
    if mm.is_null() {
        die(function, "the address space is null");
    }
    // SAFETY: Both are one word, and these are the bits of a `T`: the caller's duty.
    unsafe { mem::transmute_copy(&mm) }
}

export! {
    /// Takes one more handle (`mm_count`).
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmgrab(mm: *mut MmStruct) {
        // SAFETY: The caller has a handle, which stays its own.
        let mm = unsafe { take::<ManuallyDrop<Mm>>("mmgrab", mm) };
        mem::forget(Mm::clone(&mm));
    }

    /// Drops a handle.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmdrop(mm: *mut MmStruct) {
        // SAFETY: The caller gives its handle.
        drop(unsafe { take::<Mm>("mmdrop", mm) });
    }

    /// Takes one more user (`mm_users`).
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmget(mm: *mut MmStruct) {
        // SAFETY: The caller has a user, which stays its own.
        let mm = unsafe { take::<ManuallyDrop<MmWithUser>>("mmget", mm) };
        mem::forget(MmWithUser::clone(&mm));
    }

    /// Takes one more user unless the address space has ended.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmget_not_zero(mm: *mut MmStruct) -> bool {
        // SAFETY: The caller has a handle, which stays its own.
        let mm = unsafe { take::<ManuallyDrop<Mm>>("mmget_not_zero", mm) };
        mm.mmget_not_zero().map(mem::forget).is_some()
    }

    /// Drops a user; dropping the last user is exit.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mmput(mm: *mut MmStruct) {
        // SAFETY: The caller gives its user.
        drop(unsafe { take::<MmWithUser>("mmput", mm) });
    }

    /// Returns the address space of this process. The pointer is not counted, and is valid as long
    /// as the process runs.
    ///
    /// # Safety
    /// None.
    fn mmun_current_mm() -> *mut MmStruct {
        bits(mmu_source::current_ref())
    }

    /// Makes an address space with one user.
    ///
    /// # Safety
    /// None.
    fn mmun_mm_new() -> *mut MmStruct {
        bits(&ManuallyDrop::new(MmWithUser::new()))
    }

    /// Returns whether a bracket would call a callback.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_mm_has_notifiers(mm: *mut MmStruct) -> bool {
        // SAFETY: The caller has a handle, which stays its own.
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
        // SAFETY: The caller has a handle.
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
    /// Null if none.
    mm: Cell<*mut MmStruct>,
    /// Initialized if `mm` is not null. Borrows the handle at `mm`.
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
        // SAFETY: The place holds the bits of a counted handle, and keeps them until the guard is
        // dropped. The address space may have no user any more, but the lock needs no user.
        let user: &'static MmWithUser = unsafe { &*free.mm.as_ptr().cast() };
        match user.mmap_write_lock() {
            Ok(guard) => {
                // SAFETY: Writing needs a place that no other code uses: it was free, and belongs
                // to this thread.
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

/// Unlocks; returns false if this thread had not locked it.
pub(crate) fn unlock(mm: *mut MmStruct) -> bool {
    let Some(guard) = held(mm) else { return false };
    // SAFETY: The guard is initialized, and no other code of this thread is using it: no callback
    // runs while a function uses the guard.
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
