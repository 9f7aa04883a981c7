//! The mappings of an address space, and how much of them is in memory: `/proc/PID/maps` and
//! `pagemap`.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use mmu_source::process::Pid;
use rustix::param::page_size;

use super::ioctl::{self, IS_FILE, IS_HUGE, IS_PRESENT, IS_SWAPPED, IS_ZERO, Vma, Which};
use crate::record::Pages;
use crate::who::shown;

/// Two files of one address space. They refer to this address space even after its task has
/// executed another program.
#[derive(Debug)]
pub(crate) struct Place {
    maps: File,
    pagemap: File,
    /// The kernel has refused `PROCMAP_QUERY`, which it does not know.
    old_maps: bool,
    /// The kernel has refused `PAGEMAP_SCAN`, which it does not know.
    old_pagemap: bool,
}

/// Without `PAGEMAP_SCAN` a range of more bytes is not read: the file has 8 bytes for each page.
const MOST_READ: u64 = 16 << 30;

impl Place {
    /// `None` if the task has ended or its files may not be read.
    pub(crate) fn of(tid: Pid) -> Option<Place> {
        Some(Place {
            maps: File::open(shown(tid, "maps")?).ok()?,
            pagemap: File::open(shown(tid, "pagemap")?).ok()?,
            old_maps: false,
            old_pagemap: false,
        })
    }

    /// The mapping that holds `address`, or also the next one (see [`Which`]); `None` if there is
    /// none, or if the files cannot be read.
    pub(crate) fn mapping(&mut self, address: u64, which: Which) -> Option<Vma> {
        if !self.old_maps {
            match ioctl::query(&self.maps, address, which) {
                Ok(vma) => return vma,
                Err(error) if is(libc::ENOTTY)(&error) => self.old_maps = true,
                Err(_) => return None,
            }
        }
        let vma = self.all().into_iter().find(|vma| address < vma.end)?;
        (which == Which::HoldingOrNext || vma.start <= address).then_some(vma)
    }

    /// All mappings, in order; none if `maps` cannot be read.
    pub(crate) fn all(&mut self) -> Vec<Vma> {
        let mut text = Vec::with_capacity(1 << 16);
        let read = self
            .maps
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.maps.read_to_end(&mut text));
        if read.is_err() {
            return Vec::new();
        }
        text.split(|byte| *byte == b'\n')
            .filter_map(parse)
            .collect()
    }

    /// How much of a range is in memory; `None` if the kernel does not say, or if it has no
    /// `PAGEMAP_SCAN` and the range is longer than [`MOST_READ`].
    pub(crate) fn pages(&mut self, start: u64, end: u64) -> Option<Pages> {
        if !self.old_pagemap {
            let mut scanned = self.scan(start, end);
            if scanned.as_ref().is_err_and(is(libc::EFAULT)) {
                // The range ends above the user's addresses, whose end differs between machines.
                let top = self.all().iter().rev().map(|vma| vma.end).find(is_user);
                let top = top.unwrap_or(0);
                scanned = self.scan(start.min(top), end.min(top));
            }
            match scanned {
                Err(error) if is(libc::ENOTTY)(&error) => self.old_pagemap = true,
                scanned => return scanned.ok(),
            }
        }
        if end - start > MOST_READ {
            return None;
        }
        self.read_pagemap(start, end).ok()
    }

    fn scan(&self, start: u64, end: u64) -> io::Result<Pages> {
        let mut pages = Pages::default();
        let mut tell =
            |region: &ioctl::Region| add(&mut pages, region.end - region.start, region.categories);
        ioctl::scan(&self.pagemap, start, end, &mut tell)?;
        Ok(pages)
    }

    /// Reads `pagemap`, which has one 8-byte word a page. Bit 63: present; bit 62: swapped; bit 61:
    /// of a file or shared.
    fn read_pagemap(&self, start: u64, end: u64) -> io::Result<Pages> {
        let mut pages = Pages::default();
        let mut words = [0; 1 << 13];
        let page = page_size() as u64;
        let mut at = start / page * 8;
        let stop = end / page * 8;
        while at < stop {
            let want = words.len().min((stop - at) as usize);
            let count = self.pagemap.read_at(&mut words[..want], at)?;
            if count < 8 {
                break;
            }
            for word in words[..count / 8 * 8].chunks_exact(8) {
                let word = u64::from_ne_bytes(word.try_into().expect("eight bytes"));
                let mut categories = 0;
                for (bit, category) in [(63, IS_PRESENT), (62, IS_SWAPPED), (61, IS_FILE)] {
                    categories |= if word >> bit & 1 != 0 { category } else { 0 };
                }
                add(&mut pages, page, categories);
            }
            at += (count / 8 * 8) as u64;
        }
        Ok(pages)
    }
}

