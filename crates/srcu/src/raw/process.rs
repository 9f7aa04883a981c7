//! Tells a process from its ancestors, whether or not a fork ran its handlers.
//!
//! # Safety
//! This module maps one page, which is never unmapped, and accesses it only as the atomics of
//! [`Words`].

use super::thread::Blocked;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// The words that tell a process from its ancestors.
struct Words {
    /// One, plus the number of forks between this process and the ancestor that loaded this crate.
    /// Zero in a new child.
    forks: AtomicUsize,
    /// Held by the thread of the child that sets `forks`.
    lock: AtomicBool,
}

/// The words lie in a page that the kernel zeroes in a child ([`map`]), because `_Fork` and a raw
/// `clone` run no fork handlers. Until the page is mapped, and where it cannot be mapped, this
/// points to `UNWIPED`.
static WORDS: AtomicPtr<Words> = AtomicPtr::new((&raw const UNWIPED).cast_mut());
static UNWIPED: Words = Words {
    forks: AtomicUsize::new(1),
    lock: AtomicBool::new(false),
};

/// The last number that this process or an ancestor took. `words` may be zero.
static FORKS: AtomicUsize = AtomicUsize::new(1);

/// The function that repairs the domains in a child. Null until [`mark_children`].
static REPAIR: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());

#[inline]
fn words() -> &'static Words {
    // ORDER(srcu-fork): Acquire: the page was mapped and filled before. Partner: the store in
    // `map`.
    let words = WORDS.load(Ordering::Acquire);
    // SAFETY: a dereference needs live, initialised `Words`. `WORDS` points to a static or to the
    // page of `map`, which is never unmapped, and zeroes are valid `Words`.
    unsafe { &*words }
}

/// Returns a number that differs from that of each ancestor of this process since this crate was
/// loaded. The child of a `vfork`, which shares its parent's memory, has its parent's number.
///
/// In the child of a `_Fork` or of a raw `clone`, the first call repairs the domains, as the fork
/// handler does in the child of a `fork`.
#[inline]
pub fn forks() -> usize {
    // ORDER: Relaxed: the number is compared only with others. A thread that needs the repair
    // itself calls `check`.
    match words().forks.load(Ordering::Relaxed) {
        0 => enter(),
        forks => forks,
    }
}

/// Repairs the domains if this is a child in which no fork handler has run.
#[inline]
pub(super) fn check() {
    // ORDER(srcu-fork): Acquire: the repair comes before this thread's use of the domains. Partner:
    // the store in `enter`.
    if words().forks.load(Ordering::Acquire) == 0 {
        enter();
    }
}

/// Makes this child a process of its own, and returns its number.
#[cold]
fn enter() -> usize {
    // A signal handler on this thread would wait for the lock for ever.
    let _signals_wait = Blocked::new();
    let words = words();
    // ORDER(srcu-fork): Acquire; partner: the Release below.
    while words.lock.swap(true, Ordering::Acquire) {
        std::thread::yield_now();
    }
    if words.forks.load(Ordering::Relaxed) == 0 {
        let repair = REPAIR.load(Ordering::Relaxed);
        // If it is null, no domain was used before the fork.
        if !repair.is_null() {
            // SAFETY: the pointer must be a `fn()`. Only `mark_children` stores one.
            let repair = unsafe { std::mem::transmute::<*mut (), fn()>(repair) };
            repair();
        }
        let forks = FORKS.fetch_add(1, Ordering::Relaxed) + 1;
        // ORDER(srcu-fork): Release: the repair comes before the number. Partner: `check`.
        words.forks.store(forks, Ordering::Release);
    }
    let forks = words.forks.load(Ordering::Relaxed);
    // ORDER(srcu-fork): Release; partner above.
    words.lock.store(false, Ordering::Release);
    forks
}

/// Makes the kernel mark each child of this process, if it can. From now on, the first thread that
/// notices that it is in a child calls `repair`.
pub(super) fn mark_children(repair: fn()) {
    // Relaxed: a function pointer publishes no data.
    REPAIR.store(repair as *mut (), Ordering::Relaxed);
    #[cfg(not(miri))]
    map();
}

/// For the fork handler: tells whether the kernel marks children.
pub(super) fn marks_children() -> bool {
    !ptr::eq(words(), &UNWIPED)
}

/// For the fork handler of a child that the kernel has not marked.
pub(super) fn mark_this_child() {
    words().lock.store(false, Ordering::Relaxed);
    words().forks.store(0, Ordering::Relaxed);
}

/// Maps the page that the kernel zeroes in a child. Without it (before Linux 4.14, in some
/// emulations of Linux, or without memory), only `fork` and its handler are noticed.
#[cfg(not(miri))]
fn map() {
    const PAGE: usize = 4096;
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: the kernel chooses the address of the new mapping, so no existing memory changes.
    let page = unsafe { libc::mmap(ptr::null_mut(), PAGE, protection, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return;
    }
    let made: *mut Words = page.cast();
    // SAFETY: the advice changes only how a fork copies the page mapped above.
    let is_wiped = unsafe { libc::madvise(page, PAGE, libc::MADV_WIPEONFORK) } == 0;
    let unwiped = (&raw const UNWIPED).cast_mut();
    if is_wiped {
        // SAFETY: a dereference needs live, initialised `Words`. The page was mapped above, and
        // zeroes are valid `Words`.
        let forks = unsafe { &(*made).forks };
        forks.store(UNWIPED.forks.load(Ordering::Relaxed), Ordering::Relaxed);
        // ORDER(srcu-fork): Release publishes the page. Partner: `words`.
        let placed = WORDS.compare_exchange(unwiped, made, Ordering::Release, Ordering::Relaxed);
        if placed.is_ok() {
            return;
        }
    }
    // SAFETY: `WORDS` never held this page, so no other code has a pointer into it.
    unsafe { libc::munmap(page, PAGE) };
}
