//! The changes of the memory during the transfers.

use super::pool::{Buffer, Pool, truncate};
use super::{Counts, add};
use crate::random::Random;
use crate::{Options, Source};
use mmu_notifier::Event;
use mmu_source::kernel::Kernel;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

const ACCESS: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FRESH: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
/// Held while the pool's file backs a buffer, because the file can back only one at a time.
static FILE: Mutex<()> = Mutex::new(());

pub(super) fn run(
    pool: &Pool,
    options: &Options,
    kernel: Option<&Kernel>,
    counts: &Counts,
    stop: &AtomicBool,
    mut random: Random,
) {
    while !stop.load(Ordering::Relaxed) {
        let buffer = pool.some(&mut random);
        let _changing = buffer.changing.lock().expect("no panic");
        let version = buffer.begin();
        let kind = random.below(7);
        let change = || match kind {
            0 => map(buffer, ACCESS, FRESH),
            1 => {
                // Remove the memory for a moment. The mapping without access keeps the addresses
                // reserved, so that no other mapping gets them.
                map(buffer, libc::PROT_NONE, FRESH | libc::MAP_NORESERVE);
                map(buffer, ACCESS, FRESH);
            }
            2 => advise(buffer, libc::MADV_DONTNEED),
            3 => shift(buffer),
            4 => protect(buffer),
            // The hook does not see truncation.
            5 if options.source != Source::Hook => truncated(buffer, pool),
            _ if !options.no_fork && options.source != Source::Hook => fork(counts),
            _ => map(buffer, ACCESS, FRESH),
        };
        let silent = options.broken && random.one_in(10);
        match (options.source, kernel) {
            (Source::Bracket, _) if !silent => {
                mmu_source::current().with_invalidation(buffer.range(), Event::Unmap, |_| change());
            }
            (Source::Rehearsal, Some(kernel)) if !silent => {
                // In a rehearsal there is no virtual machine, so the cache cannot wait for changes
                // under way before it publishes a new region. So report the change again, for
                // regions that were registered between the first report and the change.
                tell(kernel, buffer);
                change();
                tell(kernel, buffer);
            }
            _ => change(),
        }
        buffer.fill(version);
        buffer.end();
        add(&counts.changed);
        if random.one_in(8) {
            std::thread::yield_now();
        }
    }
}

/// Injects the event that the kernel would report before it changes its page tables.
fn tell(kernel: &Kernel, buffer: &Buffer) {
    let start = buffer.range().start().get();
    kernel
        .inject(start, start + buffer.len as u64)
        .expect("the program runs");
}

fn map(buffer: &Buffer, access: i32, kind: i32) {
    // SAFETY: The range belongs to the pool. No reference to its bytes exists except under
    // `changing`, which the caller holds.
    let place = unsafe { libc::mmap(buffer.start.cast(), buffer.len, access, kind, -1, 0) };
    assert_eq!(
        place.cast(),
        buffer.start,
        "mmap: {}",
        std::io::Error::last_os_error()
    );
}

fn advise(buffer: &Buffer, advice: i32) {
    // SAFETY: The range belongs to the pool, and the caller holds `changing`, as in `map`.
    let result = unsafe { libc::madvise(buffer.start.cast(), buffer.len, advice) };
    assert_eq!(result, 0, "madvise: {}", std::io::Error::last_os_error());
}

fn protect(buffer: &Buffer) {
    for access in [libc::PROT_READ, ACCESS] {
        // SAFETY: The range belongs to the pool, and the caller holds `changing`, as in `map`.
        let result = unsafe { libc::mprotect(buffer.start.cast(), buffer.len, access) };
        assert_eq!(result, 0, "mprotect: {}", std::io::Error::last_os_error());
    }
}

/// Moves the pages to another address. The same system call leaves the mapping in place, with new
/// pages, so that no other mapping gets the addresses.
fn shift(buffer: &Buffer) {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
    // Linux 6.18 refuses to move a part of a mapping this way, but splits the mapping before it
    // fails. So the second call finds a whole mapping, and moves it.
    for _ in 0..2 {
        // SAFETY: The range belongs to the pool, and the caller holds `changing`, as in `map`. The
        // kernel chooses a new address where nothing is mapped.
        let moved = unsafe { libc::mremap(buffer.start.cast(), buffer.len, buffer.len, flags) };
        if moved != libc::MAP_FAILED {
            // SAFETY: The call above has made the mapping at `moved`, which no other code uses.
            unsafe { libc::munmap(moved, buffer.len) };
            return;
        }
    }
    map(buffer, ACCESS, FRESH);
}

/// Maps the pool's file, and truncates and extends the file while it is mapped.
fn truncated(buffer: &Buffer, pool: &Pool) {
    let _file = FILE.lock().expect("no panic");
    truncate(&pool.file, buffer.len);
    let kind = libc::MAP_SHARED | libc::MAP_FIXED;
    // SAFETY: The range belongs to the pool, and the caller holds `changing`, as in `map`.
    let place = unsafe {
        libc::mmap(
            buffer.start.cast(),
            buffer.len,
            ACCESS,
            kind,
            pool.file.as_raw_fd(),
            0,
        )
    };
    assert_eq!(
        place.cast(),
        buffer.start,
        "mmap: {}",
        std::io::Error::last_os_error()
    );
    buffer.fill(1);
    truncate(&pool.file, 0);
    truncate(&pool.file, buffer.len);
    buffer.fill(3);
    // Map other memory over the file, because the next thread that maps the file truncates it.
    map(buffer, ACCESS, FRESH);
}

/// Forks a child. The fork write-protects the parent's pages, which become copy on write.
fn fork(counts: &Counts) {
    // SAFETY: The child only calls `_exit`, which is allowed in the child of a program with
    // threads.
    match unsafe { libc::fork() } {
        // SAFETY: Ends the child without running the parent's exit handlers.
        0 => unsafe { libc::_exit(0) },
        -1 => {}
        child => {
            // SAFETY: The status pointer may be null.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
            add(&counts.children);
        }
    }
}
