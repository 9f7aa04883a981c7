//! State that is zero again in the child of a fork.
//!
//! The state that a source keeps about one address space (its `Mm`, its file descriptors, its
//! counters) is wrong in the child of a fork. A `pthread_atfork` handler would reset it, but
//! `_Fork` and raw `clone` calls do not run such handlers. Comparing the pid would cost a system
//! call at each use. So the state lies in a page with `MADV_WIPEONFORK`: the kernel zeroes the page
//! in the copy when it copies the address space. A thread or a `vfork` child shares the memory of
//! its parent and sees the page unchanged.
//!
//! # Safety
//! This module maps the page and hands out references into it. The page is never unmapped. The page
//! is writable and aligned for any type, and the kernel has zeroed it. Code accesses the page only
//! as the atomics of [`Marks`].
//!
//! If a thread holds a lock while another thread forks, the lock stays locked in the child for
//! ever. So the locks that a child needs for starting its own source lie in this page, or are made
//! anew for each address space.

#![allow(unsafe_code, reason = "maps the one page; see its Safety section")]

use crate::Error;
use crate::wait::until;
use std::any::Any;
use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// The content of the page.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Marks {
    /// The address of this process's `MmWithUser`.
    pub(crate) space: AtomicPtr<mmu_notifier::MmWithUser>,
    /// A thread holds this lock while it makes the target of a pointer in this struct.
    pub(crate) make: Lock,
    /// Identifies this address space among the forks of one program. Zero until the first call of
    /// [`mark`], when a source is started, a hook is installed or a watch is made.
    pub(crate) alive: AtomicU64,
    /// Points to the mutex with the running source `kernel` of this address space. Each address
    /// space makes its own mutexes, so a thread of the parent cannot have left one locked.
    pub(crate) kernel: AtomicPtr<Running>,
    /// The same for the source `uffd`.
    pub(crate) uffd: AtomicPtr<Running>,
    /// The same for the subscriber that marks the watches of this address space.
    pub(crate) brackets: AtomicPtr<Running>,
    /// A thread holds this lock while it patches or restores libc's code.
    pub(crate) hook_patch: Lock,
}

/// The running source, as long as a handle of it exists. The type is erased, because the sources
/// lie above this module.
pub(crate) type Running = Mutex<Weak<dyn Any + Send + Sync>>;

static PAGE: AtomicPtr<Marks> = AtomicPtr::new(ptr::null_mut());

/// Returns the page of this address space.
///
/// # Panics
/// If the page cannot be mapped. After [`try_marks`] has succeeded, this function does not panic.
#[inline]
pub(crate) fn marks() -> &'static Marks {
    mapped().unwrap_or_else(|| map().expect("there is memory for one page"))
}

/// Like [`marks`], for functions that can return an error.
pub(crate) fn try_marks() -> Result<&'static Marks, Error> {
    let failed = |source| Error::Kernel {
        call: "mmap",
        tid: None,
        source,
    };
    mapped().map_or_else(map, Ok).map_err(failed)
}

/// The page, if it was mapped. Calls nothing, so fast paths need not save registers.
#[inline]
pub(crate) fn mapped() -> Option<&'static Marks> {
    // ORDER(source-marks): Acquire: another thread's mapping of the page happens before its use
    // here. Partner: the exchange in `map`.
    let page = PAGE.load(Ordering::Acquire);
    // SAFETY: a dereference needs a live, initialised `Marks`. `PAGE` is null or the page that
    // `map` mapped. That page is never unmapped, and zeroes are a valid `Marks`.
    unsafe { page.as_ref() }
}

