//! Changes code that other threads are running.
//!
//! Code is never written where it runs. The pages are copied, the copy is changed while it is
//! writable and not yet executable, then made executable and no longer writable, and moved over the
//! old pages with one `mremap`. A thread that executes them meanwhile faults and waits in the
//! kernel until the new pages are there, so it runs the old instruction or the new one. Since what
//! is replaced is one whole instruction, no thread stands inside it either.
//!
//! Breakpoints (`int3` first, then the tail, then the first byte), the usual way, were not taken: a
//! thread that blocks SIGTRAP dies of one, and glibc's own threads give up their stacks by
//! `madvise` with every signal blocked.

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
    /// Any other bytes are another program's patch, and stay.
    pub(super) from: [u8; PATCH],
    pub(super) to: [u8; PATCH],
    /// What the pages around it may be used for.
    pub(super) protection: i32,
}

/// Makes `edits`, which are in order of address, and puts right what is `hidden` in the same pages.
/// Allocates nothing.
///
/// # Safety
/// Each `to` does what `from` does, for every thread that executes it. The pages are code of a
/// module that stays loaded.
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
        // SAFETY: the caller's duty; the run's edits lie within its pages.
        let swapped = unsafe { swap(start, end - start, edits.clone().take(count), hidden) };
        result = result.and(swapped);
        edits.nth(count - 1);
    }
    // Every processor must drop what it has fetched ahead. The move has interrupted them already;
    // this is by the book.
    let _ = raw::membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE);
    result
}

/// Replaces pages by changed copies.
///
/// # Safety
/// As for [`apply`]; the edits lie within the pages.
unsafe fn swap(
    start: u64,
    length: u64,
    edits: impl Iterator<Item = Edit>,
    hidden: &[Hidden],
) -> Result<(), (&'static str, i32)> {
    let copy = raw::mmap(0, length, libc::PROT_READ | libc::PROT_WRITE, 0)
        .map_err(|error| ("mmap", error))?;
    let page = ptr::with_exposed_provenance_mut::<u8>(copy as usize);
    // SAFETY: copies readable code of a loaded module to memory of the same size that was mapped
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
        // SAFETY: the offset must stay within the copy: the range was checked in the line above.
        let code = unsafe { page.add((hidden.address - start) as usize) };
        // SAFETY: an instruction lies within its page. The bytes were written above, no other
        // code has the copy, and bytes have no alignment.
        let code = unsafe { &mut *code.cast::<[u8; BREAKPOINT.len()]>() };
        if *code == BREAKPOINT {
            *code = hidden.code;
        }
    }
    let mut is_changed = false;
    let mut protection = libc::PROT_READ | libc::PROT_EXEC;
    for edit in edits {
        // SAFETY: the offset must stay within the copy: the edit lies within the pages.
        let bytes = unsafe { page.add((edit.address - start) as usize) }.cast::<[u8; PATCH]>();
        // SAFETY: the bytes were written above, no other code has the copy, and bytes have no
        // alignment.
        let bytes = unsafe { &mut *bytes };
        if *bytes == edit.from {
            *bytes = edit.to;
            protection = edit.protection;
            is_changed = true;
        }
    }
    let mut result = Ok(());
    if is_changed {
        // SAFETY: only this function uses the copy.
        result =
            unsafe { raw::mprotect(copy, length, protection) }.map_err(|error| ("mprotect", error));
        if result.is_ok() {
            // A thread that executes the new page must find the new code.
            // SAFETY: the copy is mapped and can be read.
            unsafe { machine::synchronize_code(copy, length) };
            // SAFETY: no other code uses the copy, and every thread that runs the code works with
            // it: the caller's duty.
            result =
                unsafe { raw::move_over(copy, length, start) }.map_err(|error| ("mremap", error));
        }
        if result.is_ok() {
            // Once more by the address that it runs at, where a cache goes by that.
            // SAFETY: code of a module that stays loaded.
            unsafe { machine::synchronize_code(start, length) };
        }
    }
    if !is_changed || result.is_err() {
        // SAFETY: no code uses the copy, and it was not moved.
        let _ = unsafe { raw::munmap(copy, length) };
    }
    result
}

/// Reads code. Another thread may be replacing its page at the same time, by the same bytes or
/// others.
///
/// # Safety
/// The address is in the code of a module that stays loaded, and so are the bytes behind it.
pub(super) unsafe fn read<const N: usize>(address: u64) -> [u8; N] {
    // SAFETY: it is readable; volatile because it changes behind the compiler's back.
    unsafe { ptr::read_volatile(ptr::with_exposed_provenance(address as usize)) }
}
