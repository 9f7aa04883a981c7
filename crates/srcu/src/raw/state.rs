//! What a domain is made of, and how long it lives.
//!
//! # Safety
//! # Invariants
//! * A state is counted: one for its `Srcu`, one while it is in the reclaimer's inbox, one while
//!   its batch holds callbacks. At zero it is recycled; no reference is left then (module docs of
//!   `raw`, facts 1 and 2).
//! * `batch` is touched only by the thread that acts as the reclaimer.

use super::barrier;
use super::callback::{Batch, Head};
use super::event::Event;
use super::lock::Lock;
use super::table::Table;
use crate::grace::Gp;
use crate::sync::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::fmt;
use std::ptr;

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
    pub(crate) inbox: super::reclaimer::Inbox,
}

/// What grace periods are counted with, and what waits for one.
#[repr(align(128))]
pub(crate) struct Updater {
    /// Twice the grace periods that ended, plus one while another is under way.
    pub(crate) seq: AtomicU64,
    pub(crate) gp: Lock<Gp>,
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
    #[cfg(not(mmun_loom))]
    const fn with(index: usize, table: Table, links: pool::Links) -> Self {
        Self {
            index: AtomicUsize::new(index),
            waiting: [AtomicU32::new(0), AtomicU32::new(0)],
            table,
            refs: AtomicUsize::new(1),
            owned: AtomicBool::new(true),
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
        }
    }

    #[cfg(mmun_loom)]
    pub(crate) fn create() -> *mut State {
        Box::into_raw(Box::new(Self {
            index: AtomicUsize::new(barrier::mode()),
            waiting: [AtomicU32::new(0), AtomicU32::new(0)],
            table: Table::empty(),
            refs: AtomicUsize::new(1),
            owned: AtomicBool::new(true),
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
            inbox: super::reclaimer::Inbox::new(),
        }))
    }

    pub(super) fn retain(&self) {
        // Relaxed: the caller holds a count already.
        self.refs.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives up one count.
    ///
    /// # Safety
    /// The caller holds the count it gives up, and does not use the state afterwards.
    pub(super) unsafe fn release(this: *const State) {
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

/// A `Srcu`'s hold on its state, which is made when it is first used.
///
/// # Invariants
/// Points to `EMPTY`, or to a state of which it has a count.
pub(crate) struct Handle(AtomicPtr<State>);

impl Handle {
    #[cfg(not(mmun_loom))]
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::from_ref(&pool::EMPTY).cast_mut()))
    }

    #[cfg(mmun_loom)]
    pub(crate) fn new() -> Self {
        Self(AtomicPtr::new(State::create()))
    }

    /// The state, or `EMPTY`, in which no thread has a slot.
    #[inline(always)]
    pub(crate) fn peek(&self) -> &State {
        // ORDER(srcu-state): Acquire, partner in `first_use`.
        let state = self.0.load(Ordering::Acquire);
        // SAFETY: It must be alive for the life of the reference: a static, or kept by the handle,
        // which is borrowed.
        unsafe { &*state }
    }

    /// The state, made if need be, without the allocator.
    #[inline]
    pub(crate) fn get(&self) -> &State {
        self.used().unwrap_or_else(|| self.first_use())
    }

    #[cfg(not(mmun_loom))]
    pub(crate) fn used(&self) -> Option<&State> {
        Some(self.peek()).filter(|state| !ptr::eq(*state, &pool::EMPTY))
    }

    #[cfg(mmun_loom)]
    pub(crate) fn used(&self) -> Option<&State> {
        Some(self.peek())
    }

