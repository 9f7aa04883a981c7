//! The state of a domain, and its lifetime.
//!
//! ```text
//!   Srcu ── handle ──> a page of 4 KiB, never unmapped
//!                      ┌─────────────────────────────────────────────────────────────────┐
//!                      │ index, waiting[2], table        loaded by readers               │
//!                      │ updater: seq, gp, event, batch  written by grace periods        │
//!                      │ pending: queue, scheduled, ...  written by callers of `call`    │
//!                      │ slots of the first 28 threads   each written by its own thread  │
//!                      └─────────────────────────────────────────────────────────────────┘
//! ```
//!
//! 1. The first use of an `Srcu` takes a state from the pool, or makes one in a new page. The
//!    state's count is then one, and the handle holds it.
//! 2. A thread that gives the domain work (see `reclaimer`) puts the state into the inbox, which
//!    holds a count. The reclaimer takes the state out, moves the callbacks into the batch if the
//!    batch is empty, and releases the inbox's count. The batch holds a count while it is not
//!    empty.
//! 3. The drop of the `Srcu` releases the handle's count. When the count reaches zero, the state
//!    returns to the pool.
//!
//! # Safety
//! # Invariants
//! * The count of a state is the sum of: one for its `Srcu`, one while it is in the reclaimer's
//!   inbox or turn, one while its batch holds callbacks, one for each `call_raw_dropping` that is
//!   running. At zero the state is recycled. No reference to it is left then (module docs of `raw`,
//!   facts 1 and 2).
//! * Only the thread that acts as the reclaimer accesses `batch`, or the only thread of a forked
//!   child.

pub(crate) mod inbox;
#[cfg(not(mmun_loom))]
pub(super) mod pool;
pub(super) mod progress;

#[cfg(mmun_loom)]
use super::barrier;
use super::callback::{Batch, Head};
use super::event::Event;
use super::lock::Lock;
use super::table::Table;
use crate::sync::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use progress::Gp;
use std::fmt;
use std::ptr;

