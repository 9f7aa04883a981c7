//! aarch64: a page has 4, 16 or 64 KiB, as the kernel was built.

use std::sync::atomic::{AtomicU64, Ordering};

/// The smallest page of hugetlbfs (16 pages of 4 KiB in a row), and the exponent of the largest (32
/// of 512 MiB).
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

/// An address without its tag, the byte that the processor does not look at (top-byte ignore,
/// memory tagging). Calls that name memory take either.
///
/// # Source
/// `untagged_addr`, arch/arm64/include/asm/uaccess.h: addresses of the kernel stay as they are.
#[inline]
pub(crate) const fn untagged(address: u64) -> u64 {
    mmu_notifier::Va::untagged(address).get()
}
