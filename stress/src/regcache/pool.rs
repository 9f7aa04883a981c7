//! The buffers and their contents. The buffers are adjacent in memory.

use crate::random::Random;
use mmu_notifier::{Va, VaRange};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

const BUFFERS: usize = 16;

/// Returns the size of a page.
fn page_size() -> usize {
    // SAFETY: The call takes an integer.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// One buffer. During every change its addresses stay reserved, so that no other mapping gets them.
pub(super) struct Buffer {
    pub(super) start: *mut u8,
    pub(super) len: usize,
    /// Even while the buffer holds the pattern of this version, odd while the buffer changes.
    version: AtomicU64,
    /// Held by the thread that changes the buffer.
    pub(super) changing: Mutex<()>,
}

// SAFETY: Threads access the bytes behind the pointer only under `changing`. Otherwise only system
// calls and the device use the pointer, as an address.
unsafe impl Send for Buffer {}
// SAFETY: As for `Send`.
unsafe impl Sync for Buffer {}

pub(super) struct Pool {
    pub(super) buffers: Vec<Buffer>,
    /// A file that backs some of the mappings, and is truncated.
    pub(super) file: OwnedFd,
}

/// Returns a word of a buffer's pattern. `buffer` is the buffer's address, and `word` the word's
/// index in it.
fn pattern(version: u64, buffer: usize, word: usize) -> u64 {
    (version << 40 ^ (buffer as u64) << 20 ^ word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Buffer {
    pub(super) fn range(&self) -> VaRange {
        self.part(0, self.len)
    }

    pub(super) fn part(&self, from: usize, len: usize) -> VaRange {
        VaRange::covering(Va::new((self.start.addr() + from) as u64), len as u64)
            .expect("not empty")
    }

    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::SeqCst)
    }

    /// Writes the pattern of a version, from the offset `from` on, to `bytes`.
    pub(super) fn contents(&self, version: u64, from: usize, bytes: &mut [u8]) {
        for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&pattern(version, self.start.addr(), from / 8 + at).to_ne_bytes());
        }
    }

    /// Begins a change, and returns the version that the buffer gets. The caller holds `changing`.
    pub(super) fn begin(&self) -> u64 {
        self.version.fetch_add(1, Ordering::SeqCst) + 2
    }

    /// Ends a change: the buffer holds the new pattern.
    pub(super) fn end(&self) {
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// Writes the pattern of a version. The caller holds `changing`, and the buffer is mapped.
    pub(super) fn fill(&self, version: u64) {
        for word in 0..self.len / 8 {
            let place = self.start.cast::<u64>().wrapping_add(word);
            // SAFETY: The word is in the mapping, which is writable. The caller holds `changing`,
            // so only the kernel may access the word at the same time.
            unsafe { place.write_volatile(pattern(version, self.start.addr(), word)) };
        }
    }
}

impl Pool {
    pub(super) fn new(seed: u64) -> io::Result<Self> {
        let mut random = Random::new(seed, 1000);
        let sizes: Vec<usize> = (0..BUFFERS)
            .map(|_| page_size() * (1 + random.below(16)))
            .collect();
        let (access, kind) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: The kernel chooses an address where nothing is mapped.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                sizes.iter().sum(),
                access,
                kind,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut start: *mut u8 = start.cast();
        let mut buffers = Vec::new();
        for len in sizes {
            let buffer = Buffer {
                start,
                len,
                version: AtomicU64::new(2),
                changing: Mutex::new(()),
            };
            buffer.fill(2);
            buffers.push(buffer);
            start = start.wrapping_add(len);
        }
        Ok(Self {
            buffers,
            file: memory_file()?,
        })
    }

    pub(super) fn some<'a>(&'a self, random: &mut Random) -> &'a Buffer {
        &self.buffers[random.below(BUFFERS)]
    }

    /// Returns a random range inside one buffer.
    pub(super) fn some_range(&self, random: &mut Random) -> VaRange {
        let buffer = self.some(random);
        let from = random.below(buffer.len);
        buffer.part(from, 1 + random.below(buffer.len - from))
    }
}

/// Makes a file in memory.
pub(super) fn memory_file() -> io::Result<OwnedFd> {
    // SAFETY: The name is a C string.
    let fd = unsafe { libc::memfd_create(c"stress".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: The descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets the length of the file.
pub(super) fn truncate(file: &OwnedFd, len: usize) {
    // SAFETY: The call takes integers.
    let result = unsafe { libc::ftruncate(file.as_raw_fd(), len as libc::off_t) };
    assert_eq!(result, 0, "a file in memory can have any length");
}
