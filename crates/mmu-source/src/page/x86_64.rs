//! On x86-64 a page has 4 KiB.

/// The binary logarithms of the page sizes of hugetlbfs, the largest first.
pub(crate) const HUGE_SHIFTS: &[u32] = &[30, 21];

/// The page size.
#[inline]
pub(crate) const fn size() -> u64 {
    4096
}
