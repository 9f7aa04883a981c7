//! Changes of which UCX learns at its next look-up.
//!
//! A change that is reported while a thread forks waits here until the fork is over
//! (`ucx::fork`). With UCX 1.14 to 1.16 each change that the `kernel` source reports waits here.
//!
//! In these versions UCP's look-up reads the page table without the cache's lock, which
//! `ucm_vm_munmap` takes to remove regions. So UCX relies on the program: memory must change in the
//! thread that looks up. The callbacks of the `kernel` source can run in any thread. So the changes
//! that this source reports wait here until a thread of the program looks up. (From 1.17 on, for
//! UCP's caches, `ucm_vm_munmap` only queues the range, and may be called by any thread.)

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// The most ranges that wait. The next one replaces them all by a range of all memory.
const MOST: usize = 1024;

/// Starts and lengths of changed ranges.
///
/// The list has room for [`MOST`] from the beginning and never grows, because a callback must not
/// allocate. A callback must not wait for UCX either. So a thread that reports takes the ranges out
/// of the list first, into the second one, and holds only the second lock while it reports.
#[derive(Debug)]
pub(crate) struct Late {
    list: Mutex<Vec<(usize, usize)>>,
    reporting: Mutex<Vec<(usize, usize)>>,
}

/// See [`is_waiting`].
static IS_WAITING: AtomicBool = AtomicBool::new(false);

/// Whether a change may be waiting. False only after all changes were reported.
#[inline]
pub(crate) fn is_waiting() -> bool {
    // ORDER(dropin-late): Acquire, for the reports. Partner: `Late::report`.
    IS_WAITING.load(Ordering::Acquire)
}

/// Makes look-ups take their slow path, although no change may be waiting, until a thread calls
/// [`Late::report`].
pub(crate) fn stop_fast_paths() {
    IS_WAITING.store(true, Ordering::Relaxed);
}

impl Late {
    pub(crate) fn new() -> Late {
        let list = || Mutex::new(Vec::with_capacity(MOST));
        Late {
            list: list(),
            reporting: list(),
        }
    }

    pub(crate) fn add(&self, start: usize, len: usize) {
        let mut ranges = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if ranges.len() == MOST {
            ranges.clear();
            ranges.push((0, usize::MAX));
        } else {
            ranges.push((start, len));
        }
        IS_WAITING.store(true, Ordering::Relaxed);
    }

    /// Reports the waiting changes. Another thread that calls this meanwhile waits: the look-up of
    /// that thread must not continue before the changes are reported.
    pub(crate) fn report(&self, mut report: impl FnMut(usize, usize)) {
        let mut ranges = self
            .reporting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let list = || self.list.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut *list(), &mut *ranges);
        for (start, len) in ranges.drain(..) {
            report(start, len);
        }
        // With the list locked: a change that is added between the two lines would be forgotten.
        let list = list();
        if list.is_empty() {
            // ORDER(dropin-late): Release, after the reports: a thread that reads false does not
            // call this function, and must see the reports' effect. Partner: `is_waiting`.
            IS_WAITING.store(false, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    /// The tests share [`IS_WAITING`].
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn a_change_that_comes_while_others_are_reported_is_not_forgotten() {
        const CHANGES: usize = 20_000;
        let _alone = ALONE.lock();
        let (late, reported) = (Late::new(), AtomicUsize::new(0));
        let is_over = AtomicBool::new(false);
        let forgotten = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    late.report(|change, _| reported.store(change, Ordering::Relaxed));
                }
            });
            let is_forgotten = |change: &usize| {
                late.add(*change, 1);
                let is_reported = || reported.load(Ordering::Acquire) == *change;
                while is_waiting() && !is_reported() {
                    std::hint::spin_loop();
                }
                // Once no change is waiting, `change` was reported.
                !is_reported()
            };
            let forgotten = (1..=CHANGES).find(is_forgotten);
            is_over.store(true, Ordering::Relaxed);
            forgotten
        });
        assert_eq!(forgotten, None);
    }

    #[test]
    fn every_change_is_reported_once_and_none_is_lost_when_there_are_many() {
        let _alone = ALONE.lock();
        let late = Late::new();
        let reported = || {
            let mut ranges = Vec::new();
            late.report(|start, len| ranges.push((start, len)));
            ranges
        };
        late.add(1, 2);
        late.add(3, 4);
        assert_eq!(reported(), [(1, 2), (3, 4)]);
        assert_eq!(reported(), []);
        (0..=MOST).for_each(|start| late.add(start, 1));
        late.add(7, 1);
        assert_eq!(reported(), [(0, usize::MAX), (7, 1)]);
    }
}
