//! An allocator that counts its calls, for tests of code that must not allocate.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local!(static CALLS: Cell<usize> = const { Cell::new(0) });

/// The system's allocator, with the calls of each thread counted.
#[derive(Debug)]
pub struct Counting;

impl Counting {
    /// Returns how often `f` called the allocator in this thread, to allocate or to free. Zero if
    /// another allocator is installed.
    pub fn calls(f: impl FnOnce()) -> usize {
        let before = CALLS.get();
        f();
        CALLS.get() - before
    }
}

// SAFETY: Passes each call to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: The caller's duties are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: The caller's duties are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}
