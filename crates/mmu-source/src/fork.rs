//! Words that are zero again in the child of a fork.
//!
//! What a source keeps about *this* address space (its `Mm`, its file descriptors, its counters)
//! means nothing in the child of a fork. A handler of `pthread_atfork` misses `_Fork` and raw
//! `clone` calls, and asking for the pid is a system call. So the words lie in a page that the
//! kernel itself wipes when it copies the address space, and only then: a `vfork` child and a
//! thread share the memory, and see them.
//!
//! # Safety
//! This module makes the page and hands out references into it. The page is mapped for ever,
//! writable, zeroed by the kernel and aligned for any word; it is only ever touched as the atomics
//! of [`Marks`].
//!
//! A lock that a thread holds while another one forks is held in the child for ever. So what a
//! child may need as well, to start a source of its own, is guarded by a lock in that page, or by
//! one that each address space makes anew.

#![allow(unsafe_code, reason = "maps the one page; see its Safety section")]

use crate::Error;
use crate::wait::until;
use std::any::Any;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The words.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Marks {
    /// The address of this process's `MmWithUser`.
    pub(crate) space: AtomicPtr<mmu_notifier::MmWithUser>,
    /// Held while the target of one of these words is made.
    pub(crate) make: Lock,
    /// Counts up to tell one address space of a family of forks from the next: nonzero where a
    /// source was started.
    pub(crate) alive: AtomicU64,
    /// The running source of this address space. Its lock is made anew for each address space, so a
    /// thread of the parent cannot have left it locked.
    pub(crate) kernel: AtomicPtr<Running>,
    pub(crate) uffd: AtomicPtr<Running>,
    /// What marks the watches of this address space.
    pub(crate) brackets: AtomicPtr<Running>,
    /// Held while the hook finds out what is to be patched.
    pub(crate) hook_plan: Lock,
    /// Held while the hook patches.
    pub(crate) hook_patch: Lock,
}

/// The running source, as long as a handle of it exists. Its type is not known here, because the
/// sources lie above this module.
pub(crate) type Running = Mutex<Weak<dyn Any + Send + Sync>>;

static PAGE: AtomicPtr<Marks> = AtomicPtr::new(ptr::null_mut());

/// Returns the words of this address space.
///
/// # Panics
/// If not even one page can be mapped.
#[inline]
pub(crate) fn marks() -> &'static Marks {
    // ORDER(source-marks): Acquire, for the page's mapping by another thread. Partner: the exchange
    // in `map`.
    let page = PAGE.load(Ordering::Acquire);
    // SAFETY: a dereference needs a live, initialised `Marks`: `PAGE` is null or what `map` made,
    // which is never unmapped, and zeroes are a valid `Marks`.
    unsafe { page.as_ref() }.unwrap_or_else(map)
}

#[cold]
fn map() -> &'static Marks {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: a new mapping where the kernel likes; nothing of ours is touched.
    let page = unsafe { libc::mmap(ptr::null_mut(), 4096, protection, flags, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED, "one page can be mapped");
    // SAFETY: the advice is on the page just mapped and changes its inheritance only.
    let wiped = unsafe { libc::madvise(page, 4096, libc::MADV_WIPEONFORK) } == 0;
    let page = page.cast::<Marks>();
    // ORDER(source-marks): Release for the mapping and its advice, Acquire for those of the thread
    // that was first. Partner: itself, and the load in `marks`.
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
            // SAFETY: no other code has seen this page.
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
    // ORDER: Relaxed: there is one thread in the child of a fork.
    marks.space.store(ptr::null_mut(), Ordering::Relaxed);
    marks.make.0.store(false, Ordering::Relaxed);
    marks.alive.store(0, Ordering::Relaxed);
    marks.kernel.store(ptr::null_mut(), Ordering::Relaxed);
    marks.uffd.store(ptr::null_mut(), Ordering::Relaxed);
    marks.brackets.store(ptr::null_mut(), Ordering::Relaxed);
    marks.hook_plan.0.store(false, Ordering::Relaxed);
    marks.hook_patch.0.store(false, Ordering::Relaxed);
}

/// Makes what lasts as long as the process, for a word of [`marks`] to point to.
///
/// A leak checker does not look into that page, and in the child of a fork the page is empty. So a
/// list that begins in a `static` refers to all such values, those of the parent as well.
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
    // ORDER: Relaxed: the list is never followed.
    let next = FIRST.swap(kept, Ordering::Relaxed);
    // SAFETY: writing needs a live place that no other thread uses: it was made above, and no
    // code follows the list.
    unsafe { (*kept)._next = next };
    value
}

/// Returns what `slot` of [`marks`] holds for this address space, made on first use. It lasts as
/// long as the process.
fn own(slot: &'static AtomicPtr<Running>) -> &'static Running {
    // ORDER(source-running): Acquire, for the content. Partner: the store below.
    let mut made = slot.load(Ordering::Acquire);
    if made.is_null() {
        made = marks().make.with(|| {
            let first = slot.load(Ordering::Relaxed);
            if !first.is_null() {
                return first;
            }
            let made = keep(Mutex::new(Weak::<()>::new() as Weak<dyn Any + Send + Sync>));
            // ORDER(source-running): Release for the content. Partner: the load above.
            slot.store(made, Ordering::Release);
            made
        });
    }
    // SAFETY: the word comes from `keep` above, published with Release, and is never freed.
    unsafe { &*made }
}

/// Returns the source of this address space that runs, or makes it, with the mark of the address
/// space.
///
/// # Panics
/// If another source has the slot.
pub(crate) fn running<T: Any + Send + Sync>(
    slot: &'static AtomicPtr<Running>,
    make: impl FnOnce(u64) -> Result<T, Error>,
) -> Result<Arc<T>, Error> {
    let mark = mark();
    let mut running = own(slot).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(source) = running.upgrade() {
        return Ok(source
            .downcast()
            .unwrap_or_else(|_| unreachable!("each slot has one source")));
    }
    let source = Arc::new(make(mark)?);
    *running = Arc::downgrade(&(source.clone() as Arc<dyn Any + Send + Sync>));
    Ok(source)
}

/// A lock that is free in the child of a fork, also if it was held in the parent. It lies in
/// [`Marks`].
#[derive(Debug)]
pub(crate) struct Lock(AtomicBool);

impl Lock {
    /// Runs `f` while no other thread of this address space holds the lock.
    pub(crate) fn with<R>(&'static self, f: impl FnOnce() -> R) -> R {
        // ORDER(fork-lock): Acquire, for what the last holder left. Partner: the Release in `drop`.
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

/// Turns what `marks().space` holds into a reference.
pub(crate) fn space(
    pointer: *mut mmu_notifier::MmWithUser,
) -> Option<&'static mmu_notifier::MmWithUser> {
    // SAFETY: the word is null or comes from `keep` in `current_mm`, published with Release, and is
    // never freed.
    unsafe { pointer.as_ref() }
}
