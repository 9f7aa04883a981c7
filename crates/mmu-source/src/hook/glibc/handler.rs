//! Runs in place of a memory call: opens the bracket, makes the call, closes the bracket.
//!
//! The handler may run inside `malloc` or `free`, and in a thread that is about to end. So it
//! allocates nothing and takes no lock. During the call itself it uses little stack, because a
//! thread that exits unmaps its own stack except for the 16 KiB (`PTHREAD_STACK_MIN`) next to its
//! stack pointer.

#![allow(unsafe_code, reason = "makes the calls whose place it takes")]

use super::{own_process, raw};
use crate::current_mm::current_if_made;
use crate::page;
use crate::ranges::{self, add, is_harmful};
use mmu_notifier::{Event, Va, VaRange};
use std::cell::Cell;
use std::ffi::c_int;

/// The hooked calls. `syscall(2)` makes a call with any other number directly.
pub(super) const CALLS: &[(libc::c_long, &str)] = &[
    (libc::SYS_munmap, "munmap"),
    (libc::SYS_mmap, "mmap"),
    (libc::SYS_mremap, "mremap"),
    (libc::SYS_madvise, "madvise"),
    (libc::SYS_process_madvise, "process_madvise"),
    (libc::SYS_brk, "brk"),
    (libc::SYS_shmat, "shmat"),
    (libc::SYS_shmdt, "shmdt"),
    (libc::SYS_mprotect, "mprotect"),
    (libc::SYS_pkey_mprotect, "pkey_mprotect"),
    (libc::SYS_remap_file_pages, "remap_file_pages"),
    (libc::SYS_mbind, "mbind"),
    (libc::SYS_move_pages, "move_pages"),
    (libc::SYS_migrate_pages, "migrate_pages"),
];

/// Which system call numbers are hooked. `syscall(2)` may be called with any number.
pub(super) static IS_HOOKED: [bool; 512] = {
    let mut table = [false; 512];
    let mut at = 0;
    while at < CALLS.len() {
        table[CALLS[at].0 as usize] = true;
        at += 1;
    }
    table
};

/// Makes the call `number`, inside a bracket if the call changes a translation. Returns the
/// kernel's result.
///
/// # Safety
/// The caller must follow the rules of the call `number`. The stub that calls this function does,
/// because the thread that reached the patched instruction was about to make this call.
pub(super) unsafe extern "C" fn enter(number: u64, args: &[u64; 6]) -> u64 {
    // SAFETY: the caller follows the rules of the call. The raw call does not change `errno`.
    bracketed(number, args, || unsafe { raw::syscall(number, *args) })
}

/// Calls `next`, which another library has installed in place of a function of libc, inside a
/// bracket.
///
/// # Safety
/// The caller must follow the rules of the function. The stub that calls `enter_function` does,
/// because the thread that reached the function's entry was about to call the function.
pub(super) unsafe extern "C" fn enter_function(number: u64, args: &[u64; 6], next: Next) -> u64 {
    let [a0, a1, a2, a3, a4, a5] = *args;
    // SAFETY: the caller follows the rules of the function, which `next` replaces with the same
    // rules.
    bracketed(number, args, || unsafe { next(a0, a1, a2, a3, a4, a5) })
}

/// Runs `call` inside the bracket that its arguments require. Callbacks may change `errno`, so this
/// function restores it twice. `call` sees the value from before the callbacks, and the caller sees
/// the value that `call` left. The caller may itself promise to preserve `errno`, as `free` does.
#[inline(always)]
fn bracketed(number: u64, args: &[u64; 6], call: impl FnOnce() -> u64) -> u64 {
    let mut ranges = Ranges::default();
    let event = plan(number, args, &mut ranges);
    let (Some(first), Some(mm)) = (ranges.first, current_if_made()) else {
        return call();
    };
    // SAFETY: `__errno_location` has no preconditions.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: this is the thread's own `errno`. The variable lives as long as the thread, and no
    // other code writes to it during this function.
    let errno = unsafe { &*errno.cast::<Cell<c_int>>() };
    let before = errno.get();
    let outer = mm.invalidate(first, event);
    let inner = ranges.second.map(|second| mm.invalidate(second, event));
    errno.set(before);
    let result = call();
    let after = errno.get();
    drop(inner);
    drop(outer);
    errno.set(after);
    result
}