#[cold]
fn map() -> io::Result<&'static Marks> {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: the kernel chooses the address of the new mapping, so no existing memory changes.
    let page = unsafe { libc::mmap(ptr::null_mut(), 4096, protection, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the advice changes only how a fork copies the page mapped above.
    let wiped = unsafe { libc::madvise(page, 4096, libc::MADV_WIPEONFORK) } == 0;
    let page = page.cast::<Marks>();
    // ORDER(source-marks): Release publishes the mapping and its advice. Acquire, on failure,
    // receives those of the thread that was first. Partner: this exchange in the other thread, and
    // the load in `marks`.
    match PAGE.compare_exchange(ptr::null_mut(), page, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            if !wiped {
                // `MADV_WIPEONFORK` is missing before Linux 4.14 and in some emulations of Linux.
                // The handler covers at least `fork`.
                // SAFETY: `wipe` is a function of this library. If the library is unloaded, libc
                // drops the handler.
                unsafe { libc::pthread_atfork(None, None, Some(wipe)) };
            }
            // SAFETY: the page was mapped above and is never unmapped.
            Ok(unsafe { &*page })
        }
        Err(first) => {
            // SAFETY: `PAGE` never held this page, so no other code has a pointer into it.
            unsafe { libc::munmap(page.cast(), 4096) };
            // SAFETY: the exchange failed, so `first` is the page that another thread mapped. That
            // page is never unmapped, and zeroes are a valid `Marks`.
            Ok(unsafe { &*first })
        }
    }
}

/// Returns the identity of this address space, made on first use.
pub(crate) fn mark() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    match marks()
        .alive
        .compare_exchange(0, id, Ordering::Relaxed, Ordering::Relaxed)
    {
        Ok(_) => id,
        Err(before) => before,
    }
}

extern "C" fn wipe() {
    let marks = marks();
    // ORDER: Relaxed: the child of a fork has one thread.
    marks.space.store(ptr::null_mut(), Ordering::Relaxed);
    marks.make.0.store(false, Ordering::Relaxed);
    marks.alive.store(0, Ordering::Relaxed);
    marks.kernel.store(ptr::null_mut(), Ordering::Relaxed);
    marks.uffd.store(ptr::null_mut(), Ordering::Relaxed);
    marks.brackets.store(ptr::null_mut(), Ordering::Relaxed);
    marks.hook_patch.0.store(false, Ordering::Relaxed);
}

/// Leaks `value` and returns its address, for a pointer in [`Marks`].
///
/// A leak checker would report `value` as lost: it does not scan the page, and in the child of a
/// fork the page is empty. So a list that starts in a `static` keeps every such value reachable,
/// including those of the parent.
pub(crate) fn keep<T>(value: T) -> *mut T {
    struct Kept {
        _value: *mut (),
        _next: *mut Kept,
    }
    static FIRST: AtomicPtr<Kept> = AtomicPtr::new(ptr::null_mut());
    let value = Box::into_raw(Box::new(value));
    let kept = Box::into_raw(Box::new(Kept {
        _value: value.cast(),
        _next: ptr::null_mut(),
    }));
    // ORDER: Relaxed: no code follows the list.
    let next = FIRST.swap(kept, Ordering::Relaxed);
    // SAFETY: the write needs a live node that no other thread accesses. The node was made above,
    // and no code follows the list.
    unsafe { (*kept)._next = next };
    value
}

