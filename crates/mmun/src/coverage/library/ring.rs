//! The device: fixed buffers of an io_uring. The kernel pins their pages, as it does for a network
//! card.
//!
//! # Safety
//! The kernel pins the pages of a range or refuses to register it. A write through a slot goes to
//! the pinned pages. These pages belong to a region of `coverage`, to which no Rust reference
//! exists.
#![expect(
    unsafe_code,
    reason = "fixed buffers take raw addresses; see the Safety section"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::with_exposed_provenance_mut;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use io_uring::{IoUring, opcode, types};
use rustix::fs::{MemfdFlags, memfd_create};

/// The maximum number of registrations. No slot is used twice, so the slot number identifies a
/// registration.
const SLOTS: u32 = 256;
/// The bytes of a transfer.
pub(crate) const BYTES: [u8; 64] =
    *b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,";

/// The device; the module's documentation describes it.
pub(crate) struct Ring {
    ring: IoUring,
    next: AtomicU32,
    source: File,
}

impl Ring {
    pub(crate) fn new() -> io::Result<Ring> {
        let ring = IoUring::new(4)?;
        ring.submitter().register_buffers_sparse(SLOTS)?;
        let source = File::from(memfd_create("coverage-bytes", MemfdFlags::CLOEXEC)?);
        rustix::io::pwrite(&source, &BYTES, 0)?;
        Ok(Ring {
            ring,
            next: AtomicU32::new(0),
            source,
        })
    }

    /// Pins a range and returns its slot. May be called in any thread.
    pub(crate) fn register(&self, start: usize, len: usize) -> io::Result<u32> {
        // Relaxed: the counter publishes no data.
        let slot = self.next.fetch_add(1, Relaxed);
        self.set(slot, start, len).map(|()| slot)
    }

    /// Releases the pages of a slot. May be called in any thread.
    pub(crate) fn deregister(&self, slot: u32) -> io::Result<()> {
        self.set(slot, 0, 0)
    }

    fn set(&self, slot: u32, start: usize, len: usize) -> io::Result<()> {
        if slot >= SLOTS {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let buffer = libc::iovec {
            iov_base: with_exposed_provenance_mut(start),
            iov_len: len,
        };
        // SAFETY: the kernel pins the range or refuses it (see the module), and `buffer` lives
        // across the call.
        unsafe {
            self.ring
                .submitter()
                .register_buffers_update(slot, &[buffer], None)
        }
    }

    /// Lets the kernel write [`BYTES`] to `address` through the pages of `slot`. Only one thread
    /// may call this.
    pub(crate) fn write(&self, slot: u32, address: usize) -> io::Result<()> {
        let target = with_exposed_provenance_mut(address);
        let slot = u16::try_from(slot).map_err(io::Error::other)?;
        let read = opcode::ReadFixed::new(
            types::Fd(self.source.as_raw_fd()),
            target,
            BYTES.len() as u32,
            slot,
        )
        .build();
        // SAFETY: no other handle of the submission queue exists: only one thread calls `write`,
        // which drops this handle before it returns.
        let mut queue = unsafe { self.ring.submission_shared() };
        // SAFETY: the request writes to the slot's pinned pages only (see the module), and
        // completes before this function returns.
        unsafe { queue.push(&read) }.map_err(io::Error::other)?;
        drop(queue);
        self.ring.submit_and_wait(1)?;
        // SAFETY: no other handle of the completion queue exists, for the same reason.
        let result = unsafe { self.ring.completion_shared() }
            .next()
            .map_or(0, |entry| entry.result());
        if result < 0 {
            return Err(io::Error::from_raw_os_error(-result));
        }
        Ok(())
    }
}
