//! Pages that `madvise` discards or changes.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;

use rustix::process::{PidfdFlags, getpid, pidfd_open};

use super::maps::PAGES;
use super::{CALL, LIBC, LIBC_AND_UFFD, patience};
use crate::coverage::files::{memory_file, scratch_file};
use crate::coverage::operation::{Operation, Prepared, Unavailable};
use crate::coverage::other::Other;
use crate::coverage::page::Judge;
use crate::coverage::region::{Region, advise_in, page_size};
use crate::source::Source;

const MADV_COLLAPSE: i32 = 25;
const MADV_GUARD_INSTALL: i32 = 102;

pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "madvise (DONTNEED)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || advised(libc::MADV_DONTNEED),
    },
    Operation {
        name: "madvise (DONTNEED_LOCKED)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            known(libc::MADV_DONTNEED_LOCKED, "5.18")?;
            // Small enough for the limit of locked memory without privilege.
            let region = Region::anonymous(16)?;
            region.lock()?;
            Ok(Prepared::new(&region.clone(), 0, move || {
                region.advise(libc::MADV_DONTNEED_LOCKED)
            }))
        },
    },
    Operation {
        name: "madvise (FREE)",
        judge: Judge::Lazy,
        claimed: LIBC_AND_UFFD,
        prepare: || advised(libc::MADV_FREE),
    },
    Operation {
        name: "madvise (REMOVE)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            let region = Region::shared(&memory_file(PAGES)?, PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, move || {
                region.advise(libc::MADV_REMOVE)
            }))
        },
    },
    Operation {
        name: "madvise (GUARD_INSTALL)",
        judge: Judge::Frame,
        claimed: LIBC,
        prepare: || advised(known(MADV_GUARD_INSTALL, "6.13")?),
    },
    Operation {
        name: "madvise (COLLAPSE)",
        judge: Judge::Frame,
        claimed: LIBC,
        prepare: || {
            known(MADV_COLLAPSE, "6.1")?;
            let region = small_pages_but_one()?;
            Ok(Prepared::new(&region.clone(), 1, move || {
                region.advise(libc::MADV_HUGEPAGE)?;
                patiently(|| region.advise(MADV_COLLAPSE))
            }))
        },
    },
    Operation {
        name: "madvise (PAGEOUT, file)",
        judge: Judge::Frame,
        claimed: LIBC,
        prepare: || {
            let region = Region::private(&scratch_file(PAGES)?, PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, move || {
                region.advise(libc::MADV_PAGEOUT)
            }))
        },
    },
    Operation {
        name: "madvise (PAGEOUT, swap)",
        judge: Judge::Frame,
        claimed: LIBC,
        prepare: || {
            let swaps = std::fs::read_to_string("/proc/swaps")?;
            if swaps.lines().count() < 2 {
                return Err("there is no swap space".into());
            }
            advised(libc::MADV_PAGEOUT)
        },
    },
    Operation {
        name: "io_uring (MADVISE, DONTNEED)",
        judge: Judge::Frame,
        // `io_uring_enter` makes the change, and the hook and the tracer see memory calls only.
        claimed: &[Source::Uffd],
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            let mut ring = io_uring::IoUring::new(2)?;
            Ok(Prepared::new(&region.clone(), 0, move || {
                region.advise_by_ring(&mut ring, libc::MADV_DONTNEED)
            }))
        },
    },
    Operation {
        name: "process_madvise (own process)",
        judge: Judge::Frame,
        claimed: LIBC,
        prepare: || {
            let region = Region::private(&scratch_file(PAGES)?, PAGES)?;
            let own = pidfd_open(getpid(), PidfdFlags::empty())?;
            Ok(Prepared::new(&region.clone(), 0, move || {
                advise_in(
                    own.as_raw_fd(),
                    region.start(),
                    region.len(),
                    libc::MADV_PAGEOUT,
                )
            }))
        },
    },
    Operation {
        name: "process_madvise (another process, COLLAPSE)",
        judge: Judge::Frame,
        claimed: CALL,
        prepare: || {
            known(MADV_COLLAPSE, "6.1")?;
            let own = pidfd_open(getpid(), PidfdFlags::empty())?;
            // The other process must be made before the memory, or it would share the memory.
            let other = Other::start(move |start, len| {
                patiently(|| advise_in(own.as_raw_fd(), start, len, MADV_COLLAPSE))
            })?;
            let region = small_pages_but_one()?;
            Ok(Prepared::new(&region.clone(), 1, move || {
                region.advise(libc::MADV_HUGEPAGE)?;
                other.act(region.start(), region.len())
            }))
        },
    },
];

fn advised(advice: i32) -> Result<Prepared, Unavailable> {
    let region = Region::anonymous(PAGES)?;
    Ok(Prepared::new(&region.clone(), 0, move || {
        region.advise(advice)
    }))
}

/// Returns the advice if this kernel knows it.
pub(super) fn known(advice: i32, since: &str) -> Result<i32, Unavailable> {
    // For a range of length zero, the kernel only checks that it knows the advice.
    match Region::untouched(1)?.part(0, 0).advise(advice) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            Err(Unavailable(format!("it needs Linux {since}")))
        }
        known => Ok(known.map(|()| advice)?),
    }
}

/// Small pages of which a huge page could be made. They stay small until other advice is given.
pub(super) fn small_pages() -> Result<Region, Unavailable> {
    let region = untouched_huge()?;
    region.touch();
    Ok(region)
}

/// Small pages for an operation that makes the huge page itself. `khugepaged` could collapse the
/// region before the operation does. So the last page is never touched: with `max_ptes_none` set to
/// 0, as in the guests, `khugepaged` ignores such a region.
fn small_pages_but_one() -> Result<Region, Unavailable> {
    let region = untouched_huge()?;
    region.part(0, region.len() / page_size() - 1).touch();
    Ok(region)
}

/// The size of a huge page: as much as one table of pages maps. A table has the size of a page, and
/// eight bytes for each page.
pub(super) fn huge_page() -> usize {
    page_size() / 8 * page_size()
}

fn untouched_huge() -> Result<Region, Unavailable> {
    let (huge, pages) = (huge_page(), huge_page() / page_size());
    let region = Region::untouched(2 * pages)?.aligned(huge, pages);
    region.advise(libc::MADV_NOHUGEPAGE)?;
    Ok(region)
}

/// Repeats `call` while it fails with `EAGAIN`, for at most [`patience`]. Collapsing fails with
/// `EAGAIN` if another user has a reference to one of the pages at that moment.
fn patiently(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let (begin, patience) = (Instant::now(), patience());
    loop {
        match call() {
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && begin.elapsed() < patience =>
            {
                std::thread::yield_now();
            }
            done => return done,
        }
    }
}
