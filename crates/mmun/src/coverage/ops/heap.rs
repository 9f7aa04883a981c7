//! The heap: the program break moves, or the allocator returns memory.
//!
//! # Safety
//! Blocks of `malloc` are accessed only through their pointer, within their length, and freed once.
//! The program break is moved back only over memory that this module has added, and no code has got
//! memory there meanwhile.
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

/// A size that `malloc` always maps instead of taking it from the heap.
const LARGE: usize = 40 << 20;
/// A size that `malloc` takes from the heap.
const SMALL: usize = 64 << 10;
/// How many bytes [`end_moves`] adds to the heap.
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
                // SAFETY: `end` is the program break from before `end_moves` moved it.
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
                // SAFETY: this gives back exactly the memory that `end_moves` has added.
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
            // Map a page after the block, so that the block cannot grow in place.
            Region::untouched(1)?;
            Ok(Prepared::at(block.middle(), move || block.grow(2 * LARGE)))
        },
    },
];

/// Moves the program break forward, touches the new part, and prepares `back` to move the break
/// back.
fn end_moves(back: fn(usize) -> bool) -> Result<Prepared, Unavailable> {
    settle_the_allocator();
    let (end, gained) = (end_of_heap(), gain() as isize);
    // SAFETY: growing the heap removes no memory.
    if unsafe { libc::sbrk(gained) } == libc::MAP_FAILED {
        return Err("the heap cannot grow".into());
    }
    for address in (end.next_multiple_of(page_size())..end + gain()).step_by(page_size()) {
        // SAFETY: the address is below the new program break and above the old one. So it is
        // mapped, and in no block of the allocator.
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
    // SAFETY: `sbrk(0)` only returns the program break.
    unsafe { libc::sbrk(0) as usize }
}

/// Leaves the allocator free memory below the program break, so that it does not move the break.
fn settle_the_allocator() {
    // SAFETY: `mallopt` takes integers only.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX) };
    let blocks: Vec<Block> = (0..16).filter_map(|_| Block::new(SMALL).ok()).collect();
    blocks.into_iter().for_each(Block::free);
}

/// Fills the heap and frees the blocks without returning memory. Then `malloc_trim` returns memory
/// at the end of the heap, or, if `below`, below a block that stays.
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
        // SAFETY: `malloc_trim` returns only memory that is free.
        let trimmed = unsafe { libc::malloc_trim(0) };
        drop(stays);
        if trimmed == 1 {
            Ok(())
        } else {
            Err(io::Error::other("malloc_trim found nothing to give back"))
        }
    }))
}

/// A block of `malloc`. Dropping it leaks the block, because the process ends soon.
#[derive(Debug)]
struct Block {
    start: *mut c_void,
    len: usize,
}

impl Block {
    fn new(len: usize) -> io::Result<Block> {
        // SAFETY: `malloc` has no precondition.
        let start = unsafe { libc::malloc(len) };
        if start.is_null() {
            return Err(io::Error::last_os_error());
        }
        let block = Block { start, len };
        // In a large block, the first MiB and the middle page are enough.
        for offset in (0..len.min(1 << 20)).step_by(page_size()).chain([len / 2]) {
            let byte = start.cast::<u8>().wrapping_add(offset);
            // SAFETY: the byte is within the block, into which no reference exists.
            unsafe { byte.write_volatile(1) };
        }
        Ok(block)
    }

    /// An address on a touched page.
    fn middle(&self) -> usize {
        self.start.addr() + self.len / 2
    }

    fn free(self) {
        // SAFETY: the block came from `malloc` or `realloc`, and `self` is its only owner.
        unsafe { libc::free(self.start) };
    }

    /// Grows the block, which must move; the new block is leaked.
    fn grow(self, len: usize) -> io::Result<()> {
        // SAFETY: the block came from `malloc`, and `self`, its only owner, is consumed.
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