/// A function of libc, or its replacement, with the largest number of arguments that any of them
/// has.
pub(super) type Next = unsafe extern "C" fn(u64, u64, u64, u64, u64, u64) -> u64;

/// Adds the ranges that a call is about to invalidate, and returns the event of the bracket.
#[inline(always)]
fn plan(number: u64, args: &[u64; 6], ranges: &mut Ranges) -> Event {
    let [a0, a1, ..] = *args;
    match number as libc::c_long {
        libc::SYS_munmap => {
            add(ranges, a0, a1);
            Event::Unmap
        }
        libc::SYS_mmap => {
            ranges::mmap(ranges, a0, a1, args[3], || raw::huge_page_of(args[4]));
            Event::Unmap
        }
        libc::SYS_madvise => {
            ranges::madvise(ranges, a0, a1, args[2]);
            Event::Clear
        }
        _ => plan_rare(number, args, ranges),
    }
}

#[inline(never)]
fn plan_rare(number: u64, args: &[u64; 6], ranges: &mut Ranges) -> Event {
    let [a0, a1, a2, a3, a4, a5] = *args;
    match number as libc::c_long {
        libc::SYS_mremap => {
            // The mapping may have huge pages. To look the mapping up would take longer than the
            // system call.
            ranges::mremap(ranges, a0, a1, a2, a3, a4, || {
                Some(ranges::largest_page_at(a0))
            });
            Event::Unmap
        }
        libc::SYS_remap_file_pages => {
            add(ranges, page::down(a0), a1);
            Event::Unmap
        }
        libc::SYS_brk => {
            // A break of zero is a query.
            if a0 != 0 {
                ranges.extend(VaRange::new(
                    Va::new(page::up(a0)),
                    Va::new(page::up(raw::program_break())),
                ));
            }
            Event::Unmap
        }
        libc::SYS_shmat => {
            if a1 != 0 && a2 & libc::SHM_REMAP as u64 != 0 {
                let address = page::down(page::untagged(a1));
                match (raw::segment_size(a0 as i32), own_process::top) {
                    (Some(size), _) => ranges::shmat(ranges, address, size),
                    (None, top) => match top() {
                        Ok(end) => add(ranges, address, end.saturating_sub(address)),
                        Err(_) => ranges.extend([VaRange::ALL]),
                    },
                }
            }
            Event::Unmap
        }
        libc::SYS_shmdt => {
            let mut segment = None;
            let read = own_process::mappings(|mapping| {
                if mapping.is_attached(page::untagged(a0), &mut segment) {
                    ranges.extend(VaRange::new(Va::new(mapping.start), Va::new(mapping.end)));
                }
                true
            });
            if read.is_err() {
                ranges.extend([VaRange::ALL]);
            }
            Event::Unmap
        }
        libc::SYS_process_madvise => {
            if is_harmful(a3) && own_process::is_own_pidfd(a0 as i32) {
                vectors(ranges, a1, a2, a3);
            }
            Event::Clear
        }
        libc::SYS_mprotect | libc::SYS_pkey_mprotect => {
            let a0 = page::untagged(a0);
            let grows_down = a2 & ranges::PROT_GROWSDOWN != 0;
            let start = match grows_down {
                // If the mappings cannot be read, the mapping might begin at address 0.
                true => own_process::mapping_start(a0).map_or(0, |start| start.unwrap_or(a0)),
                false => a0,
            };
            // A length of zero changes nothing. The kernel refuses a length that wraps around.
            if a1 != 0 {
                if let Some(length) = a1.checked_add(a0 - start) {
                    add(ranges, start, length);
                }
            }
            Event::ProtectionVma
        }
        libc::SYS_mbind => {
            ranges::mbind(ranges, a0, a1, a5);
            Event::Migrate { owner: None }
        }
        libc::SYS_move_pages => {
            // Without a list of nodes the call is a query. Otherwise whole folios move, so the
            // pages in the list do not bound the change.
            if a3 != 0 && own_process::is_own_task(a0 as i32) {
                ranges.extend([VaRange::ALL]);
            }
            Event::Migrate { owner: None }
        }
        libc::SYS_migrate_pages => {
            if own_process::is_own_task(a0 as i32) {
                ranges.extend([VaRange::ALL]);
            }
            Event::Migrate { owner: None }
        }
        _ => Event::Unmap,
    }
}

