//! Another library's patches, made before or after the hook's.

use crate::child::alone;
use crate::log::Watch;
use crate::machine;
use crate::pages::{at, errno, map, page_size};
use mmu_notifier::Event;
use mmu_source::hook::State;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

static CALLS: AtomicUsize = AtomicUsize::new(0);

/// The other library's replacement for `munmap`. It counts the calls, and makes each with a system
/// call instruction of its own.
unsafe extern "C" fn their_munmap(address: usize, length: usize) -> i32 {
    CALLS.fetch_add(1, Ordering::Relaxed);
    let result = machine::munmap(address, length);
    if result == 0 {
        return 0;
    }
    // SAFETY: takes no arguments, and returns the address of this thread's `errno`.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the address is that of this thread's `errno`, which no other thread accesses.
    unsafe { errno.write(-result as i32) };
    -1
}

/// Writes a jump over a function's entry, as UCX and other libraries do.
fn patch(function: usize, target: usize) {
    write(function, &machine::jump_to(target));
}

fn write(address: usize, code: &[u8]) {
    let memory = File::options()
        .write(true)
        .open("/proc/self/mem")
        .expect("one's own memory");
    memory
        .write_all_at(code, address as u64)
        .expect("it can be written past its protection");
}

fn unmap_one(watch: &Watch) {
    let pages = map(1, 7);
    watch.listen_and_look(pages, page_size());
    // SAFETY: the page is of this test.
    assert_eq!(unsafe { libc::munmap(at(pages), page_size()) }, 0);
}

#[test]
fn a_patch_that_was_there_before_is_chained_to() {
    alone(
        "foreign::a_patch_that_was_there_before_is_chained_to",
        || {
            patch(
                libc::munmap as *const () as usize,
                their_munmap as *const () as usize,
            );
            let watch = Watch::new();
            let before = CALLS.load(Ordering::Relaxed);
            unmap_one(&watch);
            let heard = watch.heard();
            assert_eq!(CALLS.load(Ordering::Relaxed), before + 1, "theirs runs");
            assert_eq!(heard.len(), 2, "and ours: {heard:?}");
            assert!(heard[0].is_start && heard[0].event == Event::Unmap && heard[0].content == 7);
            assert_eq!(
                // SAFETY: a misaligned address is refused.
                (unsafe { libc::munmap(at(1), page_size()) }, errno()),
                (-1, libc::EINVAL)
            );
            let status = watch.hook.status();
            let of_libc = status
                .iter()
                .find(|patch| patch.name == "munmap" && patch.module.starts_with("libc"));
            assert_eq!(of_libc.expect("it is listed").state, State::Chained);
            drop(watch.hook);
            let before = CALLS.load(Ordering::Relaxed);
            // SAFETY: a misaligned address is refused.
            assert_eq!(unsafe { libc::munmap(at(1), page_size()) }, -1);
            assert_eq!(
                CALLS.load(Ordering::Relaxed),
                before + 1,
                "theirs is back in its place"
            );
        },
    );
}

#[test]
fn a_patch_over_ours_is_reported_and_left_alone() {
    alone(
        "foreign::a_patch_over_ours_is_reported_and_left_alone",
        || {
            let watch = Watch::new();
            patch(
                libc::munmap as *const () as usize,
                their_munmap as *const () as usize,
            );
            let state = |watch: &Watch| {
                let status = watch.hook.status();
                let of_libc = status
                    .iter()
                    .find(|patch| patch.name == "munmap" && patch.module.starts_with("libc"));
                of_libc.expect("it is listed").state
            };
            assert_eq!(state(&watch), State::Overwritten);
            unmap_one(&watch);
            assert_eq!(watch.heard(), [], "theirs makes the call, and ours is gone");
            drop(watch.hook);
            let before = CALLS.load(Ordering::Relaxed);
            // SAFETY: a misaligned address is refused.
            assert_eq!(unsafe { libc::munmap(at(1), page_size()) }, -1);
            assert_eq!(
                CALLS.load(Ordering::Relaxed),
                before + 1,
                "theirs was not taken out with ours"
            );
        },
    );
}

/// The kernel recognises the breakpoint of a uprobe only at the address where the file is mapped.
/// It would kill a thread that executed a copy of the breakpoint.
#[test]
fn a_breakpoint_is_not_copied() {
    alone("foreign::a_breakpoint_is_not_copied", || {
        // Make the address space first, because that calls `madvise`.
        let _ = mmu_source::current();
        // One breakpoint at an instruction to patch, and one on the same page.
        write(libc::madvise as *const () as usize, machine::BREAKPOINT);
        write(libc::mlock as *const () as usize, machine::BREAKPOINT);
        let watch = Watch::new();
        let pages = map(1, 7);
        // SAFETY: changes no byte. The call may fail because of the limit, which does not matter.
        let _ = unsafe { libc::mlock(at(pages), 0) };
        watch.listen(pages, page_size());
        assert_eq!(
            // SAFETY: the page is of this test.
            unsafe { libc::madvise(at(pages), page_size(), libc::MADV_DONTNEED) },
            0
        );
        watch.expect("madvise", Event::Clear, &[(0, page_size() as i64)]);
    });
}
