//! x86-64: a page has 4 KiB.

/// The smallest page of hugetlbfs, and the exponent of the largest.
pub(crate) const SMALLEST_HUGE: u64 = 2 << 20;
pub(crate) const LARGEST_HUGE: u32 = 30;

/// The size of a page.
#[inline]
pub(crate) const fn size() -> u64 {
    4096
}

/// An address without what the processor does not look at: there is no such here. Linear address
/// masking (Linux 6.4) is off unless a program asks for it.
#[inline]
pub(crate) const fn untagged(address: u64) -> u64 {
    address
}