/// Adds the vectors of `process_madvise`. If they cannot be read for another reason than `EFAULT`,
/// they may name any address, so adds all addresses.
fn vectors(ranges: &mut Ranges, address: u64, count: u64, advice: u64) {
    const AT_ONCE: u64 = 64;
    let count = count.min(ranges::UIO_MAXIOV);
    let mut words = [0; 2 * AT_ONCE as usize];
    for done in (0..count).step_by(AT_ONCE as usize) {
        let now = (count - done).min(AT_ONCE);
        match raw::read_memory(
            address.wrapping_add(done * 16),
            &mut words[..2 * now as usize],
        ) {
            Ok(read) => {
                for vector in words[..read].chunks_exact(2) {
                    ranges::madvise(ranges, vector[0], vector[1], advice);
                }
            }
            // The kernel will not be able to read these vectors either.
            Err(libc::EFAULT) => return,
            Err(_) => ranges.extend([VaRange::ALL]),
        }
    }
}

/// The ranges of one call. Each gets a bracket. All ranges from the third on are merged into the
/// second.
#[derive(Debug, Default)]
struct Ranges {
    first: Option<VaRange>,
    second: Option<VaRange>,
}

impl Extend<VaRange> for Ranges {
    #[inline(always)]
    fn extend<I: IntoIterator<Item = VaRange>>(&mut self, ranges: I) {
        for range in ranges {
            match (self.first, self.second) {
                (None, _) => self.first = Some(range),
                (_, None) => self.second = Some(range),
                (_, Some(second)) => self.second = Some(second.hull(range)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(number: libc::c_long, args: [u64; 6]) -> (Event, Vec<(u64, u64)>) {
        let mut ranges = Ranges::default();
        let event = plan(number as u64, &args, &mut ranges);
        let pair = |range: VaRange| (range.start().get(), range.end().map_or(0, Va::get));
        (
            event,
            ranges
                .first
                .into_iter()
                .chain(ranges.second)
                .map(pair)
                .collect(),
        )
    }

    #[test]
    fn the_hook_and_the_process_source_read_calls_alike() {
        let page = page::size();
        assert_eq!(
            planned(libc::SYS_munmap, [page, 1, 0, 0, 0, 0]),
            (Event::Unmap, vec![(page, 2 * page)])
        );
        assert_eq!(planned(libc::SYS_madvise, [page, 1, 3, 0, 0, 0]).1, []);
        assert_eq!(
            planned(libc::SYS_madvise, [page, 1, 4, 0, 0, 0]),
            (Event::Clear, vec![(page, 2 * page)])
        );
        let fixed = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let moved = planned(libc::SYS_mremap, [page, page, page, fixed, 8 * page, 0]).1;
        assert_eq!(moved, [(page, 2 * page), (8 * page, 9 * page)]);
        let refused = planned(
            libc::SYS_mprotect,
            [u64::MAX - (page - 1), page + 1, 0, 0, 0, 0],
        );
        assert_eq!(refused, (Event::ProtectionVma, vec![]));
        assert_eq!(planned(libc::SYS_getpid, [page; 6]).1, []);
    }

    #[test]
    fn many_vectors_are_merged_and_unreadable_ones_are_skipped() {
        let page = page::size();
        let vectors: Vec<u64> = (1..=200).flat_map(|n| [n * page, page]).collect();
        let own = -10001_i64 as u64;
        let args = |address, count| [own, address, count, libc::MADV_DONTNEED as u64, 0, 0];
        let many = planned(
            libc::SYS_process_madvise,
            args(vectors.as_ptr() as u64, 200),
        );
        assert_eq!(
            many,
            (Event::Clear, vec![(page, 2 * page), (2 * page, 201 * page)])
        );
        assert_eq!(planned(libc::SYS_process_madvise, args(16, 2)).1, []);
    }
}
