//! The reading side of the BPF ring buffer.
//!
//! The kernel's layout: a page with the consumer's position, a page with the producer's, then the
//! data, mapped twice in a row so that a record never wraps. A record has a header of eight bytes:
//! its length with two flags, and a word for the kernel.

use super::sys::Shared;
use crate::page;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

/// The producer has reserved the record and is still writing it.
const BUSY: u32 = 1 << 31;
/// The producer has thrown the record away.
const DISCARD: u32 = 1 << 30;
const HEADER: usize = 8;

/// What the program wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) start: u64,
    pub(super) end: u64,
    /// The generation that this event made.
    pub(super) number: u64,
}

/// One reader at a time: the caller holds a lock.
#[derive(Debug)]
pub(super) struct Ring {
    consumer: Shared,
    producer: Shared,
    /// The data begins so far behind the producer's position.
    page: usize,
    bytes: usize,
}

impl Ring {
    /// Maps a ring of `bytes`, a power of two and at least a page.
    pub(super) fn new(map: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        let page = page::size() as usize;
        let consumer = Shared::map(map, 0, page, true)?;
        let producer = Shared::map(map, page, page + 2 * bytes, false)?;
        Ok(Self { consumer, producer, page, bytes })
    }

    /// What is mapped.
    pub(super) fn mappings(&self) -> [&Shared; 2] {
        [&self.consumer, &self.producer]
    }

    /// Takes the oldest record out, unless there is none or it is still being written.
    pub(super) fn pop(&mut self) -> Option<Record> {
        loop {
            let at = self.consumer.u64(0).load(Ordering::Relaxed);
            // ORDER: Acquire, for the record's header. Partner: the kernel's release store in
            // `bpf_ringbuf_reserve`.
            if at == self.producer.u64(0).load(Ordering::Acquire) {
                return None;
            }
            let place = self.page + (at as usize & (self.bytes - 1));
            // ORDER: Acquire, for the record itself. Partner: the kernel's exchange of the header
            // in `bpf_ringbuf_submit`.
            let header = self.producer.u32(place).load(Ordering::Acquire);
            if header & BUSY != 0 {
                return None;
            }
            let word = |index: usize| self.producer.u64(place + HEADER + 8 * index).load(Ordering::Relaxed);
            let record = Record { start: word(0), end: word(1), number: word(2) };
            let length = HEADER + ((header & !DISCARD) as usize).next_multiple_of(8);
            // ORDER: Release: the record has been copied before the kernel may write over it.
            self.consumer.u64(0).store(at + length as u64, Ordering::Release);
            if header & DISCARD == 0 {
                return Some(record);
            }
        }
    }
}
