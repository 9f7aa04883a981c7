//! The states of the process. Each state is made in a page of its own, stays on a list for ever,
//! and is reused.

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
    /// The next state in the list of all states.
    all: *mut State,
    /// The next unused state.
    free: *mut State,
}

/// The state of an `Srcu` that was never used. Its table has no slot of any thread, so no section
/// counts here. No code writes this state.
pub(in crate::raw) static EMPTY: State = State::with(
    0,
    Table::empty(),
    Links {
        all: ptr::null_mut(),
        free: ptr::null_mut(),
    },
);

static LOCK: Lock<()> = Lock::new(());
// Both lists change by one store, so that the child of a fork finds them consistent.
static ALL: AtomicPtr<State> = AtomicPtr::new(ptr::null_mut());
static FREE: AtomicPtr<State> = AtomicPtr::new(ptr::null_mut());

/// Makes the state behind `handle` if the handle is still [`EMPTY`]. The fork handler is registered
/// by now.
pub(in crate::raw) fn first_use(handle: &AtomicPtr<State>) {
    let _held = LOCK.lock();
    // No ORDER: the lock orders it.
    if ptr::eq(handle.load(Ordering::Relaxed), &EMPTY) {
        let state = create();
        // ORDER(srcu-state): Release: a thread that loads the pointer sees the complete state.
        // Partner: the Acquire in `Handle::peek`.
        // INVARIANT: a new state has one count, that of the handle.
        handle.store(state, Ordering::Release);
    }
}

/// Takes a state from the free list or makes one. The caller holds `LOCK`.
fn create() -> *mut State {
    let recycled = FREE.load(Ordering::Relaxed);
    let (state, all): (*mut State, _) = if recycled.is_null() {
        (pages::alloc(0).cast().as_ptr(), ALL.load(Ordering::Relaxed))
    } else {
        // SAFETY: the read needs a live state. States on the free list stay initialised.
        let links = unsafe { &(*recycled).links };
        FREE.store(links.free, Ordering::Relaxed);
        (recycled, links.all)
    };
    // SAFETY: the offset must be inside the page. States are made at the start of pages.
    let slots: *mut Slot = unsafe { state.byte_add(offset_of!(Page, slots)).cast() };
    // SAFETY: the write needs memory that this crate owns. The memory is a new page or an unused
    // state. All zeroes are valid slots.
    unsafe { slots.write_bytes(0, place::INLINE) };
    // SAFETY: `with_first` needs zeroed slots that live as long as the table. The slots are the
    // rest of the page that contains the table.
    let table = unsafe { Table::with_first(slots) };
    let links = Links {
        all,
        free: ptr::null_mut(),
    };
    // SAFETY: the write needs memory that this crate owns. The memory is a new page or an unused
    // state, whose value needs no drop.
    unsafe { state.write(State::with(barrier::mode(), table, links)) };
    if recycled.is_null() {
        // ORDER(srcu-fork): Release, for the state, because a forked child may find this store.
        // Among threads the lock orders it.
        ALL.store(state, Ordering::Release);
    }
    state
}

/// Puts a state on the free list.
///
/// # Safety
/// The last count of the state was released.
pub(super) unsafe fn recycle(state: *mut State) {
    // SAFETY: the reference must be unique. The last count was released.
    unsafe { (*state).table.free_buckets() };
    let _held = LOCK.lock();
    // SAFETY: the write needs exclusive access. The last count was released, and the state is not
    // on the free list yet.
    unsafe { (*state).links.free = FREE.load(Ordering::Relaxed) };
    // ORDER(srcu-fork): Release, for the link, as above.
    FREE.store(state, Ordering::Release);
}

/// In the child of a fork: calls `f` for every state, in use or not.
pub(in crate::raw) fn each(mut f: impl FnMut(&State)) {
    LOCK.after_fork();
    let mut next = ALL.load(Ordering::Relaxed);
    while !next.is_null() {
        // SAFETY: the pointer must be to an initialised state. All states on this list are
        // initialised and never unmapped.
        let state = unsafe { &*next };
        f(state);
        next = state.links.all;
    }
}
