//! On aarch64 the kernel's configuration sets the page size: 4, 16 or 64 KiB.

use std::sync::atomic::{AtomicU64, Ordering};

/// The binary logarithms of the page sizes of hugetlbfs with any size of ordinary pages, the
/// largest first. The smallest on aarch64 is 16 contiguous pages of 4 KiB.
pub(crate) const HUGE_SHIFTS: &[u32] = &[34, 30, 29, 25, 21, 16];

/// The page size. The first call asks the kernel.
#[inline]
pub(crate) fn size() -> u64 {
    static SIZE: AtomicU64 = AtomicU64::new(0);
    // ORDER: Relaxed: a thread that reads zero asks the kernel itself.
    match SIZE.load(Ordering::Relaxed) {
        0 => find(&SIZE),
        size => size,
    }
}

#[cold]
#[allow(unsafe_code, reason = "one call that takes an integer")]
fn find(into: &AtomicU64) -> u64 {
    // SAFETY: takes an integer. Every libc supports `_SC_PAGESIZE`.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    // ORDER: Relaxed, as for the load in `size`.
    into.store(size, Ordering::Relaxed);
    size
}
