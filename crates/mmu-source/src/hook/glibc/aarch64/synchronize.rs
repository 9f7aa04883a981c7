//! Instruction caches: on this processor they do not see stores.

#![allow(unsafe_code, reason = "assembly")]

use std::arch::asm;

/// Makes the processors fetch what was written to a range of code. Other threads need a
/// `membarrier` besides, because what they have fetched already is theirs to drop.
///
/// The kernel does the same when it makes a page executable that was not. The architecture asks it
/// of the program that has written the code.
///
/// # Safety
/// The range is mapped and can be read.
pub(in crate::hook::glibc) unsafe fn synchronize_code(start: u64, length: u64) {
    let sizes: u64;
    // SAFETY: reads a register that Linux shows to programs, or reads for them.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) sizes, options(nomem, nostack, preserves_flags)) };
    const WORD: usize = 4;
    let line = |shift: u32| WORD << (sizes >> shift & 0xf);
    let lines = |shift| (start..start + length).step_by(line(shift));
    const DATA: u32 = 16;
    const INSTRUCTIONS: u32 = 0;
    for at in lines(DATA) {
        // SAFETY: cleans a line of memory that can be read: the caller's duty.
        unsafe { asm!("dc cvau, {}", in(reg) at, options(nostack, preserves_flags)) };
    }
    // SAFETY: waits until the above has reached what instructions are fetched from.
    unsafe { asm!("dsb ish", options(nostack, preserves_flags)) };
    for at in lines(INSTRUCTIONS) {
        // SAFETY: drops a line from the instruction caches, which will fetch it again.
        unsafe { asm!("ic ivau, {}", in(reg) at, options(nostack, preserves_flags)) };
    }
    // SAFETY: waits for all processors to have done so, and drops what this one has fetched ahead.
    unsafe { asm!("dsb ish", "isb", options(nostack, preserves_flags)) };
}
