//! Scratch mappings, files in memory, and a logging subscriber, for the tests of the sources of
//! this process.

use mmu_notifier::{InvalidateRange, MmWithUser, Notifier, Registration, Va, VaRange};
use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Mutex;

/// The size of a page.
pub(crate) fn page_size() -> usize {
    // SAFETY: takes an integer.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// A mapping. It is unmapped on drop.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub(crate) at: *mut u8,
    pub(crate) bytes: usize,
}

// SAFETY: the type is only an address and a length.
unsafe impl Send for Scratch {}
// SAFETY: the type is only an address and a length.
unsafe impl Sync for Scratch {}

impl Scratch {
    /// Maps private memory and writes to each page.
    pub(crate) fn anonymous(pages: usize) -> Self {
        Self::map(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).expect("mmap")
    }

    /// Maps `pages` pages, and writes to each.
    pub(crate) fn map(pages: usize, flags: i32, file: i32) -> io::Result<Self> {
        let bytes = pages * page_size();
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                file,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let scratch = Self {
            at: at.cast(),
            bytes,
        };
        (0..pages).for_each(|page| scratch.write(page, 1));
        Ok(scratch)
    }

    /// Maps `pages` pages of a file, private and read-only, and reads each.
    pub(crate) fn read_only(pages: usize, file: i32) -> io::Result<Self> {
        let bytes = pages * page_size();
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ,
                libc::MAP_PRIVATE,
                file,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let scratch = Self {
            at: at.cast(),
            bytes,
        };
        for page in 0..pages {
            // SAFETY: inside of the mapping.
            unsafe { scratch.page(page).cast::<u8>().read_volatile() };
        }
        Ok(scratch)
    }

    pub(crate) fn range(&self) -> VaRange {
        VaRange::covering(Va::new(self.at.addr() as u64), self.bytes as u64).expect("not empty")
    }

    pub(crate) fn page(&self, page: usize) -> *mut c_void {
        assert!(page * page_size() < self.bytes);
        self.at.wrapping_add(page * page_size()).cast()
    }

    pub(crate) fn write(&self, page: usize, value: u64) {
        // SAFETY: inside the mapping, and aligned. Other threads and processes may read the memory
        // at the same time.
        unsafe { self.page(page).cast::<u64>().write_volatile(value) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping. If a test has unmapped a part of it, no code that
        // relies on these addresses maps memory there meanwhile; a test that unmaps for good
        // forgets the `Scratch`.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

/// Makes a file in memory with `pages` pages.
pub(crate) fn memory_file(pages: usize) -> OwnedFd {
    // SAFETY: takes a string and an integer, returns a descriptor.
    let file = unsafe { libc::memfd_create(c"mmu-source".as_ptr(), 0) };
    assert!(file >= 0, "memfd_create: {}", io::Error::last_os_error());
    // SAFETY: the descriptor is new.
    let file = unsafe { OwnedFd::from_raw_fd(file) };
    // SAFETY: takes integers. The file is new, and no page of it is mapped.
    let result = unsafe { libc::ftruncate(file.as_raw_fd(), (pages * page_size()) as libc::off_t) };
    assert_eq!(result, 0);
    file
}

/// Logs the reports that overlap one range.
#[derive(Debug)]
pub(crate) struct Log {
    about: VaRange,
    ranges: Mutex<Vec<VaRange>>,
}

impl Notifier for Log {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        if range.range().overlaps(self.about) {
            self.ranges.lock().expect("no panic").push(range.range());
        }
    }
}

impl Log {
    pub(crate) fn about(mm: &MmWithUser, about: VaRange) -> Registration<Self> {
        Registration::new(
            mm,
            Self {
                about,
                ranges: Mutex::new(Vec::new()),
            },
        )
        .expect("outside of brackets")
    }

    /// Returns the reports since the last call.
    pub(crate) fn take(&self) -> Vec<VaRange> {
        std::mem::take(&mut self.ranges.lock().expect("no panic"))
    }
}
