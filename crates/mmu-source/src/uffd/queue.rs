//! A queue of fixed size from the reader to the teller, without locks and allocations.

use std::sync::atomic::{AtomicU64, Ordering};

const SLOTS: usize = 4096;

/// A queue with one producer and one consumer.
#[derive(Debug)]
pub(super) struct Queue {
    slots: Box<[[AtomicU64; 3]]>,
    written: AtomicU64,
    read: AtomicU64,
    lost: AtomicU64,
    /// How many entries had been lost when the teller last began to invalidate everything.
    told: AtomicU64,
}

impl Queue {
    pub(super) fn new() -> Self {
        let slots = (0..SLOTS)
            .map(|_| [const { AtomicU64::new(0) }; 3])
            .collect();
        Self {
            slots,
            written: AtomicU64::new(0),
            read: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            told: AtomicU64::new(0),
        }
    }

    /// Adds an entry. If the queue is full, counts the entry as lost.
    pub(super) fn push(&self, entry: [u64; 3]) {
        let at = self.written.load(Ordering::Relaxed);
        // ORDER(source-queue-free): Acquire: the consumer has copied the slot. Partner: the store
        // in `advance`.
        if at - self.read.load(Ordering::Acquire) >= SLOTS as u64 {
            // ORDER(source-queue): Release, for the entries before the loss. Partner: the load in
            // `untold`.
            self.lost.fetch_add(1, Ordering::Release);
            return;
        }
        let slot = &self.slots[at as usize % SLOTS];
        slot.iter()
            .zip(entry)
            .for_each(|(word, value)| word.store(value, Ordering::Relaxed));
        // ORDER(source-queue): Release, for the slot. Partner: the load in `peek`.
        self.written.store(at + 1, Ordering::Release);
    }

    /// Returns the oldest entry without removing it.
    pub(super) fn peek(&self) -> Option<[u64; 3]> {
        let at = self.read.load(Ordering::Relaxed);
        // ORDER(source-queue): Acquire, for the slot. Partner: the store in `push`.
        if at == self.written.load(Ordering::Acquire) {
            return None;
        }
        let [a, b, c] = &self.slots[at as usize % SLOTS];
        Some([a, b, c].map(|word| word.load(Ordering::Relaxed)))
    }

    /// Removes the oldest entry. The caller has run its callbacks.
    pub(super) fn advance(&self) {
        // ORDER(source-queue-free): Release: the slot has been copied, and the callbacks have run.
        // Partner: the loads in `push` and `read`.
        self.read
            .store(self.read.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    /// Returns the number of lost entries if the teller has not yet handled all of them.
    pub(super) fn untold(&self) -> Option<u64> {
        // ORDER(source-queue): Acquire: the entries before the loss are visible. Partner: the
        // addition in `push`.
        let lost = self.lost.load(Ordering::Acquire);
        (lost != self.told.load(Ordering::Relaxed)).then_some(lost)
    }

    /// Records that everything was invalidated after `lost` entries had been lost. Further entries
    /// may have been lost since.
    pub(super) fn tell(&self, lost: u64) {
        // ORDER(source-told): Release: the callbacks have run. Partner: the load in `is_told`.
        self.told.store(lost, Ordering::Release);
    }

    /// Tells whether callbacks have run for the first `lost` lost entries.
    pub(super) fn is_told(&self, lost: u64) -> bool {
        // ORDER(source-told): Acquire: the callbacks have run. Partner: the store in `tell`.
        self.told.load(Ordering::Acquire) >= lost
    }

    pub(super) fn written(&self) -> u64 {
        // ORDER(source-queue): Acquire: the entries are in the queue. Partner: the store in `push`.
        self.written.load(Ordering::Acquire)
    }

    pub(super) fn read(&self) -> u64 {
        // ORDER(source-queue-free): Acquire: the callbacks have run. Partner: the store in
        // `advance`.
        self.read.load(Ordering::Acquire)
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_counted_and_the_rest_stays_in_order() {
        let queue = Queue::new();
        (0..SLOTS as u64 + 3).for_each(|number| queue.push([number, 0, 0]));
        assert_eq!(queue.lost(), 3);
        assert_eq!(queue.untold(), Some(3));
        // Another entry is lost while the callbacks for the first three run.
        queue.push([0; 3]);
        queue.tell(3);
        assert!(queue.is_told(3) && !queue.is_told(4));
        assert_eq!(queue.untold(), Some(4), "it is not forgotten");
        queue.tell(4);
        assert_eq!(queue.untold(), None);
        for number in 0..SLOTS as u64 {
            assert_eq!(queue.peek(), Some([number, 0, 0]));
            queue.advance();
        }
        assert_eq!(queue.peek(), None);
        assert_eq!(queue.read(), queue.written());
    }
}
