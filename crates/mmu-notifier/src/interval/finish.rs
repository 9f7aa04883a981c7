//! The second pass of an interval's invalidation.

use crate::Mm;
use std::fmt;

/// What an interval's callback leaves to be done after all the others have been called.
///
/// Making one allocates, and when it has run it is freed, in the thread that opened the bracket. So it is for address spaces whose
/// brackets no allocator opens; under the `hook` source use none.
///
/// # Source
/// `struct mmu_interval_notifier_finish`, proposed in 2026. Differs: it is a closure, so it cannot be used twice.
pub struct Finish(Box<Pass>);

struct Pass {
    next: Option<Finish>,
    run: Box<dyn FnOnce() + Send>,
}

impl Finish {
    /// Makes a second pass that runs `run`.
    pub fn new(run: impl FnOnce() + Send + 'static) -> Self {
        Self(Box::new(Pass { next: None, run: Box::new(run) }))
    }
}

impl fmt::Debug for Finish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Finish").finish_non_exhaustive()
    }
}

/// The second passes of one invalidation, the latest in front.
pub(super) struct Finishes(Option<Finish>);

impl Finishes {
    pub(super) fn none() -> Self {
        Self(None)
    }

    pub(super) fn push(&mut self, finish: Option<Finish>) {
        if let Some(mut finish) = finish {
            finish.0.next = self.0.take();
            self.0 = Some(finish);
        }
    }

    /// Runs them in the order in which they came.
    pub(super) fn run(self, mm: &Mm) {
        let (mut latest, mut first) = (self.0, None);
        while let Some(mut finish) = latest {
            latest = finish.0.next.take();
            finish.0.next = first;
            first = Some(finish);
        }
        while let Some(mut finish) = first {
            first = finish.0.next.take();
            mm.catching(finish.0.run);
        }
    }
}
