//! Changes of mapped files, and copies on write.

use std::fs::File;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, fallocate, ftruncate};
use rustix::io::pwrite;

use super::NONE;
use super::maps::PAGES;
use crate::coverage::files::{memory_file, scratch_file};
use crate::coverage::operation::{Operation, Prepared};
use crate::coverage::other::Other;
use crate::coverage::page::Judge;
use crate::coverage::region::{Region, page_size};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "ftruncate (own)",
        judge: Judge::Frame,
        claimed: NONE,
        prepare: || {
            let file = memory_file(PAGES)?;
            let region = Region::shared(&file, PAGES)?;
            Ok(Prepared::new(&region, 0, move || truncate(&file)))
        },
    },
    Operation {
        name: "ftruncate (another process)",
        judge: Judge::Frame,
        claimed: NONE,
        prepare: || {
            let file = memory_file(PAGES)?;
            let shared = file.try_clone()?;
            let other = Other::start(move |_, _| truncate(&shared))?;
            let region = Region::shared(&file, PAGES)?;
            Ok(Prepared::new(&region, 0, move || other.act(0, 0)))
        },
    },
    Operation {
        name: "fallocate (PUNCH_HOLE, own)",
        judge: Judge::Frame,
        claimed: NONE,
        prepare: || {
            let file = memory_file(PAGES)?;
            let region = Region::shared(&file, PAGES)?;
            Ok(Prepared::new(&region, 0, move || punch(&file)))
        },
    },
    Operation {
        name: "fallocate (PUNCH_HOLE, another process)",
        judge: Judge::Frame,
        claimed: NONE,
        prepare: || {
            let file = memory_file(PAGES)?;
            let shared = file.try_clone()?;
            let other = Other::start(move |_, _| punch(&shared))?;
            let region = Region::shared(&file, PAGES)?;
            Ok(Prepared::new(&region, 0, move || other.act(0, 0)))
        },
    },
    Operation {
        name: "write to a private file mapping",
        judge: Judge::Frame,
        claimed: NONE,
        prepare: || {
            let region = Region::private(&scratch_file(PAGES)?, PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, move || {
                region.touch();
                Ok(())
            }))
        },
    },
    Operation {
        name: "write to the zero page",
        judge: Judge::Exclusive,
        claimed: NONE,
        prepare: || {
            let region = Region::untouched(PAGES)?;
            // Otherwise the first read could get a huge zero page.
            region.advise(libc::MADV_NOHUGEPAGE)?;
            region.look();
            Ok(Prepared::new(&region.clone(), 0, move || {
                region.touch();
                Ok(())
            }))
        },
    },
    Operation {
        name: "write by another process (/proc/PID/mem)",
        judge: Judge::Frame,
        claimed: NONE,
        prepare: || {
            let memory = format!("/proc/{}/mem", std::process::id());
            let other = Other::start(move |start, _| {
                let memory = File::options().write(true).open(memory)?;
                pwrite(&memory, b"!", start as u64)?;
                Ok(())
            })?;
            let region = Region::private(&scratch_file(PAGES)?, PAGES)?;
            Ok(Prepared::new(&region.clone(), 0, move || {
                other.act(region.start(), region.len())
            }))
        },
    },
];

fn truncate(file: impl AsFd) -> std::io::Result<()> {
    Ok(ftruncate(file, 0)?)
}

fn punch(file: impl AsFd) -> std::io::Result<()> {
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(fallocate(file, how, 0, (PAGES * page_size()) as u64)?)
}
