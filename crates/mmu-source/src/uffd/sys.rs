//! The system calls of the source.
//!
//! The source needs only a few system calls, so it does without the crate `userfaultfd`. That crate
//! does not know `WP_ASYNC`, drops the errno of a failed call, hides events behind Cargo features,
//! and allocates a buffer for each read.
//!
//! # Safety
//! This is the only module of the source with unsafe code. The calls take integers, and pointers to
//! local variables that are as large as the call expects. A [`Userfaultfd`] owns its descriptor
//! until it is closed.

#![allow(
    unsafe_code,
    reason = "the one module of this source that makes raw system calls; see its Safety section"
)]

use mmu_notifier::VaRange;
use std::ffi::{c_ulong, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: i32 = 1;
/// `_IOWR(UFFDIO, 0x3f, struct uffdio_api)`.
const UFFDIO_API: c_ulong = 0xc018_aa3f;
/// `_IOWR(UFFDIO, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: c_ulong = 0xc020_aa00;
/// `_IOR(UFFDIO, 0x01, struct uffdio_range)`.
const UFFDIO_UNREGISTER: c_ulong = 0x8010_aa01;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;

/// The required features: fork, remap, remove and unmap events; write protection of shmem and
/// hugetlbfs; asynchronous write protection.
const FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 12 | 1 << 15;

/// An event from the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message {
    /// The kernel is about to discard the pages.
    Remove { start: u64, end: u64 },
    /// The pages have been unmapped.
    Unmap { start: u64, end: u64 },
    /// The pages have moved.
    Remap { from: u64, to: u64, len: u64 },
    /// The process has forked.
    Fork,
    /// An event that this source did not request.
    Other,
}

/// A userfaultfd, which a thread can close while others use it. It lies in a descriptor table in
/// which no other code opens descriptors afterwards, so nothing else gets its number.
#[derive(Debug)]
pub(super) struct Userfaultfd(AtomicI32);

impl Userfaultfd {
    const CLOSED: i32 = -1;

    /// Opens a userfaultfd with the required features.
    pub(super) fn open() -> io::Result<Self> {
        open().map(|owned| Self(AtomicI32::new(owned.into_raw_fd())))
    }

    /// Returns the descriptor, unless it is closed.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        // ORDER: Relaxed: a thread that misses the close gets `EBADF` from the kernel.
        let descriptor = self.0.load(Ordering::Relaxed);
        // SAFETY: the descriptor must not be -1, which was checked, and must stay open. If another
        // thread closes it, nothing else gets its number (see above).
        (descriptor != Self::CLOSED).then(|| unsafe { BorrowedFd::borrow_raw(descriptor) })
    }

    /// Closes the descriptor: the kernel unregisters all of its memory, and every thread that waits
    /// for it continues, once no other thread is in a call with it.
    pub(super) fn close(&self) {
        let descriptor = self.0.swap(Self::CLOSED, Ordering::Relaxed);
        if descriptor != Self::CLOSED {
            // SAFETY: this value owned the descriptor until the line above.
            drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
        }
    }

    /// As `f` does, or `EBADF` if the descriptor is closed.
    fn with<T>(&self, f: impl FnOnce(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        let closed = || io::Error::from_raw_os_error(libc::EBADF);
        self.descriptor().ok_or_else(closed).and_then(f)
    }
}

impl Drop for Userfaultfd {
    fn drop(&mut self) {
        self.close();
    }
}

fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: takes an integer, returns a descriptor or -1.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `from_raw_fd` needs an open descriptor without another owner. The kernel has just
    // made this one.
    let uffd = unsafe { OwnedFd::from_raw_fd(descriptor as i32) };
    let mut api = [UFFD_API, FEATURES, 0];
    // SAFETY: the ioctl accesses three words, `struct uffdio_api`.
    check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) })?;
    Ok(uffd)
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn words(range: VaRange) -> Option<[u64; 2]> {
    Some([
        range.start().get(),
        range.pages().checked_mul(mmu_notifier::PAGE_SIZE)?,
    ])
}

/// Registers a range for write protection. No page is ever protected, because the source needs only
/// the events.
pub(super) fn register(uffd: &Userfaultfd, range: VaRange) -> io::Result<()> {
    let [start, len] = words(range).ok_or(io::ErrorKind::InvalidInput)?;
    let mut request = [start, len, UFFDIO_REGISTER_MODE_WP, 0];
    uffd.with(|uffd| {
        // SAFETY: the ioctl accesses four words, `struct uffdio_register`.
        check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, request.as_mut_ptr()) })
    })
}

pub(super) fn unregister(uffd: &Userfaultfd, range: VaRange) -> io::Result<()> {
    let mut request = words(range).ok_or(io::ErrorKind::InvalidInput)?;
    uffd.with(|uffd| {
        // SAFETY: the ioctl reads two words, `struct uffdio_range`.
        check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_UNREGISTER, request.as_mut_ptr()) })
    })
}

/// Fails if a part of the range is not mapped. Registering would silently skip holes.
pub(super) fn is_mapped(range: VaRange) -> io::Result<()> {
    let [start, len] = words(range).ok_or(io::ErrorKind::InvalidInput)?;
    let start = std::ptr::with_exposed_provenance_mut::<c_void>(start as usize);
    // SAFETY: with `MS_ASYNC` the call only searches the range for holes, and changes nothing.
    check(unsafe { libc::msync(start, len as usize, libc::MS_ASYNC) })
}

/// Reads one event, if there is one. Allocates nothing.
///
/// # Errors
/// The event of a fork comes with a new descriptor, so there may be none left (`EMFILE`, `ENFILE`,
/// `ENOMEM`). The event stays, and the thread that forks waits. `EBADF` if the descriptor is
/// closed.
pub(super) fn read(uffd: &Userfaultfd) -> io::Result<Option<Message>> {
    uffd.with(read_from)
}

fn read_from(uffd: BorrowedFd<'_>) -> io::Result<Option<Message>> {
    let mut message = [0_u64; 4];
    // SAFETY: the call writes at most the 32 bytes of the local, `struct uffd_msg`.
    let got = unsafe {
        libc::read(
            uffd.as_raw_fd(),
            message.as_mut_ptr().cast(),
            size_of_val(&message),
        )
    };
    if got != size_of_val(&message) as isize {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        };
    }
    let [event, a, b, c] = message;
    Ok(Some(match event as u8 {
        0x13 => {
            // SAFETY: `a` is the descriptor of the child's userfaultfd. The kernel has just put it
            // into this thread's table, so no other code owns it. Closing it unregisters the
            // child's memory.
            drop(unsafe { OwnedFd::from_raw_fd(a as u32 as i32) });
            Message::Fork
        }
        0x14 => Message::Remap {
            from: a,
            to: b,
            len: c,
        },
        0x15 => Message::Remove { start: a, end: b },
        0x16 => Message::Unmap { start: a, end: b },
        _ => Message::Other,
    }))
}
