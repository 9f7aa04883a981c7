//! Changes that wait for a look-up, for UCX 1.14 to 1.16.
//!
//! In these versions UCP's look-up reads the page table without the cache's lock, which
//! `ucm_vm_munmap` takes to remove regions. UCX relies on its users here: memory changes in the
//! thread that looks up. The `kernel` source learns of changes in a thread of its own, so its
//! changes wait here until a thread of the program looks up. (From 1.17 on `ucm_vm_munmap` only
//! queues the range, and may be called by any thread.)

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// With more ranges than these, all memory counts as changed.
const MOST: usize = 1024;

/// Starts and lengths of changed ranges. The list never grows: an allocator that changes memory
/// under the lock would be reported here.
#[derive(Debug)]
pub(crate) struct Late(Mutex<Vec<(usize, usize)>>);

/// Whether a change may be waiting.
static IS_WAITING: AtomicBool = AtomicBool::new(false);

/// Whether a change may be waiting. False only after all are reported.
#[inline]
pub(crate) fn is_waiting() -> bool {
    // ORDER(dropin-late): Acquire, for the reports. Partner: `Late::report`.
    IS_WAITING.load(Ordering::Acquire)
}

impl Late {
    pub(crate) fn new() -> Late {
        Late(Mutex::new(Vec::with_capacity(MOST)))
    }

    pub(crate) fn add(&self, start: usize, len: usize) {
        let mut ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ranges.len() == MOST {
            ranges.clear();
            ranges.push((0, usize::MAX));
        } else {
            ranges.push((start, len));
        }
        IS_WAITING.store(true, Ordering::Relaxed);
    }

    /// Reports the waiting changes. Another thread that calls this meanwhile waits, because its
    /// look-up must not continue before they are reported.
    pub(crate) fn report(&self, mut report: impl FnMut(usize, usize)) {
        let mut ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (start, len) in ranges.drain(..) {
            report(start, len);
        }
        // ORDER(dropin-late): Release, after the reports: a thread that reads false does not wait
        // for them. Partner: `is_waiting`.
        IS_WAITING.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_is_reported_once_and_none_is_lost_when_there_are_many() {
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