    #[cold]
    fn first_use(&self) -> &State {
        #[cfg(not(mmun_loom))]
        pool::first_use(&self.0);
        self.peek()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Some(state) = self.used() {
            state.owned.store(false, Ordering::Relaxed);
            // SAFETY: Wants a count that is ours to give up: the handle's, by its invariant.
            unsafe { State::release(state) };
        }
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
pub(super) use pool::each;
#[cfg(not(mmun_loom))]
use pool::recycle;

/// The states of the process: made in pages of their own, listed for ever, used again and again.
#[cfg(not(mmun_loom))]
mod pool {
    use super::{AtomicPtr, Ordering, State, Table, barrier, ptr};
    use crate::raw::lock::Lock;
    use crate::raw::slot::Slot;
    use crate::raw::{fork, pages, place};
    use std::mem::offset_of;

    #[repr(C)]
    struct Page {
        state: State,
        slots: [Slot; place::INLINE],
    }

    const _: () = assert!(
        size_of::<Page>() == pages::PAGE,
        "a domain with its first slots is one page"
    );

    pub(super) struct Links {
        /// The next of all states ever made.
        all: *mut State,
        /// The next of those not in use.
        free: *mut State,
    }

    /// What a `Srcu` that was never used points to: a table in which no thread has a slot. Only its
    /// table is ever looked at.
    pub(super) static EMPTY: State = State::with(
        0,
        Table::empty(),
        Links {
            all: ptr::null_mut(),
            free: ptr::null_mut(),
        },
    );

    static LOCK: Lock<()> = Lock::new(());
    // Both lists change by one store, so that the child of a fork finds them whole.
    static ALL: AtomicPtr<State> = AtomicPtr::new(ptr::null_mut());
    static FREE: AtomicPtr<State> = AtomicPtr::new(ptr::null_mut());

    /// The state behind `handle`, made if it is still [`EMPTY`].
    pub(super) fn first_use(handle: &AtomicPtr<State>) {
        fork::register();
        let _held = LOCK.lock();
        // No ORDER: the lock orders it.
        if ptr::eq(handle.load(Ordering::Relaxed), &EMPTY) {
            let state = create();
            // ORDER(srcu-state): Release: a thread that loads the pointer sees the state made.
            // Partner: the Acquire in `Handle::peek`. INVARIANT: A new state has one count, the
            // handle's.
            handle.store(state, Ordering::Release);
        }
    }

    /// The caller holds the lock.
    fn create() -> *mut State {
        let recycled = FREE.load(Ordering::Relaxed);
        let (state, all): (*mut State, _) = if recycled.is_null() {
            (pages::alloc(0).cast().as_ptr(), ALL.load(Ordering::Relaxed))
        } else {
            // SAFETY: Reading needs a live state: those on the free list stay initialized.
            let links = unsafe { &(*recycled).links };
            FREE.store(links.free, Ordering::Relaxed);
            (recycled, links.all)
        };
        // SAFETY: The offset must stay within the page: states are made at the start of pages.
        let slots: *mut Slot = unsafe { state.byte_add(offset_of!(Page, slots)).cast() };
        // SAFETY: Writing needs memory that is ours: a new page, or a state that was free. All
        // zeroes are valid slots.
        unsafe { slots.write_bytes(0, place::INLINE) };
        // SAFETY: Wants zeroed slots for the life of the table: the rest of the page that the table
        // is in.
        let table = unsafe { Table::with_first(slots) };
        let links = Links {
            all,
            free: ptr::null_mut(),
        };
        // SAFETY: Writing needs memory that is ours: as above. What was there needs no drop.
        unsafe { state.write(State::with(barrier::mode(), table, links)) };
        if recycled.is_null() {
            // ORDER(srcu-fork): Release for the state, since a forked child may find this store;
            // among threads the lock orders it.
            ALL.store(state, Ordering::Release);
        }
        state
    }

    /// Puts a state on the free list.
    ///
    /// # Safety
    /// Its last count is gone.
    pub(super) unsafe fn recycle(state: *mut State) {
        // SAFETY: The reference must be unique: the last count is gone.
        unsafe { (*state).table.free_buckets() };
        let _held = LOCK.lock();
        // SAFETY: The place must be ours: as above.
        unsafe { (*state).links.free = FREE.load(Ordering::Relaxed) };
        // ORDER(srcu-fork): Release for the link, as above.
        FREE.store(state, Ordering::Release);
    }

    /// Calls `f` for every state in the child of a fork, in use or not.
    pub(in crate::raw) fn each(mut f: impl FnMut(&State)) {
        LOCK.after_fork();
        let mut next = ALL.load(Ordering::Relaxed);
        while !next.is_null() {
            // SAFETY: It must be an initialized state: all on this list are, and they are never
            // unmapped.
            let state = unsafe { &*next };
            f(state);
            next = state.links.all;
        }
    }
}
