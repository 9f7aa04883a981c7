//! Takes records out of the ring. `settle` does so before it returns if there are new records. The
//! check of a watch does so if it cannot decide by reading the ring.
//!
//! ```text
//!   the program ── ring ──> take in ──┬── watches are marked ───────── marked
//!                                     └── queue ──> callbacks run ──── handled
//! ```
//!
//! To take in a record means to mark the words of the watches that the record touches, and to move
//! the record into a queue of fixed size. Taking in runs no callback, allocates nothing and frees
//! nothing. So a thread that checks a [`Watch`](crate::Watch) can take in records in the middle of
//! `free`. Passing records to subscribers (`tell.rs`) runs callbacks and has a lock of its own.
//!
//! The program increments the generation before it writes the record, and another processor may
//! write its own record in between. So records arrive out of order. `marked` advances to a
//! generation only when all generations up to it have been taken in.

use super::ring::{Record, Ring, range};
use crate::watch_table::Table;
use mmu_notifier::VaRange;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

/// How far records may be out of order. Each record that overtakes a second record moves the second
/// one back by one position.
const WINDOW: u64 = 4096;
/// The largest number of records that wait for callbacks.
const QUEUE: usize = 8192;

/// A record that waits for callbacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) range: VaRange,
    /// When the callbacks of this record have run, so have those of all generations up to `upto`.
    pub(super) upto: u64,
    /// Whether this record stands for lost records.
    pub(super) is_loss: bool,
}

/// The counters of the program and of the intake.
#[derive(Debug, Clone, Copy)]
pub(super) struct Words<'a> {
    pub(super) generation: &'a AtomicU64,
    pub(super) lost: &'a AtomicU64,
    /// All generations up to `marked` have been taken in.
    pub(super) marked: &'a AtomicU64,
    /// The position of the oldest record in the ring.
    pub(super) position: &'a AtomicU64,
}

/// The consumer of the ring, under a lock.
///
/// # Invariants
/// Every generation below `next` either has been taken in, or was followed by a mark of everything.
/// Bit `n % WINDOW` of `done` is set if the generation `n`, at or above `next`, has been taken in.
#[derive(Debug)]
pub(super) struct Intake {
    pub(super) ring: Ring,
    pub(super) watches: Table,
    queue: VecDeque<Told>,
    next: u64,
    done: Vec<u64>,
    /// The last value of the program's count of losses that the intake has seen.
    lost: u64,
    /// How often the queue was full.
    pub(super) overflows: u64,
}

impl Intake {
    /// Starts after `generation`: earlier changes are not reported.
    pub(super) fn new(ring: Ring, generation: u64) -> Self {
        Self {
            ring,
            watches: Table::with_room(64),
            queue: VecDeque::with_capacity(QUEUE),
            next: generation + 1,
            done: vec![0; (WINDOW / 64) as usize],
            lost: 0,
            overflows: 0,
        }
    }

    /// Takes in the records that are there, until all generations up to `target` have been taken
    /// in.
    ///
    /// Without `target` the loop would not end while others write records faster than it takes them
    /// in.
    pub(super) fn run(&mut self, words: Words<'_>, target: u64) {
        self.look_for_losses(words);
        while self.next <= target {
            let Some(record) = self.ring.pop(words.position) else {
                break;
            };
            if !self.take(&record) {
                self.everything(words);
            }
            self.publish(words);
        }
        if self.next <= target {
            self.look_for_losses(words);
        }
    }

    /// Marks the watches that a record touches, and queues the record. Returns false if the record
    /// lies outside the window, or if the queue is full.
    fn take(&mut self, record: &Record) -> bool {
        let range = range(record.start, record.end);
        self.watches.touch(range, record.number);
        self.mark(record.number) && self.push(range)
    }

    /// Returns the oldest record that waits for callbacks.
    pub(super) fn pop(&mut self) -> Option<Told> {
        self.queue.pop_front()
    }

    /// Queues a range, unless the last queued range covers it. Returns false if the queue is full.
    fn push(&mut self, range: VaRange) -> bool {
        let upto = self.next - 1;
        if let Some(last) = self
            .queue
            .back_mut()
            .filter(|last| last.range.covers(range))
        {
            // Both changes have been counted, and the callback of neither has run. So one callback
            // serves both.
            last.upto = upto;
            return true;
        }
        if self.queue.len() == QUEUE {
            self.overflows += 1;
            return false;
        }
        self.queue.push_back(Told {
            range,
            upto,
            is_loss: false,
        });
        true
    }

    fn look_for_losses(&mut self, words: Words<'_>) {
        // ORDER(source-lost): Acquire: the load of the generation in `everything` comes after this
        // load. Partner: the program, which counts the generation before the loss. If weaker,
        // `everything` could miss the generation of the lost event.
        let lost = words.lost.load(Ordering::Acquire);
        if lost != self.lost {
            self.everything(words);
            self.lost = lost;
        }
    }

    /// Marks all watches and queues the range of all addresses, for every change up to now. Removes
    /// the records of these changes from the ring: if the ring stayed full, every later change
    /// would be lost too.
    pub(super) fn everything(&mut self, words: Words<'_>) {
        // ORDER(source-lost): Acquire, like a client's own load: a change counted in `now` began
        // before the marks below.
        let now = words.generation.load(Ordering::Acquire);
        self.watches.touch_all(now);
        // INVARIANT: all generations up to `now` are done. Generations beyond `now` that were done
        // stay done.
        if now - self.next.min(now) >= WINDOW {
            self.done.fill(0);
            self.next = now + 1;
        }
        while self.next <= now {
            self.unmark(self.next);
            self.next += 1;
        }
        self.skip_done();
        // Everything includes the queued ranges.
        self.queue.clear();
        self.queue.push_back(Told {
            range: VaRange::ALL,
            upto: self.next - 1,
            is_loss: true,
        });
        while let Some(record) = self.ring.pop(words.position) {
            if record.number > now {
                if !self.take(&record) {
                    return self.everything(words);
                }
                // As in `run`: otherwise the loop would not end while others write records faster
                // than it takes them in.
                break;
            }
        }
        self.publish(words);
    }

    /// Records that a generation has been taken in. Returns false if it lies outside the window.
    fn mark(&mut self, number: u64) -> bool {
        if number >= self.next {
            if number - self.next >= WINDOW {
                return false;
            }
            self.done[(number % WINDOW / 64) as usize] |= 1 << (number % 64);
            self.skip_done();
        }
        true
    }

    fn unmark(&mut self, number: u64) -> bool {
        let word = &mut self.done[(number % WINDOW / 64) as usize];
        let bit = 1 << (number % 64);
        let was = *word & bit != 0;
        *word &= !bit;
        was
    }

    fn skip_done(&mut self) {
        while self.unmark(self.next) {
            self.next += 1;
        }
    }

    fn publish(&self, words: Words<'_>) {
        // ORDER(source-marked): Release: the words of the watches are marked before this store.
        // Partner: the loads in `Glance::is_current`, `glimpse` and `Inner::marked`. If weaker, a
        // client could consider a watch valid whose word is about to be marked.
        words.marked.store(self.next - 1, Ordering::Release);
    }
}
