//! The consumer of the BPF ring buffer.
//!
//! The kernel's layout: one page with the consumer's position, one with the producer's, then the
//! data, which is mapped twice in a row so that a record never wraps. A record begins with a header
//! of eight bytes: the length with two flag bits, and a word for the kernel.

use super::sys::{Glance, Progress, Shared};
use crate::page;
use mmu_notifier::{Va, VaRange};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// The producer has reserved the record and is still writing it.
const BUSY: u32 = 1 << 31;
/// The producer has discarded the record.
const DISCARD: u32 = 1 << 30;
const HEADER: usize = 8;
/// The size of one of the program's records: its header and three words.
const RECORD: u64 = 32;
/// The largest number of events that `glimpse` examines. If there are more events, they are taken
/// in.
const GLIMPSE: u64 = 4;

/// A record of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) start: u64,
    pub(super) end: u64,
    /// The generation of this event.
    pub(super) number: u64,
}

/// The consumer. Only one thread may read at a time: the caller holds a lock.
#[derive(Debug)]
pub(super) struct Ring {
    consumer: Shared,
    producer: Shared,
    /// The offset of the data from the producer's position.
    page: usize,
    bytes: usize,
}

impl Ring {
    /// Maps a ring of `bytes` bytes, a power of two and at least a page.
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

    /// Returns the two mappings.
    pub(super) fn mappings(&self) -> [&Shared; 2] {
        [&self.consumer, &self.producer]
    }

    /// Returns the words that a watch reads. The watch must keep the source alive.
    pub(super) fn glance(&self, header: &Shared, progress: &Progress) -> Glance {
        Glance::new(header, progress, &self.producer, self.bytes)
    }

    /// Removes the oldest record, at `position`, unless there is none or it is still being written.
    /// Afterwards `position` is the position of the next record.
    ///
    /// The kernel learns that the records before this one were removed, but not yet that this one
    /// was. So the ring never looks empty to the listener's `poll`, and a record that has called
    /// the listener wakes it although another thread takes the record in.
    pub(super) fn pop(&mut self, position: &AtomicU64) -> Option<Record> {
        loop {
            let at = position.load(Ordering::Relaxed);
            // ORDER: Acquire, for the record's header. Partner: the kernel's release store in
            // `bpf_ringbuf_reserve`.
            if at == self.producer.u64(0).load(Ordering::Acquire) {
                return None;
            }
            let place = self.page + (at as usize & (self.bytes - 1));
            // ORDER: Acquire, for the record's content. Partner: the kernel's exchange of the
            // header in `bpf_ringbuf_submit`.
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
            // ORDER(source-glimpse): Release: the records before `at` have been copied and
            // `position` has moved before the kernel may overwrite them. Partner: the fence in
            // `glimpse`.
            self.consumer.u64(0).store(at, Ordering::Release);
            if header & DISCARD == 0 {
                return Some(record);
            }
        }
    }
}

impl Ring {
    /// Tells the kernel that all records before `position` were removed, so that `poll` waits for
    /// the next one. For the listener, before it allows the program to call it: a record that is
    /// removed after that leaves the ring readable.
    pub(super) fn release(&mut self, position: &AtomicU64) {
        // ORDER(source-glimpse, source-called): Release, as in `pop`, and before the store of
        // `awake` in `wants_a_call`.
        self.consumer
            .u64(0)
            .store(position.load(Ordering::Relaxed), Ordering::Release);
    }
}

/// Returns the pages of an event. If the event does not form a range, returns everything.
pub(super) fn range(start: u64, end: u64) -> VaRange {
    VaRange::covering(Va::new(start), end.wrapping_sub(start)).unwrap_or(VaRange::ALL)
}

/// Examines the events that have not been taken in yet. Returns true if no event after `base`
/// touches `range`, false if one does, and `None` if reading the ring cannot decide that.
///
/// This function takes no lock, and touches one page more than a load of the generation. (Taking in
/// one event touches seven pages.) The function decides only if the records in the ring are exactly
/// those after `marked`, up to the generation. So it checks the number of each record. A lost
/// event, or a record that was already taken in as part of a loss, makes the numbers differ.
pub(super) fn glimpse(glance: &Glance, range: VaRange, base: u64) -> Option<bool> {
    // The kernel publishes a record's header by the producer's position, which this function does
    // not load. Instead the function relies on x86-64, where stores become visible in program
    // order. On another processor this thread could see the number of a new record before its
    // header, and take the header of an older record for that of the new one.
    if cfg!(not(target_arch = "x86_64")) {
        return None;
    }
    let progress = glance.progress();
    // ORDER(source-marked): Acquire, for the word of the watch, which is loaded after this.
    let taken = progress.marked.load(Ordering::Acquire);
    let now = glance.generation();
    let few = now.checked_sub(taken).filter(|few| *few <= GLIMPSE)?;
    // Acquire: this load comes before the loads of the records. The fence below checks that the
    // position has not moved meanwhile.
    let from = progress.position.load(Ordering::Acquire);
    let mut is_elsewhere = true;
    for at in (0..few).map(|index| from + RECORD * index) {
        let word = |index: u64| glance.record(at + 8 * index);
        let number = word(3).load(Ordering::Relaxed);
        // An older record at this place has a number that was taken in long ago: the ring has
        // wrapped around since then, and no processor delays a record for so long.
        if number <= taken || number > now {
            return None;
        }
        fence(Ordering::Acquire);
        // ORDER: Acquire, for the record's content. Partner: the kernel's exchange of the header in
        // `bpf_ringbuf_submit`. The number is visible, so this is the header of the same record:
        // the header was stored before the number.
        if word(0).load(Ordering::Acquire) as u32 & (BUSY | DISCARD) != 0 {
            return None;
        }
        let event = self::range(
            word(1).load(Ordering::Relaxed),
            word(2).load(Ordering::Relaxed),
        );
        is_elsewhere &= number <= base || !event.overlaps(range);
    }
    // ORDER(source-glimpse): Acquire fence: the records were read before the load below. If
    // `position` has not moved, no record has been removed, so the kernel has not overwritten any
    // of them. Partner: the store in `pop`. If weaker, this thread could read half of a newer
    // record.
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
