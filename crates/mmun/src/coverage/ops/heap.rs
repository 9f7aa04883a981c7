//! The heap: its end moves, or the allocator gives memory back.
//!
//! # Safety
//! Blocks of `malloc` are touched through their pointer alone, within their length, and freed once.
//! The end of the heap is only moved back over what was gained by moving it forward, and no code
//! has got memory beyond it meanwhile.
#![expect(
    unsafe_code,
    reason = "the allocator of C and brk; see the Safety section"
)]

use std::ffi::c_void;
use std::io;

use super::LIBC_AND_UFFD;
use crate::coverage::operation::{Operation, Prepared, Unavailable};
use crate::coverage::page::Judge;
use crate::coverage::region::{Region, page_size};

/// More than `malloc` ever takes from the heap instead of mapping it.
const LARGE: usize = 40 << 20;
/// Less than it maps by itself.
const SMALL: usize = 64 << 10;
/// What [`end_moves`] gains, in bytes.
fn gain() -> usize {
    64 * page_size()
}

pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "brk (shrink)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            end_moves(|end| {
                // SAFETY: the new end is where it was before `end_moves` moved it.
                unsafe { libc::brk(end as *mut c_void) == 0 }
            })
        },
    },
    Operation {
        name: "sbrk (shrink)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            end_moves(|_| {
                // SAFETY: gives back what `end_moves` has taken, and no more.
                unsafe { libc::sbrk(-(gain() as isize)) != libc::MAP_FAILED }
            })
        },
    },
    Operation {
        name: "malloc_trim (top)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || trimmed(false),
    },
    Operation {
        name: "malloc_trim (hole)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || trimmed(true),
    },
    Operation {
        name: "free (large block)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            let block = Block::new(LARGE)?;
            Ok(Prepared::at(block.middle(), move || {
                block.free();
                Ok(())
            }))
        },
    },
    Operation {
        name: "realloc (by mremap)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            let block = Block::new(LARGE)?;
            // In the way of growing in place.
            Region::untouched(1)?;
            Ok(Prepared::at(block.middle(), move || block.grow(2 * LARGE)))
        },
    },
];

/// Moves the end of the heap forward, touches the new part, and has `back` move it back.
fn end_moves(back: fn(usize) -> bool) -> Result<Prepared, Unavailable> {
    settle_the_allocator();
    let (end, gained) = (end_of_heap(), gain() as isize);
    // SAFETY: more memory at the end takes none away.
    if unsafe { libc::sbrk(gained) } == libc::MAP_FAILED {
        return Err("the heap cannot grow".into());
    }
    for address in (end.next_multiple_of(page_size())..end + gain()).step_by(page_size()) {
        // SAFETY: below the new end, above the old one: mapped, and in no block of the allocator.
        unsafe { (address as *mut u8).write_volatile(1) };
    }
    Ok(Prepared::at(end + gain() / 2, move || {
        if end_of_heap() != end + gain() {
            return Err(io::Error::other(
                "the allocator moved the end of the heap meanwhile",
            ));
        }
        if back(end) {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }))
}

fn end_of_heap() -> usize {
    // SAFETY: moving the end by nothing only tells where it is.
    unsafe { libc::sbrk(0) as usize }
}

/// Leaves the allocator free memory below the end, so that it has no reason to move it.
fn settle_the_allocator() {
    // SAFETY: takes integers.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX) };
    let blocks: Vec<Block> = (0..16).filter_map(|_| Block::new(SMALL).ok()).collect();
    blocks.into_iter().for_each(Block::free);
}

/// Fills the heap, frees it so that nothing is given back yet, and has `malloc_trim` do that: from
/// the end, or from below a block that stays.
fn trimmed(below: bool) -> Result<Prepared, Unavailable> {
    settle_the_allocator();
    let mut blocks = (0..64)
        .map(|_| Block::new(SMALL))
        .collect::<io::Result<Vec<Block>>>()?;
    let stays = below.then(|| blocks.split_off(48));
    let watched = blocks[blocks.len() - 8].middle();
    if watched >= end_of_heap() {
        return Err("this allocator does not use the heap".into());
    }
    blocks.into_iter().for_each(Block::free);
    Ok(Prepared::at(watched, move || {
        // SAFETY: gives back only what is free.
        let trimmed = unsafe { libc::malloc_trim(0) };
        drop(stays);
        if trimmed == 1 {
            Ok(())
        } else {
            Err(io::Error::other("malloc_trim found nothing to give back"))
        }
    }))
}

/// A block of `malloc`. Dropping it leaks: the process ends soon.
#[derive(Debug)]
struct Block {
    start: *mut c_void,
    len: usize,
}

impl Block {
    fn new(len: usize) -> io::Result<Block> {
        // SAFETY: takes an integer.
        let start = unsafe { libc::malloc(len) };
        if start.is_null() {
            return Err(io::Error::last_os_error());
        }
        let block = Block { start, len };
        // In a large block, the start and the middle page are enough.
        for offset in (0..len.min(1 << 20)).step_by(page_size()).chain([len / 2]) {
            let byte = start.cast::<u8>().wrapping_add(offset);
            // SAFETY: within the block, of which no reference exists.
            unsafe { byte.write_volatile(1) };
        }
        Ok(block)
    }

    /// An address on a page that is touched.
    fn middle(&self) -> usize {
        self.start.addr() + self.len / 2
    }

    fn free(self) {
        // SAFETY: it came from `malloc` or `realloc`, and goes with `self`.
        unsafe { libc::free(self.start) };
    }

    /// Moves it to a longer place; that one is leaked.
    fn grow(self, len: usize) -> io::Result<()> {
        // SAFETY: it came from `malloc`, and goes with `self`.
        let moved = unsafe { libc::realloc(self.start, len) };
        if moved.is_null() {
            return Err(io::Error::last_os_error());
        }
        if moved == self.start {
            return Err(io::Error::other("the block grew where it was"));
        }
        Ok(())
    }
}
