//! The states of the process: made in pages of their own, listed for ever, used again and again.

use super::State;
use crate::raw::lock::Lock;
use crate::raw::slot::Slot;
use crate::raw::table::Table;
use crate::raw::{barrier, pages, place};
use crate::sync::{AtomicPtr, Ordering};
use std::mem::offset_of;
use std::ptr;

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
pub(in crate::raw) static EMPTY: State = State::with(
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

/// The state behind `handle`, made if it is still [`EMPTY`]. Forks are handled by now.
pub(in crate::raw) fn first_use(handle: &AtomicPtr<State>) {
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
