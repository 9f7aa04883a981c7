//! A place of their own for the small mappings of this crate.
//!
//! The kernel puts a new mapping into the highest hole that is large enough, directly below the
//! mapping that ends the hole. If both have the same kind, the kernel extends the old mapping. That
//! is cheaper than another mapping, which also needs structures of its own at the first page
//! fault: 0.3 to 0.4 us for each map, touch and unmap of a page.
//!
//! A page of this crate has another kind: shared, inaccessible, or wiped at a fork. In a small hole
//! between libraries it would become the neighbour of the program's next mapping. So one large
//! mapping is reserved, and small mappings replace parts of it.

#![allow(
    unsafe_code,
    reason = "reserves addresses, and hands out each part once"
)]

use crate::page;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// The number of pages that are reserved. Each start of the kernel source takes four.
const PAGES: usize = 64;

/// The reserved addresses, or null. They stay reserved until the process ends.
static BLOCK: AtomicPtr<libc::c_void> = AtomicPtr::new(ptr::null_mut());
/// The offset of the first byte that is not handed out.
static NEXT: AtomicUsize = AtomicUsize::new(0);

/// Returns the address and the flags with which to map `bytes` bytes: a part of the reserved
/// addresses and `MAP_FIXED`, or null and 0 if no part is left.
///
/// # Safety
/// No part is returned twice, so the caller may replace it and is its only owner.
pub(crate) fn part(bytes: usize) -> (*mut libc::c_void, libc::c_int) {
    let none = (ptr::null_mut(), 0);
    let block = block();
    let bytes = bytes.next_multiple_of(page::size() as usize);
    // Relaxed: each call gets bytes of its own, and no data is published. The limit keeps the sum
    // from an overflow.
    if block.is_null() || bytes > size() || NEXT.load(Ordering::Relaxed) > size() {
        return none;
    }
    let at = NEXT.fetch_add(bytes, Ordering::Relaxed);
    if at + bytes > size() {
        return none;
    }
    (block.wrapping_byte_add(at), libc::MAP_FIXED)
}

fn size() -> usize {
    PAGES * page::size() as usize
}

fn block() -> *mut libc::c_void {
    // Relaxed: the reserved addresses have no content.
    let block = BLOCK.load(Ordering::Relaxed);
    if !block.is_null() {
        return block;
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the kernel chooses the address of the new mapping, so no existing memory changes.
    let made = unsafe { libc::mmap(ptr::null_mut(), size(), libc::PROT_NONE, flags, -1, 0) };
    if made == libc::MAP_FAILED {
        return ptr::null_mut();
    }
    match BLOCK.compare_exchange(ptr::null_mut(), made, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => made,
        Err(first) => {
            // SAFETY: this mapping was made above and was not published.
            unsafe { libc::munmap(made, size()) };
            first
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_apart_and_end_with_the_block() {
        let page = page::size() as usize;
        assert_eq!(
            part(size() + 1),
            (ptr::null_mut(), 0),
            "larger than the block"
        );
        let mut parts: Vec<usize> = std::iter::repeat_with(|| part(page + 1))
            .take_while(|(at, _)| !at.is_null())
            .map(|(at, flags)| {
                assert_eq!(flags, libc::MAP_FIXED);
                at.addr()
            })
            .collect();
        assert!(parts.len() <= PAGES / 2);
        parts.sort_unstable();
        assert!(parts.windows(2).all(|two| two[1] - two[0] >= 2 * page));
        let block = block().addr();
        assert!(
            parts
                .iter()
                .all(|at| (block..=block + size() - 2 * page).contains(at))
        );
        assert_eq!(part(2 * page), (ptr::null_mut(), 0), "none is left");
    }
}
