//! Handing the records on, in order, and knowing up to where that has been done.

use super::ring::Ring;
use crate::current_mm::current_ref;
use mmu_notifier::{Event, Va, VaRange};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// How far records may be out of order, which takes one processor for each that overtakes.
const WINDOW: u64 = 4096;

thread_local! {
    /// Whether this thread is handing on a record, so that a callback of it cannot wait for itself.
    static DRAINING: Cell<bool> = const { Cell::new(false) };
}

/// Whether the caller is a callback that `drain` runs.
pub(super) fn is_draining() -> bool {
    DRAINING.get()
}

/// The state that the drainers share under a lock.
///
/// # Invariants
/// Every generation below `next` has been handed on, or everything has been invalidated since it was counted. `done` marks those
/// from `next` on that were, by their number modulo [`WINDOW`].
#[derive(Debug)]
pub(super) struct Drainer {
    pub(super) ring: Ring,
    next: u64,
    done: Vec<u64>,
    lost: u64,
}

/// What the drainer reads of the shared header, and what it tells.
#[derive(Debug, Clone, Copy)]
pub(super) struct Words<'a> {
    pub(super) generation: &'a AtomicU64,
    pub(super) lost: &'a AtomicU64,
    /// All generations up to this one have been handed on.
    pub(super) handled: &'a AtomicU64,
}

impl Drainer {
    pub(super) fn new(ring: Ring) -> Self {
        Self { ring, next: 1, done: vec![0; (WINDOW / 64) as usize], lost: 0 }
    }

    /// Hands on what is there, until all generations up to `target` have been; returns how many ranges, and whether a loss
    /// made it everything.
    ///
    /// Without a target it would not end while others change memory faster than callbacks run, or while the callbacks do.
    pub(super) fn run(&mut self, words: Words<'_>, target: u64) -> (usize, bool) {
        let was = DRAINING.replace(true);
        let mut ranges = 0;
        let mut lost = self.look_for_losses(words);
        while self.next <= target
            && let Some(record) = self.ring.pop()
        {
            drop(current_ref().invalidate(range(record.start, record.end), Event::Clear));
            ranges += 1;
            if !self.mark(record.number) {
                self.everything(words);
                lost = true;
            }
            self.publish(words);
        }
        if self.next <= target {
            lost |= self.look_for_losses(words);
        }
        DRAINING.set(was);
        (ranges, lost)
    }

    fn look_for_losses(&mut self, words: Words<'_>) -> bool {
        // ORDER(source-lost): Acquire: the look at the generation in `everything` comes after this. Partner: the program, which
        // counts the generation first. Weaker, the lost event itself could be left waiting.
        let lost = words.lost.load(Ordering::Acquire);
        if lost == self.lost {
            return false;
        }
        self.everything(words);
        self.lost = lost;
        true
    }

    /// Invalidates everything, which does for every change up to now.
    fn everything(&mut self, words: Words<'_>) {
        // ORDER(source-lost): Acquire, as the client's own look: what is counted here began before the invalidation that follows.
        let now = words.generation.load(Ordering::Acquire);
        drop(current_ref().invalidate(VaRange::ALL, Event::Clear));
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
        self.publish(words);
    }

    /// Marks a generation as handed on; false if it is out of the window.
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
        // ORDER(source-handled): Release: the callbacks have run. Partner: the load in `Kernel::handled`. Weaker, a client takes an
        // entry for good that a callback is about to take out.
        words.handled.store(self.next - 1, Ordering::Release);
    }
}

/// The pages of an event. What cannot be a range of pages is everything.
fn range(start: u64, end: u64) -> VaRange {
    VaRange::covering(Va::new(start), end.wrapping_sub(start)).unwrap_or(VaRange::ALL)
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
