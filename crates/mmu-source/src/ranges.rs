//! Computes which range a memory call is about to invalidate, from the call's arguments. All
//! sources that see arguments share this module.
//!
//! The range is rounded up when in doubt. The module does not check whether the kernel will accept
//! the call: it reports a range whenever the arguments can form one.

use crate::page;
use mmu_notifier::{Va, VaRange};

/// The `madvise` advice that changes no translation. Any other advice, including an unknown one,
/// counts as clearing the range.
///
/// NORMAL, RANDOM, SEQUENTIAL, WILLNEED, DONTFORK, DOFORK, MERGEABLE, HUGEPAGE, NOHUGEPAGE,
/// DONTDUMP, DODUMP, WIPEONFORK, KEEPONFORK, COLD, POPULATE_READ and GUARD_REMOVE. POPULATE_WRITE
/// is absent: it replaces each page that is shared for reading by a private copy.
pub(crate) const HARMLESS_ADVICE: &[u32] =
    &[0, 1, 2, 3, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 22, 103];
/// The only flag of `mbind` that moves no pages.
const MPOL_MF_STRICT: u64 = 1;
/// With this flag `mprotect` extends its range down to the start of a mapping that grows down.
pub(crate) const PROT_GROWSDOWN: u64 = 0x0100_0000;
/// The largest number of vectors in one call.
pub(crate) const UIO_MAXIOV: u64 = 1024;

/// Adds the range that `mmap` replaces. `file_page` returns the page size of the file if the file
/// is on hugetlbfs.
///
/// # Source
/// `ksys_mmap_pgoff`, mm/mmap.c: the kernel rounds the length up to whole huge pages, of the size
/// that the file or the flags give.
#[inline]
pub(crate) fn mmap(
    ranges: &mut impl Extend<VaRange>,
    address: u64,
    length: u64,
    flags: u64,
    file_page: impl FnOnce() -> Option<u64>,
) {
    let has = |flag: i32| flags & flag as u64 != 0;
    if !has(libc::MAP_FIXED) || has(libc::MAP_FIXED_NOREPLACE) {
        return;
    }
    let mut length = length;
    // The kernel refuses an address that is not a multiple of the file's page size. So at an
    // address that is not a multiple of the smallest huge page, no file with huge pages can be
    // mapped.
    if !has(libc::MAP_ANONYMOUS) && address % page::SMALLEST_HUGE == 0 {
        length = file_page()
            .and_then(|page| length.checked_next_multiple_of(page))
            .unwrap_or(length);
    }
    if has(libc::MAP_HUGETLB) {
        length = huge_up(address, length, flags);
    }
    add(ranges, address, length);
}

/// Returns the page size of a file if it is on hugetlbfs, from the fields of `statfs`.
pub(crate) fn huge_page(file_system: i64, block: i64) -> Option<u64> {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    (file_system as u32 == HUGETLBFS_MAGIC as u32 && block > 0).then_some(block as u64)
}

/// Rounds the length of a huge-page mapping up to whole huge pages, as the kernel does.
///
/// # Source
/// `ksys_mmap_pgoff`, mm/mmap.c. If the flags give no size, the kernel uses its default size, which
/// is not known here. But `address` must be a multiple of that size, which bounds it.
#[cold]
fn huge_up(address: u64, length: u64, flags: u64) -> u64 {
    let page = match flags >> libc::MAP_HUGE_SHIFT & libc::MAP_HUGE_MASK as u64 {
        0 => largest_page_at(address),
        size => 1 << size,
    };
    length.checked_next_multiple_of(page).unwrap_or(length)
}

/// Returns the largest page size of hugetlbfs that `address` is a multiple of, or the size of an
/// ordinary page.
pub(crate) fn largest_page_at(address: u64) -> u64 {
    let address = page::untagged(address);
    let fits = |shift: &&u32| address.trailing_zeros() >= **shift;
    page::HUGE_SHIFTS
        .iter()
        .find(fits)
        .map_or(page::size(), |shift| 1 << shift)
}

/// Adds the ranges that `mremap` unmaps. `huge_page` returns a bound of the page size of the old
/// mapping, if that mapping may be on hugetlbfs.
///
/// # Source
/// mremap(2). A shrink without a move unmaps the tail. A move unmaps the whole old range; a growth
/// that may move counts as a move. With `MREMAP_FIXED` the new range is unmapped as well. An old
/// length of zero duplicates a shared mapping and unmaps nothing of the old mapping. For a mapping
/// of huge pages, the kernel rounds both lengths up to whole huge pages, and refuses an address
/// that is not a multiple of the page size (since Linux 5.16).
pub(crate) fn mremap(
    ranges: &mut impl Extend<VaRange>,
    old: u64,
    old_length: u64,
    new_length: u64,
    flags: u64,
    new: u64,
    huge_page: impl FnOnce() -> Option<u64>,
) {
    let (old_length, new_length) = (page::up(old_length), page::up(new_length));
    let page = match page::untagged(old) % page::SMALLEST_HUGE {
        0 => huge_page().unwrap_or(page::size()),
        _ => page::size(),
    };
    let whole = |length: u64| length.checked_next_multiple_of(page).unwrap_or(length);
    let has = |flag: i32| flags & flag as u64 != 0;
    if has(libc::MREMAP_FIXED) {
        add(ranges, old, whole(old_length));
        add(ranges, new, whole(new_length));
    } else if has(libc::MREMAP_DONTUNMAP) || (has(libc::MREMAP_MAYMOVE) && new_length > old_length)
    {
        add(ranges, old, whole(old_length));
    } else if new_length < old_length {
        // `page` is only a bound, so the new length may not be rounded up.
        if let Some(tail) = old.checked_add(new_length) {
            add(ranges, tail, whole(old_length) - new_length);
        }
    }
}

