//! Words that are zero again in the child of a fork.
//!
//! What a source keeps about *this* address space (its `Mm`, its file descriptors, its counters) means nothing in the child
//! of a fork. A handler of `pthread_atfork` misses `_Fork` and raw `clone` calls, and asking for the pid is a system call.
//! So the words lie in a page that the kernel itself wipes when it copies the address space, and only then: a `vfork` child
//! and a thread share the memory, and see them.
//!
//! # Safety
//! This module makes the page and hands out references into it. The page is mapped for ever, writable, zeroed by the
//! kernel and aligned for any word; it is only ever touched as the atomics of [`Marks`].

#![allow(unsafe_code, reason = "maps the one page; see its Safety section")]

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// The words.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Marks {
    /// The address of this process's `MmWithUser`.
    pub(crate) space: AtomicPtr<mmu_notifier::MmWithUser>,
    /// Counts up to tell one address space of a family of forks from the next: nonzero where a source was started.
    pub(crate) alive: AtomicU64,
}

static PAGE: AtomicPtr<Marks> = AtomicPtr::new(ptr::null_mut());

/// Returns the words of this address space.
///
/// # Panics
/// If not even one page can be mapped.
#[inline]
pub(crate) fn marks() -> &'static Marks {
    // ORDER(source-marks): Acquire, for the page's mapping by another thread. Partner: the exchange in `map`.
    let page = PAGE.load(Ordering::Acquire);
    // SAFETY: a dereference needs a live, initialised `Marks`: `PAGE` is null or what `map` made, which is never unmapped,
    // and zeroes are a valid `Marks`.
    unsafe { page.as_ref() }.unwrap_or_else(map)
}

#[cold]
fn map() -> &'static Marks {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping where the kernel likes; nothing of ours is touched.
    let page = unsafe { libc::mmap(ptr::null_mut(), 4096, protection, flags, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED, "one page can be mapped");
    // SAFETY: the advice is on the page just mapped and changes its inheritance only.
    let wiped = unsafe { libc::madvise(page, 4096, libc::MADV_WIPEONFORK) } == 0;
    let page = page.cast::<Marks>();
    // ORDER(source-marks): Release for the mapping and its advice, Acquire for that of whoever was first. Partner: itself, and
    // the load in `marks`.
    match PAGE.compare_exchange(ptr::null_mut(), page, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            if !wiped {
                // Before Linux 4.14, and in some emulations of Linux: better than nothing.
                // SAFETY: the handler is a function, and so stays.
                unsafe { libc::pthread_atfork(None, None, Some(wipe)) };
            }
            // SAFETY: the page was mapped above and from here on stays for ever.
            unsafe { &*page }
        }
        Err(first) => {
            // SAFETY: nobody has seen this page.
            unsafe { libc::munmap(page.cast(), 4096) };
            // SAFETY: as in `marks`.
            unsafe { &*first }
        }
    }
}

/// The mark of this address space, made on first use.
pub(crate) fn mark() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    match marks().alive.compare_exchange(0, id, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => id,
        Err(before) => before,
    }
}

extern "C" fn wipe() {
    let marks = marks();
    // ORDER: Relaxed: there is one thread in the child of a fork.
    marks.space.store(ptr::null_mut(), Ordering::Relaxed);
    marks.alive.store(0, Ordering::Relaxed);
}

/// Turns what `marks().space` holds into a reference.
pub(crate) fn space(pointer: *mut mmu_notifier::MmWithUser) -> Option<&'static mmu_notifier::MmWithUser> {
    // SAFETY: the word is null or comes from `Box::into_raw` in `current_mm`, published with Release, and is never freed.
    unsafe { pointer.as_ref() }
}
