//! Waiting: for an event descriptor, and for a word that another thread writes.
//!
//! # Safety
//! The calls take integers and pointers to locals of the size that the kernel is told.

#![allow(unsafe_code, reason = "makes raw system calls; see its Safety section")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Makes an event that is not set.
pub(crate) fn event_fd() -> io::Result<OwnedFd> {
    // SAFETY: takes integers, returns a new descriptor or -1.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Wakes the thread that waits for `event`.
pub(crate) fn wake(event: BorrowedFd<'_>) {
    let one = 1_u64;
    // SAFETY: writes the eight bytes of a local. It can only fail when the event is set already.
    unsafe { libc::write(event.as_raw_fd(), (&raw const one).cast(), 8) };
}

/// Sleeps until `ring` has a record or the time is over (true), or until `stop` is set (false).
pub(crate) fn readable(ring: BorrowedFd<'_>, stop: BorrowedFd<'_>, time: Option<Duration>) -> bool {
    let milliseconds = time.map_or(-1, |time| {
        i32::try_from(time.as_millis()).unwrap_or(i32::MAX)
    });
    let entry = |fd: BorrowedFd<'_>| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut entries = [entry(ring), entry(stop)];
    // SAFETY: two entries, which live through the call.
    unsafe { libc::poll(entries.as_mut_ptr(), 2, milliseconds) };
    entries[1].revents == 0
}

/// Takes a wake-up back.
pub(crate) fn clear(event: BorrowedFd<'_>) {
    let mut count = 0_u64;
    // SAFETY: reads the eight bytes of a local. It fails if the event is not set, for the
    // descriptor does not block.
    unsafe { libc::read(event.as_raw_fd(), (&raw mut count).cast(), 8) };
}

/// Waits, in short naps after a while, until `is_so`.
pub(crate) fn until(mut is_so: impl FnMut() -> bool) {
    for round in 0_u32.. {
        if is_so() {
            return;
        }
        if round < 100 {
            std::hint::spin_loop()
        } else {
            pause()
        }
    }
}

/// Gives the processor away for a moment. A raw call: the C library's function ends a thread that
/// is cancelled (`pthread_cancel`), which code in Rust does not survive.
pub(crate) fn pause() {
    let moment = libc::timespec {
        tv_sec: 0,
        tv_nsec: 1_000,
    };
    // SAFETY: it reads a local; the rest may be null.
    unsafe { libc::syscall(libc::SYS_nanosleep, &raw const moment, 0_usize) };
}