/// Returns the mutex that `slot` of [`marks`] points to, made on first use. The mutex lives as long
/// as the process.
fn own(slot: &'static AtomicPtr<Running>) -> &'static Running {
    // ORDER(source-running): Acquire, for the mutex. Partner: the store below.
    let mut made = slot.load(Ordering::Acquire);
    if made.is_null() {
        made = marks().make.with(|| {
            let first = slot.load(Ordering::Relaxed);
            if !first.is_null() {
                return first;
            }
            let made = keep(Mutex::new(Weak::<()>::new() as Weak<dyn Any + Send + Sync>));
            // ORDER(source-running): Release, for the mutex. Partner: the load above.
            slot.store(made, Ordering::Release);
            made
        });
    }
    // SAFETY: the pointer comes from `keep` above, was published with Release, and is never freed.
    unsafe { &*made }
}

/// Returns the running source of this address space. If there is none, `make` makes it from the
/// identity of the address space.
///
/// # Panics
/// If a source of another type has the slot.
#[cfg(any(feature = "kernel", feature = "uffd"))]
pub(crate) fn running<T: Any + Send + Sync>(
    slot: &'static AtomicPtr<Running>,
    make: impl FnOnce(u64) -> Result<T, Error>,
) -> Result<Arc<T>, Error> {
    let mark = mark();
    let mut running = lock(slot);
    if let Some(source) = found(&running) {
        return Ok(source);
    }
    let source = Arc::new(make(mark)?);
    *running = Arc::downgrade(&(source.clone() as Arc<dyn Any + Send + Sync>));
    Ok(source)
}

/// Like [`running`], but `make` may wait for brackets: it runs without the lock, because a thread
/// inside a bracket may come here. If two threads make one at the same time, the second is dropped.
pub(crate) fn running_unlocked<T: Any + Send + Sync>(
    slot: &'static AtomicPtr<Running>,
    make: impl FnOnce(u64) -> Result<T, Error>,
) -> Result<Arc<T>, Error> {
    let mark = mark();
    let first = found(&lock(slot));
    if let Some(source) = first {
        return Ok(source);
    }
    let source = Arc::new(make(mark)?);
    let weak = Arc::downgrade(&(source.clone() as Arc<dyn Any + Send + Sync>));
    let mut running = lock(slot);
    if let Some(first) = found(&running) {
        return Ok(first);
    }
    let before = mem::replace(&mut *running, weak);
    // Free outside of the lock: the allocator may unmap memory, which begins a bracket.
    drop(running);
    drop(before);
    Ok(source)
}

fn lock(slot: &'static AtomicPtr<Running>) -> MutexGuard<'static, Weak<dyn Any + Send + Sync>> {
    own(slot).lock().unwrap_or_else(PoisonError::into_inner)
}

fn found<T: Any + Send + Sync>(running: &Weak<dyn Any + Send + Sync>) -> Option<Arc<T>> {
    let source = running.upgrade()?.downcast();
    Some(source.unwrap_or_else(|_| unreachable!("each slot has one source")))
}

/// A spin lock in [`Marks`]. The lock is free in the child of a fork, even if a thread of the
/// parent held it.
#[derive(Debug)]
pub(crate) struct Lock(AtomicBool);

impl Lock {
    /// Runs `f` while no other thread of this address space holds the lock.
    pub(crate) fn with<R>(&'static self, f: impl FnOnce() -> R) -> R {
        // ORDER(fork-lock): Acquire, for the writes of the last holder. Partner: the Release in
        // `drop`.
        until(|| {
            self.0
                .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        });
        let _held = Held(self);
        f()
    }
}

struct Held(&'static Lock);

impl Drop for Held {
    fn drop(&mut self) {
        // ORDER(fork-lock): Release. Partner: the exchange in `with`.
        self.0.0.store(false, Ordering::Release);
    }
}

/// Turns the value of `marks().space` into a reference.
pub(crate) fn space(
    pointer: *mut mmu_notifier::MmWithUser,
) -> Option<&'static mmu_notifier::MmWithUser> {
    // SAFETY: the pointer is null or comes from `keep` in `current_mm`. `make` there published the
    // pointer with Release, and its target is never freed.
    unsafe { pointer.as_ref() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_without_the_lock_may_be_made_twice_and_the_first_stays() {
        static SLOT: AtomicPtr<Running> = AtomicPtr::new(ptr::null_mut());
        let mut first = None;
        let second = running_unlocked(&SLOT, |_| {
            // A callback that runs while this thread allocates, or another thread.
            first = Some(running_unlocked(&SLOT, |_| Ok(1))?);
            Ok(2)
        });
        let (first, second) = (first.expect("made"), second.expect("found"));
        assert!(*first == 1 && Arc::ptr_eq(&first, &second));
    }
}
