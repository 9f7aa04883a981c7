//! Whether the reclaimer runs, and which thread may start it or act in its place.
//!
//! This is a status and not a lock, because starting a thread allocates, and code that the
//! allocation triggers may ask for the reclaimer again. A lock would then deadlock.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// No thread has tried to start the reclaimer.
pub(super) const NEVER: u8 = 0;
/// A thread is starting the reclaimer, or acts in its place.
pub(super) const HELD: u8 = 1;
/// The reclaimer runs.
pub(super) const RUNNING: u8 = 2;
/// This is the child of a fork and the reclaimer exists only in the parent, or the system gave no
/// thread.
pub(super) const GONE: u8 = 3;

pub(super) struct Status {
    now: AtomicU8,
    /// Set by a thread that wants the reclaimer while another thread holds the status. The holder
    /// then tries again to start the reclaimer.
    wanted: AtomicBool,
}

impl Status {
    pub(super) const fn new() -> Self {
        Self {
            now: AtomicU8::new(NEVER),
            wanted: AtomicBool::new(false),
        }
    }

    /// Returns the status. Relaxed: before a thread acts on it, `holding` checks it again.
    pub(super) fn get(&self) -> u8 {
        self.now.load(Ordering::Relaxed)
    }

    /// For the child of a fork that has no reclaimer.
    pub(super) fn after_fork(&self) {
        if self.get() != NEVER {
            self.now.store(GONE, Ordering::Relaxed);
        }
    }

    /// Calls `try_start`, which returns the new status. If another thread holds the status, makes
    /// that thread try again.
    pub(super) fn start(&self, try_start: impl Fn() -> u8) {
        if self.try_or_want(&try_start) {
            self.serve(try_start);
        }
    }

    /// Tries for the threads that asked while this thread held the status. If another thread holds
    /// the status now, passes the request on.
    pub(super) fn serve(&self, try_start: impl Fn() -> u8) {
        // ORDER(srcu-wanted): partner of `want`.
        while self.wanted.swap(false, Ordering::SeqCst) && self.try_or_want(&try_start) {}
    }

    /// Returns whether this thread has tried. If not, the reclaimer runs, or another thread holds
    /// the status and will see the request.
    fn try_or_want(&self, try_start: &impl Fn() -> u8) -> bool {
        loop {
            if self.holding(try_start) {
                return true;
            }
            if self.want() || self.get() == RUNNING {
                return false;
            }
            // The other thread has given the status back without a reclaimer.
        }
    }

    /// If another thread holds the status, asks that thread to start the reclaimer. Returns true if
    /// that thread will see the request.
    pub(super) fn want(&self) -> bool {
        if self.get() != HELD {
            return false;
        }
        // ORDER(srcu-wanted): SeqCst on both, so one of the two threads sees the other. If this
        // store comes first, the holder's swap sees the request; if the holder's store of the
        // status comes first, this thread sees that the status is free. Partner: the store in
        // `holding` and the swap in `serve`.
        self.wanted.store(true, Ordering::SeqCst);
        self.now.load(Ordering::SeqCst) == HELD
    }

    /// Sets the status to `HELD`, runs `f`, and sets the status that `f` returns. Does nothing and
    /// returns false if the status is `HELD` already, or if the reclaimer is running. After `true`,
    /// the caller must call `serve`.
    pub(super) fn holding(&self, f: impl FnOnce() -> u8) -> bool {
        // ORDER(srcu-stand-in): Acquire, to see the batch as the last holder left it. Partner: the
        // store below.
        let take = |status| {
            self.now
                .compare_exchange(status, HELD, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        };
        if !take(NEVER) && !take(GONE) {
            return false;
        }
        // ORDER(srcu-stand-in): Release; partner above. If `f` started the reclaimer, the start
        // itself lets the reclaimer see the batch.
        // ORDER(srcu-wanted): SeqCst; partner in `want`.
        self.now.store(f(), Ordering::SeqCst);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One thread plays three, because each part of the protocol is a call.
    #[test]
    fn a_request_is_passed_on_to_the_next_thread_that_holds_the_status() {
        let status = Status::new();
        assert!(status.holding(|| GONE), "the first thread gets no thread");
        let is_second = status.holding(|| {
            assert!(status.want(), "the third thread relies on the second");
            status.serve(|| unreachable!("the first thread cannot try"));
            GONE
        });
        assert!(is_second && status.get() == GONE);
        status.serve(|| RUNNING);
        assert_eq!(status.get(), RUNNING, "the second thread tried again");
        status.serve(|| unreachable!("there is no request"));
    }

    #[test]
    fn a_start_within_a_start_is_made_afterwards() {
        let (status, tries) = (Status::new(), AtomicU8::new(0));
        status.start(|| {
            if tries.fetch_add(1, Ordering::Relaxed) == 0 {
                status.start(|| unreachable!("the outer call holds the status"));
                return GONE;
            }
            RUNNING
        });
        assert_eq!((status.get(), tries.into_inner()), (RUNNING, 2));
    }
}
