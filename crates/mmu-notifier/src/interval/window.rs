//! The sequence that all intervals of one address space share, and the windows in which it stands still.
//!
//! | # | state | `active_invalidate_ranges` | `invalidate_seq` | tree |
//! | --- | --- | --- | --- | --- |
//! | 1 | idle | 0 | even | may change |
//! | 2 | partial: invalidations run, none met an interval so far | > 0 | even | may change |
//! | 3 | full: one of them did | > 0 | odd | frozen, changes are deferred |
//!
//! From 1 to 2 or 3 by the start of a bracket, from 2 to 3 by a start that meets an interval or by an insert, back to 1
//! by the end of the last bracket, which makes the deferred changes and then wakes whoever waits.
//!
//! # Safety
//! `state` is changed under its lock; the tree is walked without it in state 3 only, where nobody changes it. A node in
//! the tree or on the deferred list is kept by its `IntervalNotifier`, whose `remove` returns only when it is on neither. Under the
//! lock nothing is allocated or freed, as either may begin a bracket of the process's own address space.
//!
//! # Source
//! `mn_itree_inv_start_range`, `mn_itree_inv_end` and their callers, mm/mmu_notifier.c, Linux 5.15.

use super::finish::Finishes;
use super::node::Header;
use super::tree::{Spares, Tree};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, lock, mutant};
use crate::{InvalidateRange, MmWithUser, MmapWriteGuard, WouldBlock, WouldDeadlock, lockdep};
use std::ptr::{self, NonNull};
use std::sync::PoisonError;

/// The intervals of one address space.
pub(crate) struct Intervals {
    /// Whether brackets take part. Set once, by the first insert.
    enabled: AtomicBool,
    /// Whether every bracket that did not see `enabled` has ended.
    live: AtomicBool,
    state: Mutex<State>,
    thawed: Condvar,
}

struct State {
    invalidate_seq: u64,
    active_invalidate_ranges: u64,
    itree: Tree<Header>,
    deferred_list: *mut Header,
    /// How many of that list are to be inserted.
    deferred_inserts: usize,
    /// How many threads wait for the sequence to change: waking nobody would still be a system call.
    waiters: usize,
}

// SAFETY: The pointers are to nodes that are `Send + Sync` as far as the list and the tree use them, and the state is
// behind a lock.
unsafe impl Send for State {}

/// A bracket's part in a window: its end is owed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window(());

/// What became of a node that is to be removed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Removal {
    Done,
    /// It leaves the tree when the window with this sequence closes.
    Deferred(u64),
    /// It would have had to be deferred. Nothing has changed.
    Refused,
}

impl State {
    fn is_full(&self) -> bool {
        self.invalidate_seq & 1 == 1
    }

    /// Returns how many spare nodes are missing for an insert now, or for one more that is deferred.
    fn lack(&self, node: &Header) -> usize {
        let each = self.itree.need_each();
        let need = if self.is_full() { (self.deferred_inserts + 1) * each } else { node.need(&self.itree) };
        need.saturating_sub(self.itree.spares.len())
    }

    /// Takes the spare nodes that nobody needs any more, to be freed without the lock.
    fn surplus(&mut self) -> Spares<Header> {
        // The tree is frozen as long as there are deferred inserts, and the nodes are theirs.
        if self.deferred_inserts == 0 { self.itree.spares.take_all() } else { Spares::new() }
    }
}

impl Intervals {
    /// # Panics
    /// If `seq` is odd; the first is 2, another one only serves tests of the wrap-around.
    pub(crate) fn new(seq: u64) -> Self {
        assert!(seq.is_multiple_of(2), "an idle sequence is even");
        Self {
            enabled: AtomicBool::new(false),
            live: AtomicBool::new(false),
            state: Mutex::new(State {
                invalidate_seq: seq,
                active_invalidate_ranges: 0,
                itree: Tree::new(),
                deferred_list: ptr::null_mut(),
                deferred_inserts: 0,
                waiters: 0,
            }),
            thawed: Condvar::new(),
        }
    }

    /// Tells whether brackets take part in windows.
    #[inline]
    pub(crate) fn is_enabled(&self) -> bool {
        // ORDER: Relaxed is enough: a bracket that reads false although it began after the first insert had returned would be
        // one that the insert's grace period did not wait for and that yet does not see what came before it, which the
        // domain excludes. What lies behind the flag is read under the lock.
        self.enabled.load(Ordering::Relaxed)
    }

