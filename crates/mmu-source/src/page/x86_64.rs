//! On x86-64 a page has 4 KiB.

/// The smallest page of hugetlbfs, and the binary logarithms of all sizes, the largest first.
pub(crate) const SMALLEST_HUGE: u64 = 2 << 20;
pub(crate) const HUGE_SHIFTS: &[u32] = &[30, 21];

/// The page size.
#[inline]
pub(crate) const fn size() -> u64 {
    4096
}
