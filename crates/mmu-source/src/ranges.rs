//! What a memory call is about to invalidate, as far as its arguments tell. The same for every
//! source that sees them.
//!
//! It errs on the side of too much: arguments that the kernel will refuse still give a range if one
//! can be formed.

use crate::page;
use mmu_notifier::{Va, VaRange};

/// Advice to `madvise` that changes no translation. Any other, an unknown one included, is taken to
/// clear the range.
///
/// NORMAL, RANDOM, SEQUENTIAL, WILLNEED, DONTFORK, DOFORK, MERGEABLE, HUGEPAGE, NOHUGEPAGE,
/// DONTDUMP, DODUMP, WIPEONFORK, KEEPONFORK, COLD, POPULATE_READ and GUARD_REMOVE. POPULATE_WRITE
/// is not among them: it gives each page that was shared for reading a copy of its own.
pub(crate) const HARMLESS_ADVICE: &[u32] =
    &[0, 1, 2, 3, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 22, 103];
/// The one flag of `mbind` that moves no pages.
const MPOL_MF_STRICT: u64 = 1;
/// `mprotect` extends to the start of a mapping that grows down.
pub(crate) const PROT_GROWSDOWN: u64 = 0x0100_0000;
/// How many vectors a call may have.
pub(crate) const UIO_MAXIOV: u64 = 1024;

/// `file_page` looks up the size of the file's pages, if it is one of huge pages.
///
/// # Source
/// `ksys_mmap_pgoff`, mm/mmap.c: the length is rounded up to whole huge pages by the file, or by
/// the flags.
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
    // The smallest huge page; an address that is no multiple of it is refused.
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

/// Tells the size of a file's pages by what `statfs` says of its file system, if they are huge.
pub(crate) fn huge_page(file_system: i64, block: i64) -> Option<u64> {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    (file_system as u32 == HUGETLBFS_MAGIC as u32 && block > 0).then_some(block as u64)
}

/// Rounds the length of a mapping of huge pages up to their size, as the kernel does.
///
/// # Source
/// `ksys_mmap_pgoff`, mm/mmap.c. Flags that name no size ask for the default one, which is not
/// known here: but the address must be a multiple of it.
#[cold]
fn huge_up(address: u64, length: u64, flags: u64) -> u64 {
    let page = match flags >> libc::MAP_HUGE_SHIFT & libc::MAP_HUGE_MASK as u64 {
        0 => largest_page_at(address),
        size => 1 << size,
    };
    length.checked_next_multiple_of(page).unwrap_or(length)
}

/// The largest huge page that can begin at `address`.
pub(crate) fn largest_page_at(address: u64) -> u64 {
    1 << address.trailing_zeros().min(page::LARGEST_HUGE)
}

/// # Source
/// mremap(2). A shrink gives up the tail where it stands; what moves leaves its whole old range; an
/// old length of zero copies a shared mapping and leaves it.
pub(crate) fn mremap(
    ranges: &mut impl Extend<VaRange>,
    old: u64,
    old_length: u64,
    new_length: u64,
    flags: u64,
    new: u64,
) {
    let (old_length, new_length) = (page::up(old_length), page::up(new_length));
    let has = |flag: i32| flags & flag as u64 != 0;
    if has(libc::MREMAP_FIXED) {
        add(ranges, old, old_length);
        add(ranges, new, new_length);
    } else if has(libc::MREMAP_DONTUNMAP) || (has(libc::MREMAP_MAYMOVE) && new_length > old_length)
    {
        add(ranges, old, old_length);
    } else if new_length < old_length {
        if let Some(tail) = old.checked_add(new_length) {
            add(ranges, tail, old_length - new_length);
        }
    }
}

/// Tells whether `fd` stands for the caller where a pidfd is asked for, without being a descriptor.
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

/// What `madvise` and its like clear.
#[inline]
pub(crate) fn madvise(ranges: &mut impl Extend<VaRange>, address: u64, length: u64, advice: u64) {
    match advice as i32 {
        // These look for the folio of each page, and take all of it.
        libc::MADV_HWPOISON | libc::MADV_SOFT_OFFLINE => folios(ranges, address, length),
        _ if is_harmful(advice) => add(ranges, address, length),
        _ => {}
    }
}

/// # Source
/// `do_mbind`, mm/mempolicy.c: with a flag to move pages it isolates the folios that lie in the
/// range in part, and moves them whole. `MPOL_MF_STRICT` moves none, and without a flag it only
/// sets a policy.
pub(crate) fn mbind(ranges: &mut impl Extend<VaRange>, address: u64, length: u64, flags: u64) {
    if flags & !MPOL_MF_STRICT != 0 {
        folios(ranges, address, length);
    }
}

/// Adds the pages of `length` bytes from `address` and the folios they are in, which are as large
/// as a huge page at most. A folio can reach beyond the mapping: into the next one, if the two were
/// one before.
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

/// Adds the kernel's pages of `length` bytes from `address`, unless no range can be formed.
#[inline]
pub(crate) fn add(ranges: &mut impl Extend<VaRange>, address: u64, length: u64) {
    let address = page::untagged(address);
    ranges.extend(VaRange::covering(Va::new(address), length).map(whole_pages));
}

/// A range grown to whole pages of the kernel's.
#[inline]
pub(crate) fn whole_pages(range: VaRange) -> VaRange {
    if page::size() == mmu_notifier::PAGE_SIZE {
        return range;
    }
    let start = page::down(range.start().get());
    let length = (range.last().get() | (page::size() - 1)) - start;
    // Only the range of all addresses has a length that is none.
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
        // Half a folio further on.
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
        // Nothing of the user's lies there, and nothing overflows.
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
        // The default size: at most what the address is a multiple of.
        assert_eq!(mapped((1 << 40) + 2 * MIB, libc::MAP_HUGETLB), 2 * MIB);
        assert_eq!(mapped(1 << 40, libc::MAP_HUGETLB), 1 << page::LARGEST_HUGE);
        // A size that no processor has does not overflow.
        assert_eq!(
            mapped(
                1 << 40,
                libc::MAP_HUGETLB | libc::MAP_HUGE_MASK << libc::MAP_HUGE_SHIFT
            ),
            1 << 63
        );
    }
}
