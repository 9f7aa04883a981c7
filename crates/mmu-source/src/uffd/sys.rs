//! The system calls of the source.
//!
//! The crate `userfaultfd` is not used: it does not know `WP_ASYNC`, drops the errno of a failed
//! call, hides events behind Cargo features, and allocates a buffer for each read. This is four
//! calls.
//!
//! # Safety
//! The one module of the source with unsafe code. The calls take integers and pointers to locals of
//! the size the kernel is told.

#![allow(
    unsafe_code,
    reason = "the one module of this source that makes raw system calls; see its Safety section"
)]

use mmu_notifier::VaRange;
use std::ffi::{c_ulong, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: i32 = 1;
/// `_IOWR(UFFDIO, 0x3f, struct uffdio_api)`.
const UFFDIO_API: c_ulong = 0xc018_aa3f;
/// `_IOWR(UFFDIO, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: c_ulong = 0xc020_aa00;
/// `_IOR(UFFDIO, 0x01, struct uffdio_range)`.
const UFFDIO_UNREGISTER: c_ulong = 0x8010_aa01;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;

/// The features that the source needs: events of fork, remap, remove and unmap; write protection of
/// shmem and hugetlbfs, and without faults.
const FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 12 | 1 << 15;

/// What the kernel told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message {
    /// The pages are about to be taken away.
    Remove { start: u64, end: u64 },
    /// The pages have been unmapped.
    Unmap { start: u64, end: u64 },
    /// The pages have moved.
    Remap { from: u64, to: u64, len: u64 },
    /// The process has forked.
    Fork,
    /// Something this source did not ask for.
    Other,
}

/// Opens a userfaultfd with all that is needed.
pub(super) fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: takes an integer, returns a descriptor or -1.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `from_raw_fd` needs an open descriptor without another owner: the kernel has just
    // made it.
    let uffd = unsafe { OwnedFd::from_raw_fd(descriptor as i32) };
    let mut api = [UFFD_API, FEATURES, 0];
    // SAFETY: the request reads and writes `struct uffdio_api`, three words.
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

/// Registers a range for write protection, which is then not set on any page: only the events are
/// wanted.
pub(super) fn register(uffd: BorrowedFd<'_>, range: VaRange) -> io::Result<()> {
    let [start, len] = words(range).ok_or(io::ErrorKind::InvalidInput)?;
    let mut request = [start, len, UFFDIO_REGISTER_MODE_WP, 0];
    // SAFETY: the request reads and writes `struct uffdio_register`, four words.
    check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, request.as_mut_ptr()) })
}

pub(super) fn unregister(uffd: BorrowedFd<'_>, range: VaRange) -> io::Result<()> {
    let mut request = words(range).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: the request reads `struct uffdio_range`, two words.
    check(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_UNREGISTER, request.as_mut_ptr()) })
}

/// Tells whether all of a range is mapped: registering skips holes without a word.
pub(super) fn is_mapped(range: VaRange) -> io::Result<()> {
    let [start, len] = words(range).ok_or(io::ErrorKind::InvalidInput)?;
    let start = std::ptr::with_exposed_provenance_mut::<c_void>(start as usize);
    // SAFETY: with `MS_ASYNC` the call looks for holes in the range, and changes nothing.
    check(unsafe { libc::msync(start, len as usize, libc::MS_ASYNC) })
}

/// Ends a userfaultfd: all its memory is unregistered, and all who wait for it go on. Its
/// descriptor becomes another name of `event`.
pub(super) fn replace(uffd: BorrowedFd<'_>, event: BorrowedFd<'_>) {
    // SAFETY: both are open, and the owner of the first owns an open descriptor afterwards as well.
    unsafe { libc::dup3(event.as_raw_fd(), uffd.as_raw_fd(), libc::O_CLOEXEC) };
}

/// Reads a message if there is one. Allocates nothing.
pub(super) fn read(uffd: BorrowedFd<'_>) -> Option<Message> {
    let mut message = [0_u64; 4];
    // SAFETY: reads at most the 32 bytes of the local, `struct uffd_msg`.
    let got = unsafe {
        libc::read(
            uffd.as_raw_fd(),
            message.as_mut_ptr().cast(),
            size_of_val(&message),
        )
    };
    if got != size_of_val(&message) as isize {
        return None;
    }
    let [event, a, b, c] = message;
    Some(match event as u8 {
        0x13 => {
            // SAFETY: closes the descriptor of the child's userfaultfd, which the kernel has just
            // put there and which no other code knows, in the table of this thread. The child's
            // memory is registered no more then.
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
    })
}