fn is(number: i32) -> impl Fn(&io::Error) -> bool {
    move |error| error.raw_os_error() == Some(number)
}

/// Whether a mapping that ends here is the program's: x86-64 lists a page of the kernel as well.
fn is_user(end: &u64) -> bool {
    end >> 63 == 0
}

fn add(pages: &mut Pages, bytes: u64, categories: u64) {
    if categories & IS_SWAPPED != 0 {
        pages.swapped += bytes;
    } else if categories & IS_PRESENT != 0 && categories & IS_ZERO == 0 {
        pages.resident += bytes;
        pages.file += if categories & IS_FILE != 0 { bytes } else { 0 };
        pages.huge += if categories & IS_HUGE != 0 { bytes } else { 0 };
    }
}

/// A line of `maps`: `7f00-8f00 rw-p 00000000 00:01 12    /path`.
fn parse(line: &[u8]) -> Option<Vma> {
    let line = String::from_utf8_lossy(line);
    let mut columns = line.splitn(6, ' ');
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = columns.next()?.split_once('-')?;
    let offset = hex(columns.nth(1)?)?;
    let (major, minor) = columns.next()?.split_once(':')?;
    let inode = columns.next()?.parse().ok()?;
    let name = columns.next().unwrap_or_default().trim_start().to_owned();
    let device = (
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    Some(Vma {
        start: hex(start)?,
        end: hex(end)?,
        offset,
        device,
        inode,
        name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mapping of `memory` and its pages, from the ioctls and from the files.
    fn both(memory: &[u8]) -> [(Option<Vma>, Option<Pages>); 2] {
        let start = memory.as_ptr() as u64;
        [false, true].map(|old| {
            let mut place = Place::of(std::process::id() as Pid).unwrap();
            (place.old_maps, place.old_pagemap) = (old, old);
            (
                place.mapping(start, Which::Holding),
                place.pages(start, start + memory.len() as u64),
            )
        })
    }

    #[test]
    fn ioctls_and_files_agree_and_count_touched_pages() {
        const SIZE: usize = 1 << 20;
        let page = rustix::param::page_size();
        let mut memory = vec![0_u8; SIZE + 2 * page];
        let skip = memory.as_ptr().align_offset(page);
        let memory = &mut memory[skip + page..][..SIZE - page];
        let resident = |memory: &[u8]| {
            let [(vma, pages), (old_vma, old_pages)] = both(memory);
            let (vma, old_vma) = (vma.unwrap(), old_vma.unwrap());
            // The allocator may grow the mapping in between.
            assert_eq!(
                (vma.start, vma.inode, &vma.name),
                (old_vma.start, old_vma.inode, &old_vma.name)
            );
            assert_eq!(pages.unwrap().resident, old_pages.unwrap().resident);
            pages.unwrap().resident
        };
        let before = resident(memory);
        assert!(before < SIZE as u64 / 2, "{before}");
        memory.iter_mut().step_by(page).for_each(|byte| *byte = 1);
        assert_eq!(resident(memory), memory.len() as u64);
    }

    #[test]
    fn a_range_that_ends_above_the_users_addresses_is_read_up_to_them() {
        let mut place = Place::of(std::process::id() as Pid).unwrap();
        let vma = place.all().remove(0);
        let pages = place.pages(vma.start, 1 << 63);
        // An older kernel has no `PAGEMAP_SCAN`, and its file is too long.
        assert!(place.old_pagemap || pages.is_some_and(|pages| pages.resident > 0));
    }

    #[test]
    fn an_unmapped_address_has_no_mapping_and_the_next_one_is_found() {
        for old in [false, true] {
            let mut place = Place::of(std::process::id() as Pid).unwrap();
            place.old_maps = old;
            assert_eq!(place.mapping(4096, Which::Holding), None);
            let first = place.all().remove(0);
            assert_eq!(place.mapping(4096, Which::HoldingOrNext), Some(first));
        }
    }

    #[test]
    fn a_line_that_is_not_utf8_is_parsed() {
        let vma =
            parse(b"1000-2000 rw-p 00001000 08:01 5                          /a b\xff").unwrap();
        assert_eq!(
            (vma.start, vma.offset, vma.device, vma.inode),
            (0x1000, 0x1000, (8, 1), 5)
        );
        assert!(vma.name.starts_with("/a b"));
        assert_eq!(
            (parse(b""), parse(b"1000-"), parse(b"1-2 r 0 0:0 x")),
            (None, None, None)
        );
    }
}
