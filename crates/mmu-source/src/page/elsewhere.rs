//! Another processor: the kernel says how large a page is.

use std::sync::atomic::{AtomicU64, Ordering};

/// The smallest page of hugetlbfs, and the exponent of the largest.
pub(crate) const SMALLEST_HUGE: u64 = 64 << 10;
pub(crate) const LARGEST_HUGE: u32 = 34;

/// The size of a page, found once.
#[inline]
pub(crate) fn size() -> u64 {
    static SIZE: AtomicU64 = AtomicU64::new(0);
    // ORDER: Relaxed: whoever finds zero finds out for itself.
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

pub(crate) const fn untagged(address: u64) -> u64 {
    address
}
