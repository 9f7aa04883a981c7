//! What a domain is made of, and how long it lives.
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
//! 1. The first use of an `Srcu` takes a state from the pool, or makes its page. Its count is one,
//!    the handle's.
//! 2. A caller that queues a callback puts the state into the inbox, which counts it. The reclaimer
//!    takes it out, moves the callbacks into the batch, which counts it while it is not empty, and
//!    gives up the inbox's count.
//! 3. The drop of the `Srcu` gives up the handle's count. The last count returns the state to the
//!    pool.
//!
//! # Safety
//! # Invariants
//! * A state is counted: one for its `Srcu`, one while it is in the reclaimer's inbox, one while
//!   its batch holds callbacks. At zero it is recycled; no reference is left then (module docs of
//!   `raw`, facts 1 and 2).
//! * `batch` is touched only by the thread that acts as the reclaimer.

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

/// Makes functions `const`, except in models: loom's atomics are made at run time.
macro_rules! at_compile_time_too {
    ($(#[$attribute:meta])* fn $($rest:tt)*) => {
        $(#[$attribute])* #[cfg(not(mmun_loom))] const fn $($rest)*
        $(#[$attribute])* #[cfg(mmun_loom)] fn $($rest)*
    };
}

/// A domain. Lines are in pairs: what readers load, what grace periods write, what producers of
/// callbacks write.
#[repr(C, align(128))]
pub(crate) struct State {
    /// The bank that new sections go to, and [`barrier::FULL_FENCES`].
    pub(crate) index: AtomicUsize,
    /// Who must be told when a section of each bank ends: see `grace`.
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

/// What grace periods are counted with, and what waits for one.
#[repr(align(128))]
pub(crate) struct Updater {
    /// Twice the grace periods that ended, plus one while another is under way.
    pub(crate) seq: AtomicU64,
    pub(in crate::raw) gp: Lock<Gp>,
    /// Moves when a waiting updater should look again.
    pub(crate) event: Event,
    /// Here, since the reclaimer writes it for every callback, and producers want their line for
    /// themselves.
    pub(super) batch: Batch,
}

/// What the reclaimer is asked for.
#[repr(align(128))]
pub(crate) struct Pending {
    /// Callbacks, the newest first.
    pub(crate) queue: AtomicPtr<Head>,
    /// `seq` at which the last grace period asked for by `start_poll` has ended.
    pub(crate) polled: AtomicU64,
    /// Callbacks that panicked.
    pub(crate) panics: AtomicU64,
    /// In the reclaimer's inbox, or just taken from it.
    pub(crate) scheduled: AtomicBool,
    /// The batch holds callbacks, or is about to.
    pub(crate) busy: AtomicBool,
    /// The next one in the inbox.
    pub(super) next: AtomicPtr<State>,
}

// SAFETY: All fields are atomics, locks and events, but `batch`, which one thread uses at a time by
// the invariant, and whose callbacks were given with the duty that they may run on any thread
// (`call` wants `Send`, `call_raw` says so).
unsafe impl Sync for State {}
// SAFETY: As for `Sync`; nothing in it belongs to a thread.
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
        // Relaxed: the caller holds a count already.
        self.refs.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives up one count.
    ///
    /// # Safety
    /// The caller holds the count it gives up, and does not use the state afterwards.
    pub(crate) unsafe fn release(this: *const State) {
        // SAFETY: The state must be alive: the caller's count.
        let refs = unsafe { &(*this).refs };
        // ORDER(srcu-refs): AcqRel: all uses of the others come before the recycling by the last.
        // Partner: itself.
        if refs.fetch_sub(1, Ordering::AcqRel) == 1 {
            // SAFETY: Wants the last count gone: it is.
            unsafe { recycle(this.cast_mut()) };
        }
    }

    /// Whether anything counts on it. Of use only where there is one thread, after a fork.
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
    // SAFETY: Needs a box that is not in use: `create` made it, and the last count is gone.
    drop(unsafe { Box::from_raw(state) });
}

#[cfg(not(mmun_loom))]
use pool::recycle;
