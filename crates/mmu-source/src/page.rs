//! Page sizes, which some processors let the kernel choose, and address tags.

#[cfg(not(target_arch = "x86_64"))]
#[path = "page/asked.rs"]
mod machine;
#[cfg(target_arch = "x86_64")]
#[path = "page/x86_64.rs"]
mod machine;

pub(crate) use machine::{HUGE_SHIFTS, size};

/// The smallest page of hugetlbfs.
pub(crate) const SMALLEST_HUGE: u64 = 1 << HUGE_SHIFTS[HUGE_SHIFTS.len() - 1];

/// On aarch64, removes the tag: the top byte of an address, which the processor ignores (top-byte
/// ignore, memory tagging). System calls accept an address with or without a tag. On other
/// processors, returns the address unchanged: on x86-64 linear address masking (Linux 6.4) is off
/// unless a program enables it.
#[inline]
pub(crate) const fn untagged(address: u64) -> u64 {
    mmu_notifier::Va::untagged(address).get()
}

/// The size of a huge page at the level above the page table. No folio outside of hugetlbfs is
/// larger. A page table fills one page with eight-byte entries, each of which maps one page.
#[inline]
pub(crate) fn huge() -> u64 {
    size() / 8 * size()
}

/// Rounds down to a page boundary.
#[inline]
pub(crate) fn down(address: u64) -> u64 {
    address & !(size() - 1)
}

/// Rounds up to a page boundary. If that would overflow, returns the address unchanged; the kernel
/// will refuse such an address.
#[inline]
pub(crate) fn up(address: u64) -> u64 {
    address.checked_add(size() - 1).map_or(address, down)
}

#[cfg(test)]
#[allow(unsafe_code, reason = "a call that takes an integer")]
mod tests {
    use super::*;

    #[test]
    fn the_page_size_is_the_kernels_and_a_multiple_of_the_granule() {
        // SAFETY: takes an integer.
        assert_eq!(size(), unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64);
        assert!(size().is_power_of_two() && size() % mmu_notifier::PAGE_SIZE == 0);
        assert_eq!(
            (down(3 * size() + 1), up(3 * size() + 1)),
            (3 * size(), 4 * size())
        );
        assert_eq!((up(u64::MAX), up(0), up(size())), (u64::MAX, 0, size()));
    }

    #[test]
    fn a_tag_goes_and_an_address_stays() {
        assert_eq!(untagged(0x7fff_1234_5678), 0x7fff_1234_5678);
        assert_eq!(untagged(u64::MAX - 0xfff), u64::MAX - 0xfff);
        let tagged = untagged(0x0b00_7fff_1234_5678);
        assert_eq!(tagged == 0x7fff_1234_5678, cfg!(target_arch = "aarch64"));
    }
}
