//! The second pass of an interval's invalidation.
//!
//! # Safety
//! A pass that has run is given to `call_raw_dropping` as the pointer of its `Box`. No other code
//! has that pointer, and `free` turns it back into the `Box`.

use crate::mm::context;
use crate::{Mm, lockdep};
use std::fmt;
use std::ptr::NonNull;

/// The part of an interval's invalidation that runs after all intervals have been called.
///
/// Making one allocates, so a callback must not make one: it takes one that was made beforehand, as
/// in the example of [`IntervalOps`](crate::IntervalOps). The values that the closure owns are
/// dropped after a grace period, on the reclaimer thread, because the bracket may have been opened
/// in the middle of `free`. That drop must not block.
///
/// The closure must obey
/// [the rule for callbacks](crate::Notifier#what-a-start-or-end-callback-must-not-do).
///
/// # Source
/// `struct mmu_interval_notifier_finish`, proposed in 2026. Differs: it is a closure, and each is
/// used once.
pub struct Finish(Box<Pass>);

/// # Invariants
/// The head is the first field.
#[repr(C)]
struct Pass {
    head: srcu::Head,
    next: Option<Finish>,
    /// The address space for whose bracket the pass ran.
    mm: Option<Mm>,
    run: Box<dyn FnMut() + Send>,
}

impl Finish {
    /// Makes a second pass that runs `run`, once.
    ///
    /// `run` is [`FnMut`] because the call of an `FnOnce` frees what the closure owns.
    pub fn new(run: impl FnMut() + Send + 'static) -> Self {
        Self(Box::new(Pass {
            head: srcu::Head::new(),
            next: None,
            mm: None,
            run: Box::new(run),
        }))
    }

    /// Runs the pass, and queues its free.
    fn run(mut self, mm: &Mm) {
        let _callback = lockdep::callback::<Self>("run");
        mm.catching(&mut self.0.run);
        self.0.mm = Some(mm.clone());
        let pass = Box::leak(self.0);
        if mm.is_inherited() {
            // `run` has forked, and this is the child. The parent frees the closure.
            return;
        }
        let head: NonNull<srcu::Head> = NonNull::from(pass).cast();
        // SAFETY: `head` must stay valid, and must be queued only once, until `free` runs. The pass
        // was leaked above, and only `free` frees it. `free` may run on any thread, because the
        // closure is `Send`.
        unsafe { mm.subscriptions().srcu().call_raw_dropping(head, free) };
    }
}

/// Frees a pass that has run.
///
/// # Safety
/// `head` must be the head of a leaked pass that no other code uses.
unsafe fn free(head: NonNull<srcu::Head>) {
    let pass: NonNull<Pass> = head.cast();
    // SAFETY: A reference needs a live pass. Only this function frees the pass, below.
    if unsafe { pass.as_ref() }
        .mm
        .as_ref()
        .is_some_and(Mm::is_inherited)
    {
        // The free was queued before a fork, and this is the child. The parent frees the closure.
        return;
    }
    // SAFETY: A `Box` needs the unique pointer that came from one. The pass was leaked, the caller
    // promises that no other code uses it, and the head is its first field.
    let Pass { mm, run, .. } = *unsafe { Box::from_raw(pass.as_ptr()) };
    context::freeing(|| {
        if let Some(mm) = mm {
            mm.catching(|| drop(run));
        }
    });
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

    /// Runs the passes in the order in which they were pushed.
    pub(super) fn run(self, mm: &Mm) {
        let (mut latest, mut first) = (self.0, None);
        while let Some(mut finish) = latest {
            latest = finish.0.next.take();
            finish.0.next = first;
            first = Some(finish);
        }
        while let Some(mut finish) = first {
            first = finish.0.next.take();
            finish.run(mm);
        }
    }
}
