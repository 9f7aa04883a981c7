//! An allocator that counts its calls, for tests of code that must not allocate.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local!(static CALLS: Cell<usize> = const { Cell::new(0) });

/// The system's allocator, which also counts the calls of each thread.
#[derive(Debug)]
pub struct Counting;

impl Counting {
    /// Returns how often `f` called the allocator in this thread, to allocate or to free. Returns
    /// zero if the program does not install `Counting` as its global allocator.
    pub fn calls(f: impl FnOnce()) -> usize {
        let before = CALLS.get();
        f();
        CALLS.get() - before
    }
}

// SAFETY: Each function calls the same function of the system's allocator, which keeps the contract
// of the trait.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: The layout has a size other than zero, because the caller promises so.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: The caller promises that `pointer` came from `alloc` with this layout, and so
        // from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}
