//! Memory for the trampolines of one module, within reach of its branches.

#![allow(unsafe_code, reason = "writes code")]

use super::machine::{self, REACH, SLOT};
use super::raw;
use crate::page;
use std::ptr;

/// Memory for trampolines, which is never unmapped, because a thread may be executing in it.
#[derive(Debug)]
pub(super) struct Arena {
    start: u64,
    length: u64,
    used: u64,
}

impl Arena {
    /// Maps memory for `count` trampolines near `start..end`.
    pub(super) fn near(start: u64, end: u64, count: usize) -> Option<Self> {
        const STEP: u64 = 1 << 20;
        let length = page::up(count as u64 * SLOT);
        let below = (1..)
            .map(|step| start.checked_sub(length + step * STEP))
            .map_while(|at| at.filter(|at| end - at < REACH));
        let above = (1..)
            .map(|step| end + step * STEP)
            .take_while(|at| at + length - start < REACH);
        let mut places = below.chain(above).map(page::down);
        let map = |at| {
            raw::mmap(
                at,
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED_NOREPLACE,
            )
        };
        places.find_map(|at| match map(at) {
            Ok(start) if start == at => Some(Self {
                start,
                length,
                used: 0,
            }),
            Ok(elsewhere) => {
                // A kernel without `MAP_FIXED_NOREPLACE` treats the address as a hint.
                // SAFETY: the range was mapped just now, and no code uses it.
                let _ = unsafe { raw::munmap(elsewhere, length) };
                None
            }
            Err(_) => None,
        })
    }

    /// Returns the address of the next trampoline.
    pub(super) fn next(&self) -> u64 {
        self.start + self.used
    }

    /// Writes a trampoline that was made for the address [`next`](Self::next).
    ///
    /// # Panics
    /// If there is no room.
    pub(super) fn place(&mut self, code: &[u8]) {
        assert!(code.len() <= SLOT as usize, "a trampoline fits its slot");
        assert!(
            self.used + SLOT <= self.length,
            "the arena was made for so many"
        );
        let to = ptr::with_exposed_provenance_mut::<u8>(self.next() as usize);
        self.used += SLOT;
        // SAFETY: the slot is inside the arena, which is writable until `seal`, and no other code
        // knows the slot yet.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), to, code.len()) };
    }

    /// Makes the trampolines executable and read-only.
    pub(super) fn seal(self) -> Result<(), i32> {
        // SAFETY: no code writes to the range any more, because only `place` does, and it needs the
        // arena, which this function consumes.
        unsafe { raw::mprotect(self.start, self.length, libc::PROT_READ | libc::PROT_EXEC) }?;
        // SAFETY: the range is mapped and never unmapped.
        unsafe { machine::synchronize_code(self.start, self.length) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_is_in_reach_and_executable_only_when_sealed() {
        let here = page::down(Arena::near as *const () as u64);
        let mut arena = Arena::near(here, here + page::size(), 3).expect("there is room");
        let first = arena.next();
        arena.place(&[0x90]);
        assert_eq!(arena.next() - first, SLOT);
        assert!(first.abs_diff(here) < REACH, "{first:x} {here:x}");
        arena.seal().expect("it can be made executable");
    }
}
