//! Memory without the allocator: zeroed runs of pages, in powers of two. Runs are recycled and
//! never unmapped.
//!
//! A read section may begin inside `malloc`, so these functions must not call `malloc`. They unmap
//! nothing either, because each unmap is an event, and a program may observe such events with
//! notifiers that are built on this crate.
//!
//! # Safety
//! # Invariants
//! A run on a free list belongs to that list alone, and its first word is the link. Each list
//! changes by one store, so the child of a fork finds it consistent whatever another thread was
//! doing.

use super::die;
use super::lock::Lock;
use super::place::BUCKETS;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

pub(super) const PAGE: usize = 4096;
/// Single pages are cut from pieces of this size, which are aligned to their size.
const PIECE: usize = 64 * PAGE;

static LOCK: Lock<()> = Lock::new(());
/// One list for each class. A run of class `c` has `2^c` pages.
static FREE: [AtomicPtr<Run>; BUCKETS] = [const { AtomicPtr::new(ptr::null_mut()) }; BUCKETS];
/// The address of the next unused page of the current piece. If it is a multiple of `PIECE`, no
/// page is left.
static NEXT: AtomicUsize = AtomicUsize::new(0);

struct Run {
    next: *mut Run,
}

/// Returns zeroed, page-aligned memory of `2^class` pages.
pub(super) fn alloc(class: usize) -> NonNull<u8> {
    let held = LOCK.lock();
    // No ORDER: the lock orders everything here.
    if let Some(run) = NonNull::new(FREE[class].load(Ordering::Relaxed)) {
        // SAFETY: the read needs a live `Run`. By the module's invariant, a run on a free list
        // begins with one.
        let next = unsafe { (*run.as_ptr()).next };
        FREE[class].store(next, Ordering::Relaxed);
        drop(held);
        let run: NonNull<u8> = run.cast();
        // SAFETY: the write needs memory that this crate owns. The memory is a run of this class
        // that was just taken off its list.
        unsafe { run.write_bytes(0, PAGE << class) };
        return run;
    }
    if class != 0 {
        drop(held);
        return map(PAGE << class);
    }
    cut()
}

/// Frees memory from `alloc(class)`.
pub(super) fn free(class: usize, run: NonNull<u8>) {
    let run: NonNull<Run> = run.cast();
    let _held = LOCK.lock();
    let next = FREE[class].load(Ordering::Relaxed);
    // SAFETY: the write needs memory that this crate owns. The caller gives the run up, and a run
    // has room for a word.
    unsafe { run.write(Run { next }) };
    // ORDER(srcu-fork): Release, for the link, because a forked child may find this store. Among
    // threads the lock orders it.
    FREE[class].store(run.as_ptr(), Ordering::Release);
}

/// Returns one new page. The caller holds `LOCK`.
fn cut() -> NonNull<u8> {
    let mut next = NEXT.load(Ordering::Relaxed);
    if next % PIECE == 0 {
        // Twice the size contains an aligned piece. The rest is never touched, so it costs no
        // memory.
        next = map(2 * PIECE)
            .as_ptr()
            .expose_provenance()
            .next_multiple_of(PIECE);
    }
    NEXT.store(next + PAGE, Ordering::Relaxed);
    NonNull::new(ptr::with_exposed_provenance_mut(next)).expect("mapped memory is not at zero")
}

/// Maps new zeroed memory.
pub(super) fn map(bytes: usize) -> NonNull<u8> {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: the kernel chooses the address of the new mapping, so no existing memory changes.
    let at = unsafe {
        libc::mmap(
            ptr::null_mut(),
            bytes,
            protection,
            flags | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    match NonNull::new(at.cast()) {
        Some(at) if at.as_ptr() != libc::MAP_FAILED.cast() => at,
        _ => die("out of memory for the counters of a thread"),
    }
}

pub(super) fn after_fork() {
    LOCK.after_fork();
}