    /// Makes brackets take part: returns when every bracket that does not has ended.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(super) fn enable(&self, mm: &MmWithUser) -> Result<(), WouldDeadlock> {
        if mm.is_inherited() {
            // Its lock may be held, or its tree half changed, by a thread that is not here.
            return Err(WouldDeadlock);
        }
        // ORDER(core-itree): partner of the store below. Weaker, an insert could rely on a grace period it does not see.
        if self.live.load(Ordering::Acquire) {
            return Ok(());
        }
        self.enable_locked(&mm.mmap_write_lock()?)
    }

    /// The same for a caller that holds the write lock.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(super) fn enable_locked(&self, locked: &MmapWriteGuard<'_>) -> Result<(), WouldDeadlock> {
        if locked.is_inherited() {
            return Err(WouldDeadlock);
        }
        // ORDER(core-itree): as in `enable`.
        if self.live.load(Ordering::Acquire) {
            return Ok(());
        }
        if locked.would_deadlock() {
            return Err(WouldDeadlock);
        }
        lockdep::might_wait(Some(locked));
        self.enabled.store(true, Ordering::Relaxed);
        locked.subscriptions().srcu().synchronize()?;
        // ORDER(core-itree): the grace period, before whoever skips it.
        self.live.store(true, Ordering::Release);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Opens a window for `range` and calls every interval that meets it.
    ///
    /// # Errors
    /// [`WouldBlock`] if a non-blockable callback refused. Then no window is open, and the intervals after it were not asked.
    pub(crate) fn start(&self, range: &InvalidateRange<'_>) -> Result<Window, WouldBlock> {
        let (seq, root) = {
            let mut state = self.lock();
            state.active_invalidate_ranges += 1;
            let Some(root) = state.itree.root().filter(|root| root.meets(range.range)).map(NonNull::from) else {
                return Ok(Window(()));
            };
            state.invalidate_seq |= 1;
            (state.invalidate_seq, root)
        };
        let mut finishes = Finishes::none();
        let mut call = |node: NonNull<Header>| {
            // SAFETY: A reference needs a live node: its owner keeps it while it is in the tree.
            match unsafe { node.as_ref() }.invalidate(seq, range) {
                Ok(finish) => {
                    finishes.push(finish);
                    true
                }
                Err(WouldBlock) => false,
            }
        };
        // SAFETY: A reference needs a live root that nobody changes: the tree is frozen, the sequence is odd until this window closes.
        let all = unsafe { root.as_ref() }.visit(range.range, &mut call);
        finishes.run(range.mm);
        if all {
            Ok(Window(()))
        } else {
            self.end(Window(()));
            Err(WouldBlock)
        }
    }

    /// Closes one bracket's window; the last one makes the deferred changes and wakes whoever waits.
    pub(crate) fn end(&self, Window(()): Window) {
        let mut state = self.lock();
        state.active_invalidate_ranges -= 1;
        if state.active_invalidate_ranges != 0 || !state.is_full() {
            return;
        }
        state.invalidate_seq = state.invalidate_seq.wrapping_add(1);
        if mutant("thaw_in_two_steps") {
            drop(state);
            state = self.lock();
        }
        let mut deferred = std::mem::replace(&mut state.deferred_list, ptr::null_mut());
        // SAFETY: A node on the list is kept by its owner, and the list is ours: its lock is held.
        while let Some(node) = unsafe { deferred.as_ref() } {
            deferred = node.take_deferred();
            node.toggle(&mut state.itree);
        }
        state.deferred_inserts = 0;
        let waiters = state.waiters;
        drop(state);
        if waiters != 0 {
            self.thawed.notify_all();
        }
    }

    /// Adds a node, now or when the open window closes.
    ///
    /// # Safety
    /// The node must be new, and stay alive until `remove` has returned [`Removal::Done`], or `Deferred` and `wait_past`.
    pub(super) unsafe fn insert(&self, node: &Header) {
        let mut state = self.lock_with_spares_for(node);
        if state.is_full() {
            state.deferred_list = node.defer(state.deferred_list);
            state.deferred_inserts += 1;
        } else {
            node.toggle(&mut state.itree);
        }
        if state.active_invalidate_ranges == 0 {
            // Odd and of the past: no reader has to wait for it.
            node.set_seq(state.invalidate_seq.wrapping_sub(1));
        } else {
            // An invalidation that runs may be of this range: the node counts as hit. Odd and of this window, so that readers
            // wait until it closes.
            state.invalidate_seq |= 1;
            node.set_seq(state.invalidate_seq);
        }
        let surplus = state.surplus();
        drop(state);
        drop(surplus);
    }

    /// Locks, and sees to it that the tree need not allocate for this node.
    fn lock_with_spares_for(&self, node: &Header) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        loop {
            let lack = state.lack(node);
            if lack == 0 {
                return state;
            }
            drop(state);
            let spares = Spares::allocate(lack);
            state = self.lock();
            state.itree.spares.add(spares);
        }
    }

    /// Takes a node out, now or when the open window closes; the latter only if the caller may wait for that.
    ///
    /// # Safety
    /// The node must have been inserted, and not removed before.
    pub(super) unsafe fn remove(&self, node: &Header, may_wait: bool) -> Removal {
        let mut state = self.lock();
        let in_tree = node.is_in_tree();
        if state.is_full() && in_tree {
            if !may_wait {
                return Removal::Refused;
            }
            // A node in the tree is on no list, as it is removed only once.
            state.deferred_list = node.defer(state.deferred_list);
            return Removal::Deferred(state.invalidate_seq);
        }
        if in_tree {
            node.toggle(&mut state.itree);
        } else {
            // SAFETY: The lock is held; the list is this one, and its nodes are kept by their owners.
            state.deferred_list = unsafe { node.undefer(state.deferred_list) };
            state.deferred_inserts -= 1;
        }
        let surplus = state.surplus();
        drop(state);
        drop(surplus);
        Removal::Done
    }

    /// Reads a node's sequence; the second is whether the window of that sequence is open.
    pub(super) fn read(&self, node: &Header) -> (u64, bool) {
        let state = self.lock();
        let seq = node.seq();
        (seq, seq == state.invalidate_seq)
    }

    /// Waits until the window with the odd sequence `seq` has closed and its deferred changes are made.
    pub(super) fn wait_past(&self, seq: u64) {
        if mutant("remove_waits_not") {
            return;
        }
        // Under the lock: whoever sees the next sequence sees the deferred changes made too.
        let mut state = self.lock();
        state.waiters += 1;
        while state.invalidate_seq == seq {
            state = self.thawed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiters -= 1;
    }

    /// Returns the sequence and the number of open windows, for tests.
    pub(crate) fn snapshot(&self) -> (u64, u64) {
        let state = self.lock();
        (state.invalidate_seq, state.active_invalidate_ranges)
    }
}