/// Makes functions `const`, except in models, because loom makes atomics at run time.
macro_rules! at_compile_time_too {
    ($(#[$attribute:meta])* fn $($rest:tt)*) => {
        $(#[$attribute])* #[cfg(not(mmun_loom))] const fn $($rest)*
        $(#[$attribute])* #[cfg(mmun_loom)] fn $($rest)*
    };
}

/// A domain. The fields are grouped in pairs of cache lines: the fields that readers load, those
/// that grace periods write, and those that producers of callbacks write.
#[repr(C, align(128))]
pub(crate) struct State {
    /// The bank for new sections, and [`barrier::FULL_FENCES`].
    pub(crate) index: AtomicUsize,
    /// For each bank, who must be notified when one of its sections ends: see `grace`.
    pub(crate) waiting: [AtomicU32; 2],
    pub(crate) table: Table,
    refs: AtomicUsize,
    /// Whether the `Srcu` still exists.
    pub(super) owned: AtomicBool,
    #[cfg(not(mmun_loom))]
    links: pool::Links,
    pub(crate) updater: Updater,
    pub(crate) pending: Pending,
    #[cfg(mmun_loom)]
    pub(crate) inbox: inbox::Inbox,
}

/// The state of grace periods, and the batch that waits for one.
#[repr(align(128))]
pub(crate) struct Updater {
    /// Twice the number of grace periods that have ended, plus one while another is in progress.
    pub(crate) seq: AtomicU64,
    pub(in crate::raw) gp: Lock<Gp>,
    /// A thread advances it when a waiting updater should check again.
    pub(crate) event: Event,
    /// This field is here because the reclaimer writes it for every callback, and the producers
    /// need a cache line of their own.
    pub(super) batch: Batch,
}

/// The work for the reclaimer.
#[repr(align(128))]
pub(crate) struct Pending {
    /// Callbacks, the newest first.
    pub(crate) queue: AtomicPtr<Head>,
    /// The value of `seq` at which the last grace period requested by `start_poll` has ended.
    pub(crate) polled: AtomicU64,
    /// The number of callbacks that panicked.
    pub(crate) panics: AtomicU64,
    /// Whether the domain is in the reclaimer's inbox, or was just taken from it.
    pub(crate) scheduled: AtomicBool,
    /// Whether the batch holds callbacks or is about to.
    pub(crate) busy: AtomicBool,
    /// The next domain in the inbox.
    pub(super) next: AtomicPtr<State>,
}

// SAFETY: all fields are atomics, locks and events, except `links` and `batch`. The pool's lock
// guards `links`. By the invariant one thread at a time uses `batch`. The callbacks of the batch
// may run on any thread, because `call` requires `Send`, and the callers of `call_raw` promise so.
unsafe impl Sync for State {}
// SAFETY: as for `Sync`. No field is bound to a thread.
unsafe impl Send for State {}

impl State {
    at_compile_time_too! {
        fn with(
            index: usize,
            table: Table,
            #[cfg(not(mmun_loom))] links: pool::Links,
        ) -> Self {
            Self {
                index: AtomicUsize::new(index),
                waiting: [AtomicU32::new(0), AtomicU32::new(0)],
                table,
                refs: AtomicUsize::new(1),
                owned: AtomicBool::new(true),
                #[cfg(not(mmun_loom))]
                links,
                updater: Updater {
                    seq: AtomicU64::new(0),
                    gp: Lock::new(Gp::IDLE),
                    event: Event::new(),
                    batch: Batch::EMPTY,
                },
                pending: Pending {
                    queue: AtomicPtr::new(ptr::null_mut()),
                    polled: AtomicU64::new(0),
                    panics: AtomicU64::new(0),
                    scheduled: AtomicBool::new(false),
                    busy: AtomicBool::new(false),
                    next: AtomicPtr::new(ptr::null_mut()),
                },
                #[cfg(mmun_loom)]
                inbox: inbox::Inbox::new(),
            }
        }
    }

    #[cfg(mmun_loom)]
    pub(super) fn create() -> *mut State {
        Box::into_raw(Box::new(Self::with(barrier::mode(), Table::empty())))
    }

    pub(crate) fn retain(&self) {
        // Relaxed: the caller already holds a count.
        self.refs.fetch_add(1, Ordering::Relaxed);
    }

    /// Releases one count.
    ///
    /// # Safety
    /// The caller owns that count. Afterwards the caller uses the state only if another count keeps
    /// it alive.
    pub(crate) unsafe fn release(this: *const State) {
        // SAFETY: the state must be alive, which the caller's count guarantees.
        let refs = unsafe { &(*this).refs };
        // ORDER(srcu-refs): AcqRel: all uses by other holders come before the recycling by the last
        // one. Partner: itself, in the other threads.
        if refs.fetch_sub(1, Ordering::AcqRel) == 1 {
            // SAFETY: `recycle` needs the last count to be released, which it was.
            unsafe { recycle(this.cast_mut()) };
        }
    }

    /// Tells whether any count is held. Only useful in the child of a fork, which has one thread.
    #[cfg(not(mmun_loom))]
    pub(super) fn is_used(&self) -> bool {
        self.refs.load(Ordering::Relaxed) != 0
    }

    #[cfg(not(mmun_loom))]
    pub(super) fn set_refs(&self, refs: usize) {
        self.refs.store(refs, Ordering::Relaxed);
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("bank", &(self.index.load(Ordering::Relaxed) & 1))
            .field("seq", &self.updater.seq.load(Ordering::Relaxed))
            .field("waiting", &self.waiting)
            .field("busy", &self.pending.busy.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

#[cfg(mmun_loom)]
unsafe fn recycle(state: *mut State) {
    // SAFETY: `from_raw` needs a box that is not in use. `create` made it, and the last count was
    // released.
    drop(unsafe { Box::from_raw(state) });
}

#[cfg(not(mmun_loom))]
use pool::recycle;
