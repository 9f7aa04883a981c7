//! The reading side of the BPF ring buffer.
//!
//! The kernel's layout: a page with the consumer's position, a page with the producer's, then the
//! data, mapped twice in a row so that a record never wraps. A record has a header of eight bytes:
//! its length with two flags, and a word for the kernel.

use super::sys::{Glance, Progress, Shared};
use crate::page;
use mmu_notifier::{Va, VaRange};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// The producer has reserved the record and is still writing it.
const BUSY: u32 = 1 << 31;
/// The producer has thrown the record away.
const DISCARD: u32 = 1 << 30;
const HEADER: usize = 8;
/// What a record of the program takes: its three words and the header.
const RECORD: u64 = 32;
/// The most events that are looked at in the ring; if there are more, they are taken in.
const GLIMPSE: u64 = 4;

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
        Ok(Self {
            consumer,
            producer,
            page,
            bytes,
        })
    }

    /// What is mapped.
    pub(super) fn mappings(&self) -> [&Shared; 2] {
        [&self.consumer, &self.producer]
    }

    /// What watches look at; they keep the source.
    pub(super) fn glance(&self, header: &Shared, progress: &Progress) -> Glance {
        Glance::new(header, progress, &self.producer, self.bytes)
    }

    /// Takes the oldest record out, unless there is none or it is still being written. Then
    /// `position` says where the next one begins.
    pub(super) fn pop(&mut self, position: &AtomicU64) -> Option<Record> {
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
            let word = |index: usize| {
                self.producer
                    .u64(place + HEADER + 8 * index)
                    .load(Ordering::Relaxed)
            };
            let record = Record {
                start: word(0),
                end: word(1),
                number: word(2),
            };
            let length = HEADER + ((header & !DISCARD) as usize).next_multiple_of(8);
            position.store(at + length as u64, Ordering::Relaxed);
            // ORDER(source-glimpse): Release: the record has been copied, and `position` moved,
            // before the kernel may write over it. Partner: the fence in `glimpse`.
            self.consumer
                .u64(0)
                .store(at + length as u64, Ordering::Release);
            if header & DISCARD == 0 {
                return Some(record);
            }
        }
    }
}

/// The pages of an event. What cannot be a range of pages is everything.
pub(super) fn range(start: u64, end: u64) -> VaRange {
    VaRange::covering(Va::new(start), end.wrapping_sub(start)).unwrap_or(VaRange::ALL)
}

/// Whether the few events that were not taken in yet are all outside `range`, or not after `base`;
/// `None` if a look at the ring does not tell.
///
/// It takes no lock, and touches one page more than the look at the generation. Taking one event in
/// touches seven. It reads the number of every event each time: only if the events that lie there
/// are exactly those from `marked` to the generation, none of them was lost, and none that was
/// taken in as a loss lies there still.
pub(super) fn glimpse(glance: &Glance, range: VaRange, base: u64) -> Option<bool> {
    // The kernel publishes a record's header by the producer's position, which this does not look
    // at: it relies on the stores of x86-64, which become visible in their order. Elsewhere the
    // number could be seen before the header, and the header of a record that lay there before be
    // taken for this one's.
    if cfg!(not(target_arch = "x86_64")) {
        return None;
    }
    let progress = glance.progress();
    // ORDER(source-marked): Acquire, for the word of the watch, which is looked at after this.
    let taken = progress.marked.load(Ordering::Acquire);
    let now = glance.generation();
    let few = now.checked_sub(taken).filter(|few| *few <= GLIMPSE)?;
    // Acquire: before the records. The fence below makes sure that it is still so.
    let from = progress.position.load(Ordering::Acquire);
    let mut is_elsewhere = true;
    for at in (0..few).map(|index| from + RECORD * index) {
        let word = |index: u64| glance.record(at + 8 * index);
        let number = word(3).load(Ordering::Relaxed);
        // What lay here before has a number that was taken in long ago: since then the ring has
        // gone round, and no processor keeps its number for so long.
        if number <= taken || number > now {
            return None;
        }
        fence(Ordering::Acquire);
        // ORDER: Acquire, for the record. Partner: the kernel's exchange of the header in
        // `bpf_ringbuf_submit`. The number is there, so it is the header of the same record: it was
        // stored before.
        if word(0).load(Ordering::Acquire) as u32 & (BUSY | DISCARD) != 0 {
            return None;
        }
        let event = self::range(
            word(1).load(Ordering::Relaxed),
            word(2).load(Ordering::Relaxed),
        );
        is_elsewhere &= number <= base || !event.overlaps(range);
    }
    // ORDER(source-glimpse): Acquire fence: the records were read before this look. If nothing has
    // been taken out, the kernel has written over none of them. Partner: the store in `pop`.
    // If weaker, half of a newer record could be taken for the one that was there.
    fence(Ordering::Acquire);
    (progress.position.load(Ordering::Relaxed) == from).then_some(is_elsewhere)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_that_is_no_range_is_everything() {
        assert_eq!(range(0, 0), VaRange::ALL);
        assert_eq!(range(0x2000, 0x1000), VaRange::ALL);
        assert_eq!(range(0x1000, 0x3000).pages(), 2);
    }
}