/// Adds the range that `shmat` with `SHM_REMAP` replaces with a segment of `size` bytes.
///
/// # Source
/// `newseg`, ipc/shm.c: the file of a segment with huge pages (`SHM_HUGETLB`) is rounded up to
/// whole pages, and the kernel maps the whole file. It refuses an address that is not a multiple of
/// the page size. No call tells the page size of a segment.
pub(crate) fn shmat(ranges: &mut impl Extend<VaRange>, address: u64, size: u64) {
    let page = largest_page_at(address);
    add(
        ranges,
        address,
        size.checked_next_multiple_of(page).unwrap_or(size),
    );
}

/// Tells whether `fd`, an argument that takes a pidfd, is one of the special values that name the
/// caller itself.
///
/// # Source
/// `PIDFD_SELF_THREAD` and `PIDFD_SELF_THREAD_GROUP`, include/uapi/linux/pidfd.h. The latter was
/// -20000 in Linux 6.14.
pub(crate) fn is_self_pidfd(fd: i32) -> bool {
    matches!(fd, -10000 | -10001 | -20000)
}

pub(crate) fn is_harmful(advice: u64) -> bool {
    !HARMLESS_ADVICE.contains(&(advice as u32))
}

/// Adds the range that `madvise` or one of its relatives clears.
#[inline]
pub(crate) fn madvise(ranges: &mut impl Extend<VaRange>, address: u64, length: u64, advice: u64) {
    match advice as i32 {
        // Both act on the whole folio of each page.
        libc::MADV_HWPOISON | libc::MADV_SOFT_OFFLINE => folios(ranges, address, length),
        _ if is_harmful(advice) => add(ranges, address, length),
        _ => {}
    }
}

/// Adds the folios that `mbind` moves.
///
/// # Source
/// `do_mbind`, mm/mempolicy.c. With a flag that moves pages, the kernel isolates every folio that
/// overlaps the range, and moves the whole folio. With `MPOL_MF_STRICT` alone or without a flag, it
/// only sets or checks a policy.
pub(crate) fn mbind(ranges: &mut impl Extend<VaRange>, address: u64, length: u64, flags: u64) {
    if flags & !MPOL_MF_STRICT != 0 {
        folios(ranges, address, length);
    }
}

/// Adds `length` bytes from `address`, rounded out to whole huge pages. Every folio of these bytes
/// then lies inside of the range, because a folio is aligned and at most as large as a huge page.
/// The folio can reach beyond the mapping into the adjacent one, if both were once a single
/// mapping.
#[cold]
pub(crate) fn folios(ranges: &mut impl Extend<VaRange>, address: u64, length: u64) {
    let (address, huge) = (page::untagged(address), page::huge());
    let start = address & !(huge - 1);
    match address
        .checked_add(length)
        .and_then(|end| end.checked_next_multiple_of(huge))
    {
        Some(end) if length > 0 => add(ranges, start, end - start),
        _ => add(ranges, address, length),
    }
}

/// Adds `length` bytes from `address`, rounded out to kernel pages, unless no range can be formed.
#[inline]
pub(crate) fn add(ranges: &mut impl Extend<VaRange>, address: u64, length: u64) {
    let address = page::untagged(address);
    ranges.extend(VaRange::covering(Va::new(address), length).map(whole_pages));
}

