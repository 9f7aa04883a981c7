//! Read sections: the guards that a reader holds, and the fast path that opens them.

use crate::raw::barrier;
use crate::raw::slot::Slot;
use crate::raw::state::State;
use crate::sync::{Ordering, mutant};
use std::fmt;
use std::marker::PhantomData;

/// A read section of this thread. Data that the section finds stays valid until the guard is
/// dropped, if updaters free data only a grace period after they have unlinked it.
///
/// Returned by [`Srcu::read_lock`](crate::Srcu::read_lock). Inside the section, the thread may
/// sleep, open further sections of this or another domain, and drop its guards in any order. A
/// `Guard` is `!Send`. The guard of a section that may end on another thread is a [`SendGuard`].
///
/// If a guard is forgotten (`mem::forget`), its section never ends, and no later grace period of
/// the domain ends either.
///
/// ```compile_fail,E0277
/// let srcu = srcu::Srcu::new();
/// let guard = srcu.read_lock();
/// std::thread::scope(|scope| scope.spawn(|| drop(guard)));
/// ```
/// ```compile_fail,E0597
/// let guard = { let srcu = srcu::Srcu::new(); srcu.read_lock() };
/// ```
#[must_use = "the section ends when the guard is dropped"]
pub struct Guard<'a> {
    section: Section<'a>,
    slot: &'a Slot,
    not_send: PhantomData<*mut ()>,
}

/// A read section that may end on another thread, for example in a task that awaits I/O inside the
/// section.
///
/// Returned by [`Srcu::down_read`](crate::Srcu::down_read). Dropping the guard ends the section. A
/// `SendGuard` belongs to no thread, so this crate cannot detect a thread that waits for a grace
/// period while it holds a `SendGuard`: such a wait hangs.
#[must_use = "the section ends when the guard is dropped"]
pub struct SendGuard<'a> {
    section: Section<'a>,
}

/// A per-thread handle of a domain, which skips the look-up of the thread's counters.
///
/// Returned by [`Srcu::reader`](crate::Srcu::reader). Useful where one function opens very many
/// short sections. A `Reader` is `!Send`, because it points to the counters of its thread.
///
/// ```compile_fail,E0277
/// let srcu = srcu::Srcu::new();
/// let reader = srcu.reader();
/// std::thread::scope(|scope| scope.spawn(|| drop(reader)));
/// ```
pub struct Reader<'a> {
    state: &'a State,
    slot: &'a Slot,
    not_send: PhantomData<*mut ()>,
}

/// The domain of a section, and how the section was counted.
#[derive(Clone, Copy)]
struct Section<'a> {
    state: &'a State,
    /// The index word as loaded at the section's beginning: the bank, and the kind of fence to use.
    word: usize,
}

impl<'a> Guard<'a> {
    #[inline(always)]
    pub(crate) fn enter(state: &'a State, slot: &'a Slot) -> Self {
        // Relaxed: either bank is correct at any time, because every grace period scans both.
        let word = state.index.load(Ordering::Relaxed);
        slot.local.enter(word);
        begun(word);
        Self {
            section: Section { state, word },
            slot,
            not_send: PhantomData,
        }
    }

    /// Ends the section, as dropping the guard does.
    #[doc(alias = "srcu_read_unlock")]
    #[inline]
    pub fn unlock(self) {}
}

impl Drop for Guard<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.slot.local.leave(self.section.word);
        self.section.ended();
    }
}

impl<'a> SendGuard<'a> {
    pub(crate) fn enter(state: &'a State) -> Self {
        let word = state.index.load(Ordering::Relaxed);
        slot(state).moved.enter(word);
        begun(word);
        Self {
            section: Section { state, word },
        }
    }

    /// Ends the section on the calling thread, as dropping the guard does.
    #[doc(alias = "srcu_up_read")]
    pub fn up_read(self) {}
}

impl Drop for SendGuard<'_> {
    fn drop(&mut self) {
        // The end is counted in this thread's slot. The guard was sent to this thread, which orders
        // the section's beginning before its end. ORDER(srcu-scan) needs that order.
        slot(self.section.state).moved.leave(self.section.word);
        self.section.ended();
    }
}

impl<'a> Reader<'a> {
    pub(crate) fn new(state: &'a State) -> Self {
        Self {
            state,
            slot: slot(state),
            not_send: PhantomData,
        }
    }

    /// Begins a read section, as [`Srcu::read_lock`](crate::Srcu::read_lock) does.
    #[doc(alias = "srcu_read_lock")]
    #[inline(always)]
    pub fn read_lock(&self) -> Guard<'a> {
        Guard::enter(self.state, self.slot)
    }
}

/// Returns this thread's slot, and claims one if the thread has none.
pub(crate) fn slot(state: &State) -> &Slot {
    state
        .table
        .mine()
        .unwrap_or_else(|| state.table.claim_mine())
}

#[inline(always)]
fn begun(word: usize) {
    // ORDER(srcu-enter): orders the count before the first read of protected data. Partner: the
    // heavy fence in `scan`. Without this fence, the grace period could miss the count although
    // this thread reads the old pointer. Model: loom `free_waits_for_reader`.
    if !mutant("no_fence_in_lock") {
        barrier::light(word);
    }
}

impl Section<'_> {
    /// Wakes the threads that wait for the end of this section, which has just been counted.
    #[inline(always)]
    fn ended(self) {
        // ORDER(srcu-wake): orders the count before the load of `waiting`. Partner: the heavy fence
        // after the announcement in `step`. Without this fence, the waiter could miss the end of
        // the section, and this thread could miss the waiter. Model: loom `a_wake_up_is_not_lost`.
        if !mutant("no_fence_in_unlock") {
            barrier::light(self.word);
        }
        let bank = self.word & 1;
        if self.state.waiting[bank].load(Ordering::Relaxed) != 0 {
            self.state.section_ended(bank);
        }
    }
}

impl fmt::Debug for Guard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("bank", &(self.section.word & 1))
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for SendGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendGuard")
            .field("bank", &(self.section.word & 1))
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}
