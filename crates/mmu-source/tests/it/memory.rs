//! Scratch mappings, children, and a subscriber that keeps a log, for the sources of this process.

use mmu_notifier::{InvalidateRange, MmWithUser, Notifier, Registration, Va, VaRange};
use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Mutex;

pub(crate) const PAGE: usize = 4096;

/// A mapping that is taken away in the end.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub(crate) at: *mut u8,
    pub(crate) bytes: usize,
}

// SAFETY: it is an address and a length.
unsafe impl Send for Scratch {}
// SAFETY: as above.
unsafe impl Sync for Scratch {}

impl Scratch {
    /// Private memory, with each page written.
    pub(crate) fn anonymous(pages: usize) -> Self {
        Self::map(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).expect("mmap")
    }

    /// Maps `pages`, and writes each if that is allowed by the flags.
    pub(crate) fn map(pages: usize, flags: i32, file: i32) -> io::Result<Self> {
        let bytes = pages * PAGE;
        // SAFETY: a new mapping where the kernel likes.
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

    /// Maps `pages` of a file privately, to be read, and reads each.
    pub(crate) fn read_only(pages: usize, file: i32) -> io::Result<Self> {
        let bytes = pages * PAGE;
        // SAFETY: a new mapping where the kernel likes.
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
        assert!(page * PAGE < self.bytes);
        self.at.wrapping_add(page * PAGE).cast()
    }

    pub(crate) fn write(&self, page: usize, value: u64) {
        // SAFETY: inside of the mapping, aligned; other threads and processes may look at it.
        unsafe { self.page(page).cast::<u64>().write_volatile(value) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; a part that a test has unmapped stays so, since no code maps
        // at these addresses meanwhile who could rely on them: tests that unmap for good forget the
        // mapping.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

/// A file of memory with so many pages.
pub(crate) fn memory_file(pages: usize) -> OwnedFd {
    // SAFETY: takes a string and an integer, returns a descriptor.
    let file = unsafe { libc::memfd_create(c"mmu-source".as_ptr(), 0) };
    assert!(file >= 0, "memfd_create: {}", io::Error::last_os_error());
    // SAFETY: the descriptor is new.
    let file = unsafe { OwnedFd::from_raw_fd(file) };
    // SAFETY: integers.
    let result = unsafe { libc::ftruncate(file.as_raw_fd(), (pages * PAGE) as libc::off_t) };
    assert_eq!(result, 0);
    file
}

/// Keeps what it is told about the pages it cares for.
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

    /// Returns what was told since the last call.
    pub(crate) fn take(&self) -> Vec<VaRange> {
        std::mem::take(&mut self.ranges.lock().expect("no panic"))
    }
}
