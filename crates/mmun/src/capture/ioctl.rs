//! Two ioctls of `/proc/PID`: `PROCMAP_QUERY` (Linux 6.11) and `PAGEMAP_SCAN` (6.7).
//!
//! # Safety
//! Both take a pointer to a structure whose first word is its size, and write to the structure and
//! to the buffers that it names. The structures here have the layout of the kernel's (linux/fs.h),
//! and the buffers live across the call.
#![expect(unsafe_code, reason = "ioctls that no crate has")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A mapping, as the kernel answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Vma {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) offset: u64,
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
    /// A path, or a name such as `[heap]`; empty if the mapping has no name, or one of 512 bytes or
    /// more.
    pub(crate) name: String,
}

/// Which mapping a query returns: only one that holds the address, or else the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Holding,
    HoldingOrNext,
}

/// Asks `/proc/PID/maps` for the mapping that holds `address`, or also for the next one (see
/// [`Which`]); `None` if there is none.
///
/// # Errors
/// `ENOTTY` on a kernel before 6.11. `ESRCH` if the process is gone.
pub(crate) fn query(maps: &File, address: u64, which: Which) -> io::Result<Option<Vma>> {
    let mut name = [0_u8; 512];
    let mut query = ProcmapQuery {
        size: size_of::<ProcmapQuery>() as u64,
        query_flags: if which == Which::HoldingOrNext {
            COVERING_OR_NEXT
        } else {
            0
        },
        query_addr: address,
        vma_name_size: name.len() as u32,
        vma_name_addr: name.as_mut_ptr() as u64,
        ..ProcmapQuery::default()
    };
    let ask = |query: &mut ProcmapQuery| {
        // SAFETY: `query` has the kernel's layout (see the module). It and `name` live across the
        // call.
        unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut *query) }
    };
    let mut answer = ask(&mut query);
    if answer < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENAMETOOLONG) {
        (query.vma_name_size, query.vma_name_addr) = (0, 0);
        answer = ask(&mut query);
    }
    if answer < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::NotFound {
            Ok(None)
        } else {
            Err(error)
        };
    }
    let name = &name[..(query.vma_name_size as usize).saturating_sub(1)];
    Ok(Some(Vma {
        start: query.vma_start,
        end: query.vma_end,
        offset: query.vma_offset,
        device: (query.dev_major, query.dev_minor),
        inode: query.inode,
        name: String::from_utf8_lossy(name).into_owned(),
    }))
}

/// Consecutive pages with the same categories.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

pub(crate) const IS_FILE: u64 = 1 << 2;
pub(crate) const IS_PRESENT: u64 = 1 << 3;
pub(crate) const IS_SWAPPED: u64 = 1 << 4;
pub(crate) const IS_ZERO: u64 = 1 << 5;
pub(crate) const IS_HUGE: u64 = 1 << 6;

/// Asks `/proc/PID/pagemap` which pages of a range are present or swapped, and calls `tell` for
/// each run of such pages with the same categories.
///
/// # Errors
/// `ENOTTY` on a kernel before 6.7, and other errors of the kernel.
pub(crate) fn scan(
    pagemap: &File,
    start: u64,
    end: u64,
    mut tell: impl FnMut(&Region),
) -> io::Result<()> {
    let mut regions = [Region::default(); 64];
    let mut at = start;
    while at < end {
        let mut scan = PagemapScan {
            size: size_of::<PagemapScan>() as u64,
            start: at,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            return_mask: IS_PRESENT | IS_SWAPPED | IS_FILE | IS_ZERO | IS_HUGE,
            ..PagemapScan::default()
        };
        // SAFETY: `scan` has the kernel's layout (see the module). It and `regions` live across the
        // call.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        regions[..count].iter().for_each(&mut tell);
        if scan.walk_end <= at {
            break;
        }
        at = scan.walk_end;
    }
    Ok(())
}

/// `struct procmap_query`.
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct PagemapScan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const COVERING_OR_NEXT: u64 = 0x10;
const PROCMAP_QUERY: libc::Ioctl = 0xc068_6611_u32 as libc::Ioctl;
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;

const _: () = assert!(size_of::<ProcmapQuery>() == 0x68 && size_of::<PagemapScan>() == 0x60);
