//! Instruction caches, which are not coherent with stores on this processor.

#![allow(unsafe_code, reason = "assembly")]

use std::arch::asm;

/// Makes all processors fetch the new content of a range of code. A thread may have fetched old
/// instructions already, so other threads also need a `membarrier`.
///
/// The kernel does the same when it makes a page executable for the first time. Otherwise the
/// architecture requires these steps of the program that writes the code.
///
/// # Safety
/// The range is mapped and readable.
pub(in crate::hook::glibc) unsafe fn synchronize_code(start: u64, length: u64) {
    let sizes: u64;
    // SAFETY: only reads a register. Linux lets programs read it, or emulates the read.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) sizes, options(nomem, nostack, preserves_flags)) };
    const WORD: usize = 4;
    let line = |shift: u32| WORD << (sizes >> shift & 0xf);
    let lines = |shift| (start..start + length).step_by(line(shift));
    const DATA: u32 = 16;
    const INSTRUCTIONS: u32 = 0;
    for at in lines(DATA) {
        // SAFETY: cleans a cache line of memory that the caller promises is readable.
        unsafe { asm!("dc cvau, {}", in(reg) at, options(nostack, preserves_flags)) };
    }
    // SAFETY: only waits until the cleaned lines are visible to instruction fetches.
    unsafe { asm!("dsb ish", options(nostack, preserves_flags)) };
    for at in lines(INSTRUCTIONS) {
        // SAFETY: only invalidates a line of the instruction caches, which will be fetched again.
        unsafe { asm!("ic ivau, {}", in(reg) at, options(nostack, preserves_flags)) };
    }
    // SAFETY: only waits until all processors have invalidated these lines, and discards the
    // instructions that this processor has prefetched.
    unsafe { asm!("dsb ish", "isb", options(nostack, preserves_flags)) };
}