#[cfg(all(test, not(mmun_loom)))]
mod tests {
    use super::*;
    use crate::{Event, Finish, IntervalNotifier, IntervalOps, Va, VaRange};

    struct Quiet;

    impl IntervalOps for Quiet {
        fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
            None
        }
    }

    fn insert(mm: &MmWithUser, page: u64) -> IntervalNotifier<Quiet> {
        IntervalNotifier::insert(mm, VaRange::covering(Va::new(page << 12), 1).unwrap(), Quiet).unwrap()
    }

    #[test]
    fn a_deferred_insert_that_is_taken_back_keeps_no_memory() {
        let mm = MmWithUser::new();
        let _hit = insert(&mm, 1);
        let bracket = mm.invalidate(VaRange::ALL, Event::Clear);
        let deferred = [insert(&mm, 2), insert(&mm, 3)];
        let spares = || mm.intervals().lock().itree.spares.len();
        assert!(spares() != 0, "what they will need was made when they were inserted");
        assert!(deferred.into_iter().all(|interval| interval.remove().is_ok()));
        assert_eq!((spares(), mm.intervals().lock().deferred_inserts), (0, 0));
        drop(bracket);
    }

    /// The end of an earlier window may be about to notify when a later one has opened, and a condition variable may wake
    /// for no reason at all.
    #[test]
    fn a_wake_up_for_another_window_ends_no_wait() {
        let mm = MmWithUser::new();
        let interval = insert(&mm, 1);
        let bracket = mm.invalidate(VaRange::ALL, Event::Clear);
        let intervals = mm.intervals();
        let waiters = || intervals.lock().waiters;
        std::thread::scope(|scope| {
            let remover = scope.spawn(|| interval.remove().is_ok());
            while waiters() == 0 {
                std::thread::yield_now();
            }
            for _ in 0..1000 {
                intervals.thawed.notify_all();
                assert_eq!(waiters(), 1, "it gave up the wait");
                std::thread::yield_now();
            }
            drop(bracket);
            assert!(remover.join().unwrap());
        });
    }
}
