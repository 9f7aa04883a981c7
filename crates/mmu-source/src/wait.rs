//! Waiting, either for an event descriptor or for an atomic that another thread writes.
//!
//! # Safety
//! The system calls take integers and pointers to local variables. Each length that a call gets is
//! the size of its local variable.

#![allow(unsafe_code, reason = "makes raw system calls; see its Safety section")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Makes an eventfd that is not signalled.
pub(crate) fn event_fd() -> io::Result<OwnedFd> {
    // SAFETY: takes integers, returns a new descriptor or -1.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Signals `event`.
pub(crate) fn wake(event: BorrowedFd<'_>) {
    let one = 1_u64;
    // SAFETY: `write` reads the eight bytes of a local. The call fails only if the counter of
    // `event` is at its maximum, and then `event` is already signalled.
    unsafe { libc::write(event.as_raw_fd(), (&raw const one).cast(), 8) };
}

/// Sleeps until `ring` is readable, `time` has passed or a signal arrives (returns true), or until
/// `stop` is signalled (returns false).
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
    // SAFETY: `poll` accesses two entries, and both live longer than the call.
    unsafe { libc::poll(entries.as_mut_ptr(), 2, milliseconds) };
    entries[1].revents == 0
}

/// Sleeps until the other end of `socket` is closed.
pub(crate) fn until_closed(socket: BorrowedFd<'_>) {
    let mut entry = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    while entry.revents & libc::POLLHUP == 0 {
        // SAFETY: `poll` accesses one entry, a local.
        if unsafe { libc::poll(&raw mut entry, 1, -1) } < 0 {
            // A signal arrived, or the kernel lacks memory.
            pause();
        }
    }
}

/// Resets an event to not signalled.
pub(crate) fn clear(event: BorrowedFd<'_>) {
    let mut count = 0_u64;
    // SAFETY: `read` writes the eight bytes of a local. If the event is not signalled, the call
    // fails at once, because the descriptor is non-blocking.
    unsafe { libc::read(event.as_raw_fd(), (&raw mut count).cast(), 8) };
}

/// Waits until `is_so` returns true: spins at first, then sleeps between the checks.
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

/// Sleeps for a microsecond, so that other threads can run. This is a raw system call because
/// libc's function is a cancellation point: `pthread_cancel` would unwind this thread through Rust
/// code.
pub(crate) fn pause() {
    let moment = libc::timespec {
        tv_sec: 0,
        tv_nsec: 1_000,
    };
    // SAFETY: the call reads a local, and its other argument may be null.
    unsafe { libc::syscall(libc::SYS_nanosleep, &raw const moment, 0_usize) };
}
