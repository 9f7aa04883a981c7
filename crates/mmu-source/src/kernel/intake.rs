//! Taking records in: out of the ring, before the question of a caller is answered.
//!
//! ```text
//!   the program ── ring ──> take in ──┬── watches are marked ───────── marked
//!                                     └── queue ──> callbacks run ──── handled
//! ```
//!
//! Taking in is short: it marks words and moves records into a queue of fixed size. It runs no
//! callback, allocates nothing and frees nothing, so a thread that asks a
//! [`Watch`](crate::Watch) can do it in the middle of `free`. Handing on (`tell.rs`) runs callbacks
//! and has a lock of its own.
//!
//! The generation is counted before the record is there, and processors overtake each other:
//! records come out of order, and `marked` moves on when none before is missing.

use super::ring::{Record, Ring, range};
use crate::watch_table::Table;
use mmu_notifier::VaRange;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

/// How far records may be out of order, which takes one processor for each that overtakes.
const WINDOW: u64 = 4096;
/// How many records wait for callbacks at most.
const QUEUE: usize = 8192;

/// A record on its way to subscribers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) range: VaRange,
    /// When this one has been handed on, all generations up to here have.
    pub(super) upto: u64,
    /// Whether it stands for records that were lost.
    pub(super) is_loss: bool,
}

/// What the program counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Words<'a> {
    pub(super) generation: &'a AtomicU64,
    pub(super) lost: &'a AtomicU64,
    /// All generations up to this one have been taken in.
    pub(super) marked: &'a AtomicU64,
    /// Where the oldest record in the ring begins.
    pub(super) position: &'a AtomicU64,
}

/// The consumer of the ring, under a lock.
///
/// # Invariants
/// Every generation below `next` has been taken in, or everything has been marked since it was
/// counted. `done` has those from `next` on that were, by their number modulo [`WINDOW`].
#[derive(Debug)]
pub(super) struct Intake {
    pub(super) ring: Ring,
    pub(super) watches: Table,
    queue: VecDeque<Told>,
    next: u64,
    done: Vec<u64>,
    /// The program's count of losses, as far as it was seen.
    lost: u64,
    /// How often the queue was full.
    pub(super) overflows: u64,
}

impl Intake {
    /// Starts behind `generation`: the changes up to it are not told.
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

    /// Takes in what is there, until all generations up to `target` have been.
    ///
    /// Without a target it would not end while others change memory faster.
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

    /// Marks what a record tells of, and queues it; false if that does not fit.
    fn take(&mut self, record: &Record) -> bool {
        let range = range(record.start, record.end);
        self.watches.touch(range, record.number);
        self.mark(record.number) && self.push(range)
    }

    /// Takes the oldest record for subscribers.
    pub(super) fn pop(&mut self) -> Option<Told> {
        self.queue.pop_front()
    }

    /// Queues a range; false if there is no room.
    fn push(&mut self, range: VaRange) -> bool {
        let upto = self.next - 1;
        if let Some(last) = self
            .queue
            .back_mut()
            .filter(|last| last.range.covers(range))
        {
            // Both have been counted, and the callback of neither has run: one does for both.
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
        // ORDER(source-lost): Acquire: the look at the generation in `everything` comes after this.
        // Partner: the program, which counts the generation first. If weaker, the lost event itself
        // could be left waiting.
        let lost = words.lost.load(Ordering::Acquire);
        if lost != self.lost {
            self.everything(words);
            self.lost = lost;
        }
    }

    /// Marks everything, which does for every change up to now. Their records leave the ring: in
    /// one that stays full, every later change would be lost, too.
    pub(super) fn everything(&mut self, words: Words<'_>) {
        // ORDER(source-lost): Acquire, as the client's own look: what is counted here began before
        // the marks that follow.
        let now = words.generation.load(Ordering::Acquire);
        self.watches.touch_all(now);
        // INVARIANT: all up to `now` are done. Those that were marked beyond stay marked.
        if now - self.next.min(now) >= WINDOW {
            self.done.fill(0);
            self.next = now + 1;
        }
        while self.next <= now {
            self.unmark(self.next);
            self.next += 1;
        }
        self.skip_done();
        // What waits is a part of everything.
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
                // As in `run`: without an end it would not end while others change memory faster.
                break;
            }
        }
        self.publish(words);
    }

    /// Marks a generation as taken in; false if it is out of the window.
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
        // ORDER(source-marked): Release: the words of the watches are marked. Partner: the loads in
        // `Glance::is_current` and `Inner::marked`. If weaker, a watch is taken for valid whose
        // word is about to be marked.
        words.marked.store(self.next - 1, Ordering::Release);
    }
}
