//! Mappings that are removed, moved or replaced.

use super::{CALL_AND_UFFD, LIBC, LIBC_AND_UFFD};
use crate::coverage::operation::{Operation, Prepared};
use crate::coverage::page::Judge;
use crate::coverage::region::{Region, page_size};

/// The size of a region: so many pages that their change takes a while.
pub(super) const PAGES: usize = 512;

pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "munmap (libc)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, || region.unmap()))
        },
    },
    Operation {
        name: "munmap (part)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            let middle = region.part(PAGES / 4, PAGES / 2);
            Ok(Prepared::new(&region, PAGES / 4, || middle.unmap()))
        },
    },
    Operation {
        name: "munmap (raw instruction)",
        judge: Judge::Frame,
        claimed: CALL_AND_UFFD,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, || {
                region.unmap_by_instruction()
            }))
        },
    },
    Operation {
        name: "munmap (syscall(2))",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, || {
                region.unmap_by_number()
            }))
        },
    },
    Operation {
        name: "mremap (move)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            let target = Region::untouched(PAGES)?;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            Ok(Prepared::new(&region.clone(), 0, move || {
                region.remap(PAGES * page_size(), flags, Some(target))
            }))
        },
    },
    Operation {
        name: "mremap (over a live mapping)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            // The new pages are untouched, so they differ from the replaced pages even without
            // frame numbers.
            let region = Region::untouched(PAGES)?;
            let target = Region::anonymous(PAGES)?;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            Ok(Prepared::new(&target.clone(), 0, move || {
                region.remap(PAGES * page_size(), flags, Some(target))
            }))
        },
    },
    Operation {
        name: "mremap (DONTUNMAP)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
            Ok(Prepared::new(&region.clone(), 0, move || {
                region.remap(PAGES * page_size(), flags, None)
            }))
        },
    },
    Operation {
        name: "mremap (shrink)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            Ok(Prepared::new(&region.clone(), PAGES / 2, || {
                region.remap(PAGES / 2 * page_size(), 0, None)
            }))
        },
    },
    Operation {
        name: "mmap (MAP_FIXED over live memory)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, || region.map_over()))
        },
    },
    Operation {
        name: "shmdt",
        judge: Judge::Frame,
        // The kernel raises no event of userfaultfd for segments.
        claimed: LIBC,
        prepare: || {
            let region = Region::segment(PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, || region.detach()))
        },
    },
    Operation {
        name: "shmat (SHM_REMAP)",
        judge: Judge::Frame,
        // The kernel raises no event of userfaultfd for segments.
        claimed: LIBC,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, || region.attach_over()))
        },
    },
    Operation {
        name: "mprotect",
        judge: Judge::Writable,
        claimed: LIBC,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, move || region.protect()))
        },
    },
    Operation {
        name: "pkey_mprotect",
        judge: Judge::Writable,
        claimed: LIBC,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, move || {
                region.protect_with_key()
            }))
        },
    },
];
