//! The kernel says how large a page is: on aarch64 4, 16 or 64 KiB, as it was built.

use std::sync::atomic::{AtomicU64, Ordering};

/// The smallest page of hugetlbfs (on aarch64 16 pages of 4 KiB in a row), and the exponent of the
/// largest (32 of 512 MiB).
pub(crate) const SMALLEST_HUGE: u64 = 64 << 10;
pub(crate) const LARGEST_HUGE: u32 = 34;

/// The size of a page, found once.
#[inline]
pub(crate) fn size() -> u64 {
    static SIZE: AtomicU64 = AtomicU64::new(0);
    // ORDER: Relaxed: a thread that finds zero asks the kernel itself.
    match SIZE.load(Ordering::Relaxed) {
        0 => find(&SIZE),
        size => size,
    }
}

#[cold]
#[allow(unsafe_code, reason = "one call that takes an integer")]
fn find(into: &AtomicU64) -> u64 {
    // SAFETY: takes an integer; every libc knows this one.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    // ORDER: Relaxed, as the load.
    into.store(size, Ordering::Relaxed);
    size
}
