//! Changes code that other threads are running.
//!
//! Code is never written where it runs:
//! 1. Copy the pages, and change the copy while it is writable and not executable.
//! 2. Make the copy executable and read-only.
//! 3. Move the copy over the old pages with one `mremap`.
//!
//! If a thread executes one of the pages during the move, it faults and waits in the kernel until
//! the new page is there. So it runs either the old instruction or the new one. Only whole
//! instructions are replaced, so no thread is in the middle of an instruction.
//!
//! The usual method is a breakpoint: write `int3` first, then the tail, then the first byte. This
//! method does not work here, because a thread that blocks SIGTRAP dies at a breakpoint, and
//! glibc's own threads release their stacks by `madvise` with every signal blocked.

#![allow(unsafe_code, reason = "replaces code")]

use super::machine::{self, BREAKPOINT, PATCH};
use super::module::Hidden;
use super::raw;
use crate::page;
use std::ptr;

/// One instruction to replace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Edit {
    pub(super) address: u64,
    /// If other bytes are there, they are another program's patch and are left alone.
    pub(super) from: [u8; PATCH],
    pub(super) to: [u8; PATCH],
    /// The protection of the page.
    pub(super) protection: i32,
}

/// Applies `edits`, which are in order of address, and restores the `hidden` code in the pages that
/// it replaces. If a page cannot be replaced, continues with the others, and returns the first
/// error. Allocates nothing.
///
/// # Safety
/// For every thread that executes the code, each `to` does what its `from` does. The pages are code
/// of a module that stays loaded.
pub(super) unsafe fn apply(
    mut edits: impl Iterator<Item = Edit> + Clone,
    hidden: &[Hidden],
) -> Result<(), (&'static str, i32)> {
    let mut result = Ok(());
    while let Some(first) = edits.clone().next() {
        let start = page::down(first.address);
        let mut end = start;
        let mut run = edits.clone();
        let mut count = 0;
        while let Some(edit) = run
            .next()
            .filter(|edit| count == 0 || page::down(edit.address) < end)
        {
            end = page::down(edit.address + PATCH as u64 - 1) + page::size();
            count += 1;
        }
        // SAFETY: `swap` has the same rules as this function, and these edits are inside the pages.
        let swapped = unsafe { swap(start, end - start, edits.clone().take(count), hidden) };
        result = result.and(swapped);
        edits.nth(count - 1);
    }
    // Every processor must discard the instructions that it has prefetched. The move has already
    // interrupted the processors; the architecture still requires this barrier.
    let _ = raw::membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE);
    result
}

/// Replaces pages by changed copies.
///
/// # Safety
/// The caller must follow the rules of [`apply`], and the edits must be inside the pages.
unsafe fn swap(
    start: u64,
    length: u64,
    edits: impl Iterator<Item = Edit>,
    hidden: &[Hidden],
) -> Result<(), (&'static str, i32)> {
    let copy = raw::mmap(0, length, libc::PROT_READ | libc::PROT_WRITE, 0)
        .map_err(|error| ("mmap", error))?;
    let page = ptr::with_exposed_provenance_mut::<u8>(copy as usize);
    // SAFETY: copies readable code of a loaded module to memory of the same size, which was mapped
    // above.
    unsafe {
        ptr::copy_nonoverlapping(
            ptr::with_exposed_provenance::<u8>(start as usize),
            page,
            length as usize,
        )
    };
    for hidden in hidden
        .iter()
        .filter(|hidden| (start..start + length).contains(&hidden.address))
    {
        // SAFETY: the offset must be inside the copy. The line above has checked the range.
        let code = unsafe { page.add((hidden.address - start) as usize) };
        // SAFETY: an instruction does not cross a page. The bytes were initialised above, no other
        // code refers to the copy, and bytes need no alignment.
        let code = unsafe { &mut *code.cast::<[u8; BREAKPOINT.len()]>() };
        if *code == BREAKPOINT {
            *code = hidden.code;
        }
    }
    let mut is_changed = false;
    // All these pages get the same protection. So they get the landing-pad check only if each of
    // them has it now: other code in a page without the check may lack landing pads.
    let mut protection = !0;
    for edit in edits {
        protection &= edit.protection;
        // SAFETY: the offset must be inside the copy. The edit is inside the pages.
        let bytes = unsafe { page.add((edit.address - start) as usize) }.cast::<[u8; PATCH]>();
        // SAFETY: the bytes were initialised above, no other code refers to the copy, and bytes
        // need no alignment.
        let bytes = unsafe { &mut *bytes };
        if *bytes == edit.from {
            *bytes = edit.to;
            is_changed = true;
        }
    }
    let mut result = Ok(());
    if is_changed {
        // SAFETY: only this function uses the copy, and it does not write to it any more.
        result =
            unsafe { raw::mprotect(copy, length, protection) }.map_err(|error| ("mprotect", error));
        if result.is_ok() {
            // A thread that executes the new page must fetch the new code.
            // SAFETY: the copy is mapped and readable.
            unsafe { machine::synchronize_code(copy, length) };
            // SAFETY: no other code uses the copy. The caller promises that every thread that runs
            // the code works with the new content.
            result =
                unsafe { raw::move_over(copy, length, start) }.map_err(|error| ("mremap", error));
        }
        if result.is_ok() {
            // Synchronize again at the address where the code runs, because some caches are indexed
            // by virtual address.
            // SAFETY: the range is code of a module that stays loaded.
            unsafe { machine::synchronize_code(start, length) };
        }
    }
    if !is_changed || result.is_err() {
        // SAFETY: the copy was not moved, and no code uses it.
        let _ = unsafe { raw::munmap(copy, length) };
    }
    result
}

/// Reads code while another thread may be replacing its page.
///
/// # Safety
/// The bytes at the address are code of a module that stays loaded.
pub(super) unsafe fn read<const N: usize>(address: u64) -> [u8; N] {
    // SAFETY: the code is readable. The read is volatile, because the code may change at any time.
    unsafe { ptr::read_volatile(ptr::with_exposed_provenance(address as usize)) }
}
