//! On x86-64 a page has 4 KiB.

/// The smallest page of hugetlbfs, and the binary logarithm of the largest.
pub(crate) const SMALLEST_HUGE: u64 = 2 << 20;
pub(crate) const LARGEST_HUGE: u32 = 30;

/// The page size.
#[inline]
pub(crate) const fn size() -> u64 {
    4096
}