/// Rounds a range out to whole kernel pages, which may be larger than [`mmu_notifier::PAGE_SIZE`].
#[inline]
pub(crate) fn whole_pages(range: VaRange) -> VaRange {
    if page::size() == mmu_notifier::PAGE_SIZE {
        return range;
    }
    let start = page::down(range.start().get());
    let length = (range.last().get() | (page::size() - 1)) - start;
    // The length overflows only for the range of all addresses.
    length
        .checked_add(1)
        .and_then(|length| VaRange::covering(Va::new(start), length).ok())
        .unwrap_or(VaRange::ALL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_is_whole_folios() {
        let (page, huge) = (page::size(), page::huge());
        // In the middle of a folio.
        let inside = huge + huge / 2;
        let told = |f: &dyn Fn(&mut Vec<VaRange>)| {
            let mut ranges = Vec::new();
            f(&mut ranges);
            ranges
                .iter()
                .map(|range| (range.start().get(), range.end().map_or(0, Va::get)))
                .collect::<Vec<_>>()
        };
        let moves = |address, length, flags| told(&|ranges| mbind(ranges, address, length, flags));
        assert_eq!(moves(inside, page, 2), [(huge, 2 * huge)]);
        assert_eq!(moves(inside, page, 4 | MPOL_MF_STRICT), [(huge, 2 * huge)]);
        assert_eq!(moves(huge, huge + 1, 2), [(huge, 3 * huge)]);
        assert_eq!(moves(inside, page, MPOL_MF_STRICT), []);
        assert_eq!(moves(inside, 0, 2), []);
        // At the top of the address space nothing overflows.
        assert_eq!(
            moves(u64::MAX - (page - 1), page, 2),
            [(u64::MAX - (page - 1), 0)]
        );
        let advised = |advice: i32| told(&|ranges| madvise(ranges, inside, page, advice as u64));
        assert_eq!(advised(libc::MADV_SOFT_OFFLINE), [(huge, 2 * huge)]);
        assert_eq!(advised(libc::MADV_HWPOISON), [(huge, 2 * huge)]);
        assert_eq!(advised(libc::MADV_DONTNEED), [(inside, inside + page)]);
        assert_eq!(advised(libc::MADV_WILLNEED), []);
    }

    #[test]
    fn a_mapping_of_huge_pages_moves_and_shrinks_by_whole_ones() {
        const HUGE: u64 = 2 << 20;
        let (page, old, new) = (page::size(), 1 << 40, 2 << 40);
        let ranges_of = |old: u64, old_length: u64, new_length: u64, flags: i32, huge| {
            let mut ranges = Vec::new();
            mremap(
                &mut ranges,
                old,
                old_length,
                new_length,
                flags as u64,
                new,
                || huge,
            );
            ranges
                .iter()
                .map(|range| (range.start().get(), range.end().map_or(0, Va::get)))
                .collect::<Vec<_>>()
        };
        let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        assert_eq!(
            ranges_of(old, page, page, fixed, Some(HUGE)),
            [(old, old + HUGE), (new, new + HUGE)]
        );
        assert_eq!(
            ranges_of(old, HUGE + page, page, 0, Some(HUGE)),
            [(old + page, old + 2 * HUGE)],
            "the kernel keeps the first huge page, and unmaps all of the second"
        );
        assert_eq!(
            ranges_of(old, page, HUGE + page, libc::MREMAP_MAYMOVE, Some(HUGE)),
            [(old, old + HUGE)]
        );
        assert_eq!(
            ranges_of(old, page, page, fixed, None),
            [(old, old + page), (new, new + page)]
        );
        assert_eq!(
            ranges_of(old + page, page, page, fixed, Some(HUGE))[0],
            (old + page, old + 2 * page),
            "no huge page begins there"
        );
        assert_eq!(ranges_of(old, u64::MAX, u64::MAX, fixed, Some(HUGE)), []);
    }

    #[test]
    fn a_segment_is_attached_with_whole_pages() {
        let end_of = |address: u64, size: u64| {
            let mut ranges = Vec::new();
            shmat(&mut ranges, address, size);
            ranges[0].end().map_or(0, Va::get) - address
        };
        let page = page::size();
        assert_eq!(end_of((1 << 40) + page, 1), page, "of ordinary pages");
        assert_eq!(end_of((1 << 40) + (2 << 20), page), 2 << 20);
        assert_eq!(end_of(1 << 40, page), 1 << page::HUGE_SHIFTS[0]);
    }

    #[test]
    fn a_mapping_of_huge_pages_replaces_whole_ones() {
        const MIB: u64 = 1 << 20;
        let mapped = |address: u64, flags: i32| {
            let mut ranges = Vec::new();
            mmap(
                &mut ranges,
                address,
                page::size(),
                (flags | libc::MAP_FIXED) as u64,
                || Some(1 << 21),
            );
            assert_eq!(ranges.len(), 1);
            ranges[0].end().map_or(0, Va::get) - address
        };
        assert_eq!(mapped(1 << 40, libc::MAP_ANONYMOUS), page::size());
        assert_eq!(mapped(1 << 40, 0), 2 * MIB, "by the file");
        assert_eq!(
            mapped((1 << 40) + page::size(), 0),
            page::size(),
            "refused for a file of huge pages"
        );
        assert_eq!(
            mapped(1 << 40, libc::MAP_HUGETLB | libc::MAP_HUGE_2MB),
            2 * MIB
        );
        assert_eq!(
            mapped(1 << 40, libc::MAP_HUGETLB | libc::MAP_HUGE_1GB),
            1024 * MIB
        );
        // Without a size in the flags: the largest size that the address is a multiple of.
        assert_eq!(mapped((1 << 40) + 2 * MIB, libc::MAP_HUGETLB), 2 * MIB);
        assert_eq!(
            mapped(1 << 40, libc::MAP_HUGETLB),
            1 << page::HUGE_SHIFTS[0]
        );
        // A size that no processor supports does not overflow.
        assert_eq!(
            mapped(
                1 << 40,
                libc::MAP_HUGETLB | libc::MAP_HUGE_MASK << libc::MAP_HUGE_SHIFT
            ),
            1 << 63
        );
    }
}
