//! The allocator that refuses to be called where a callback must not call it.
//!
//! # Safety
//! Every call is forwarded to the inner allocator with the caller's arguments. So the inner
//! allocator gets every promise that the caller made, and the caller gets every promise of the
//! inner allocator. The check in front reads and writes only constants and thread-local words.

#![allow(unsafe_code, reason = "an allocator")]

use super::imp::might_allocate;
use std::alloc::{GlobalAlloc, Layout, System};

/// An allocator that ends the process when a callback allocates or frees memory, and says which
/// callback it was.
///
/// A callback may run in the middle of `free`, while the allocator's locks are held. If it
/// allocates or frees then, it waits for those locks for ever. `free` calls the kernel only
/// sometimes, so tests rarely see the deadlock. Under this allocator, the first such call in a
/// callback ends the process. An allocation or a free also ends the process if the thread holds the
/// state of an [`IntervalNotifier`](crate::IntervalNotifier), or a lock with a
/// [`Map`](super::Map) that some callback has taken. The state of an
/// [`InvalidateSeq`](crate::InvalidateSeq) is such a lock.
///
/// The allocator checks the brackets of every source, but only start and end callbacks and second
/// passes: [`release`](crate::Notifier::release) and `Drop` run outside of the allocator. A program
/// whose callbacks come from the `process` source alone may allocate in them, and does not need
/// this allocator. `CheckedAlloc` sees calls of Rust's allocator, but no `malloc` from C.
///
/// Builds without `debug_assertions` check nothing and only forward calls.
///
/// # Examples
/// ```
/// use mmu_notifier::lockdep::CheckedAlloc;
///
/// #[global_allocator]
/// static ALLOC: CheckedAlloc = CheckedAlloc::new();
/// ```
///
/// # Source
/// The kernel's lockdep does this with `fs_reclaim_acquire`, mm/page_alloc.c, Linux 5.10: a
/// notifier must not allocate in a way that waits for reclaim, since reclaim calls notifiers.
#[derive(Debug, Clone, Copy, Default)]
pub struct CheckedAlloc<A = System>(A);

impl CheckedAlloc {
    /// Checks the calls to the system's allocator.
    #[must_use]
    pub const fn new() -> Self {
        Self(System)
    }
}

impl<A: GlobalAlloc> CheckedAlloc<A> {
    /// Checks the calls to `allocator`.
    #[must_use]
    pub const fn over(allocator: A) -> Self {
        Self(allocator)
    }
}

// SAFETY: `GlobalAlloc` demands that blocks fit their layout, stay until they are freed, and that
// no call unwinds. The inner allocator guarantees that, and a failed check ends the process instead
// of unwinding.
unsafe impl<A: GlobalAlloc> GlobalAlloc for CheckedAlloc<A> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        might_allocate("allocates");
        // SAFETY: see the module's Safety section.
        unsafe { self.0.alloc(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        might_allocate("frees");
        // SAFETY: see the module's Safety section.
        unsafe { self.0.dealloc(pointer, layout) }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        might_allocate("allocates");
        // SAFETY: see the module's Safety section.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    #[inline]
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        might_allocate("resizes");
        // SAFETY: see the module's Safety section.
        unsafe { self.0.realloc(pointer, layout, size) }
    }
}
