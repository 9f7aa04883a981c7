//! The sequence that all intervals of one address space share, and the windows in which the tree of
//! intervals is frozen.
//!
//! A window is the time from the start of a bracket to its end. Windows overlap, so they are
//! counted.
//!
//! | # | state | `active_invalidate_ranges` | `invalidate_seq` | tree |
//! | --- | --- | --- | --- | --- |
//! | 1 | idle | 0 | even | may change |
//! | 2 | partial: windows are open, none has met an interval so far | > 0 | even | may change |
//! | 3 | full: an interval was met, or an insert came | > 0 | odd | frozen, changes are deferred |
//!
//! ```text
//!   1 idle ----- start that meets no interval -----> 2 partial
//!     |                                                  |
//!     | start that meets an interval                     | start that meets an interval,
//!     v                                                  v or an insert
//!   3 full <---------------------------------------------+
//! ```
//!
//! The end of the last window leads back to 1, from 2 and from 3.
//!
//! 1. A start counts its window. If the range meets an interval, the start makes the sequence odd
//!    and calls each interval that it meets, without the lock. The frozen tree makes that walk
//!    safe.
//! 2. Each interval stores the odd sequence. A reader that looked up before sees another sequence
//!    and must retry; a reader that begins now waits until the sequence changes.
//! 3. Inserts and removals during state 3 go to the deferred list. Removing a node that still waits
//!    for its insert takes the node off that list at once.
//! 4. The end of the last window in state 3 makes the sequence even, applies the deferred list, and
//!    wakes the waiters.
//!
//! # Safety
//! `state` is changed under its lock. The tree is walked without the lock in state 3 only, in which
//! no thread changes it. The owner of a node in the tree or on the deferred list keeps the node:
//! `remove` succeeds only when the node is in neither. Under the lock no code allocates or frees,
//! because either may begin a bracket of the process's own address space, which takes the same
//! lock.
//!
//! # Source
//! `mn_itree_inv_start_range`, `mn_itree_inv_end` and their callers, mm/mmu_notifier.c, Linux 5.15.

mod finish;
mod header;
mod tree;

pub use finish::Finish;
pub(crate) use header::{Callback, Header};

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, lock, mutant};
use crate::{InvalidateRange, MmWithUser, MmapWriteGuard, WouldBlock, WouldDeadlock, lockdep};
use finish::Finishes;
use std::ptr::{self, NonNull};
use std::sync::PoisonError;
use tree::{Spares, Tree};

/// The intervals of one address space.
pub(crate) struct Intervals {
    /// Whether brackets open windows. The first insert sets it, once.
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
    /// How many nodes of `deferred_list` wait to be inserted; the others wait to be removed.
    deferred_inserts: usize,
    /// How many threads wait for the sequence to change. Without waiters, the end skips the
    /// wake-up, which would be a system call.
    waiters: usize,
}

// SAFETY: The pointers point to nodes. The list and the tree use only parts of a node that are
// `Send + Sync`, and the state is behind a lock.
unsafe impl Send for State {}

/// Proof that a bracket has opened a window and must close it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window(());

/// What happened to a node that is to be removed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    Done,
    /// The node leaves the tree when the window with this sequence closes.
    Deferred(u64),
    /// The removal would have to be deferred, and the caller must not wait. Nothing has changed.
    Refused,
}

impl State {
    fn is_full(&self) -> bool {
        self.invalidate_seq & 1 == 1
    }

    /// Returns how many more spare nodes an insert of `node` needs. In state 3 the insert is one
    /// more deferred insert.
    fn lack(&self, node: &Header) -> usize {
        let each = self.itree.need_each();
        let need = if self.is_full() {
            (self.deferred_inserts + 1) * each
        } else {
            node.need(&self.itree)
        };
        need.saturating_sub(self.itree.spares.len())
    }

    /// Takes the spare nodes that no pending insert needs. The caller frees them without the lock.
    fn surplus(&mut self) -> Spares<Header> {
        // Deferred inserts exist only while the tree is frozen, and they need the spare nodes.
        if self.deferred_inserts == 0 {
            self.itree.spares.take_all()
        } else {
            Spares::new()
        }
    }
}

impl Intervals {
    /// # Panics
    /// If `seq` is odd. Real address spaces begin with 2; other values serve tests of the
    /// wrap-around.
    pub(crate) fn new(seq: u64) -> Self {
        assert!(seq % 2 == 0, "an idle sequence is even");
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

    /// Tells whether brackets open windows.
    #[inline]
    pub(crate) fn is_enabled(&self) -> bool {
        // ORDER: Relaxed is enough. A bracket reads the flag inside its read section, and the first
        // insert sets the flag before its grace period. If the section began too early to see the
        // flag, the grace period waits for it, so the bracket has ended when the insert returns. If
        // the grace period does not wait for the section, the section sees every store made before
        // the grace period, this flag included. Exit reads the flag without a section: every insert
        // needs a user, and `core-exit` orders those users before exit. The data behind the flag is
        // read under the lock.
        self.enabled.load(Ordering::Relaxed)
    }

    /// Makes brackets open windows. Returns when every bracket that does not open one has ended.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(crate) fn enable(&self, mm: &MmWithUser) -> Result<(), WouldDeadlock> {
        if mm.is_inherited() {
            // A thread of the parent, which does not exist here, may hold the lock or have changed
            // half of the tree.
            return Err(WouldDeadlock);
        }
        // ORDER(core-itree): partner of the store in `enable_locked`. If weaker, an insert that
        // skips the wait could rely on a grace period that it does not see.
        if self.live.load(Ordering::Acquire) {
            return Ok(());
        }
        self.enable_locked(&mm.mmap_write_lock()?)
    }

    /// Like [`enable`](Self::enable), for a caller that holds the write lock.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(crate) fn enable_locked(&self, locked: &MmapWriteGuard<'_>) -> Result<(), WouldDeadlock> {
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
        lockdep::might_wait(Some(locked.id()));
        // After a second pass has run, the bracket that ran it queues the free of the pass, and a
        // bracket must not allocate. So `prepare` allocates now.
        locked.subscriptions().srcu().prepare();
        self.enabled.store(true, Ordering::Relaxed);
        locked.subscriptions().srcu().synchronize()?;
        // ORDER(core-itree): orders the grace period before every insert that reads true and skips
        // the wait. Partner: the loads above.
        self.live.store(true, Ordering::Release);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Opens a window for `range` and calls every interval that meets it.
    ///
    /// # Errors
    /// [`WouldBlock`] if a non-blockable callback refused. Then the window of this bracket is
    /// closed again, and the intervals after the one that refused were not called.
    pub(crate) fn start(&self, range: &InvalidateRange<'_>) -> Result<Window, WouldBlock> {
        let (seq, root) = {
            let mut state = self.lock();
            state.active_invalidate_ranges += 1;
            let Some(root) = state
                .itree
                .root()
                .filter(|root| root.meets(range.range))
                .map(NonNull::from)
            else {
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
        // SAFETY: A reference needs a live root that no thread changes: the sequence stays odd
        // until this window closes, and an odd sequence freezes the tree.
        let all = unsafe { root.as_ref() }.visit(range.range, &mut call);
        finishes.run(range.mm);
        if all {
            Ok(Window(()))
        } else {
            self.end(Window(()));
            Err(WouldBlock)
        }
    }

    /// Closes one bracket's window. The last one makes the deferred changes and wakes the waiters.
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
        // SAFETY: A node on the list is kept by its owner, and no other thread changes the list:
        // the lock is held.
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

    /// Adds a node now, or when the open window closes.
    ///
    /// # Safety
    /// The node must be new, and stay alive until `remove` has returned [`Removal::Done`], or until
    /// `remove` has returned `Deferred` and `wait_past` has returned as well.
    pub(crate) unsafe fn insert(&self, node: &Header) {
        let mut state = self.lock_with_spares_for(node);
        if state.is_full() {
            state.deferred_list = node.defer(state.deferred_list);
            state.deferred_inserts += 1;
        } else {
            node.toggle(&mut state.itree);
        }
        if state.active_invalidate_ranges == 0 {
            // An odd sequence of the past: no reader waits for it.
            node.set_seq(state.invalidate_seq.wrapping_sub(1));
        } else {
            // An invalidation that is running may cover this range and has already walked the tree,
            // so the node counts as met. The odd sequence of the open window makes readers wait
            // until the window closes.
            state.invalidate_seq |= 1;
            node.set_seq(state.invalidate_seq);
        }
        let surplus = state.surplus();
        drop(state);
        drop(surplus);
    }

    /// Takes the lock with enough spare nodes in store that inserting `node` does not allocate
    /// under it.
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

    /// Takes a node out of the tree: now, or when the open window closes. Defers only if the caller
    /// may wait for that.
    ///
    /// # Safety
    /// The node must have been inserted, and not removed before.
    pub(crate) unsafe fn remove(&self, node: &Header, may_wait: bool) -> Removal {
        let mut state = self.lock();
        let in_tree = node.is_in_tree();
        if state.is_full() && in_tree {
            if !may_wait {
                return Removal::Refused;
            }
            // The node is in the tree, so its insert is not on the list, and it is removed only
            // once.
            state.deferred_list = node.defer(state.deferred_list);
            return Removal::Deferred(state.invalidate_seq);
        }
        if in_tree {
            node.toggle(&mut state.itree);
        } else {
            // SAFETY: The lock is held, the node is on this list, and owners keep the list's nodes.
            state.deferred_list = unsafe { node.undefer(state.deferred_list) };
            state.deferred_inserts -= 1;
        }
        let surplus = state.surplus();
        drop(state);
        drop(surplus);
        Removal::Done
    }

    /// Returns a node's sequence, and whether the window of that sequence is still open.
    pub(crate) fn read(&self, node: &Header) -> (u64, bool) {
        let state = self.lock();
        let seq = node.seq();
        (seq, seq == state.invalidate_seq)
    }

    /// Waits until the window with the odd sequence `seq` has closed and its deferred changes are
    /// made.
    pub(crate) fn wait_past(&self, seq: u64) {
        if mutant("remove_waits_not") {
            return;
        }
        // `end` changes the sequence and makes the deferred changes in one critical section. So a
        // thread that reads the next sequence under the lock also sees those changes.
        let mut state = self.lock();
        state.waiters += 1;
        while state.invalidate_seq == seq {
            state = self
                .thawed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
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
        IntervalNotifier::insert(
            mm,
            VaRange::covering(Va::new(page << 12), 1).unwrap(),
            Quiet,
        )
        .unwrap()
    }

    #[test]
    fn a_deferred_insert_that_is_taken_back_keeps_no_memory() {
        let mm = MmWithUser::new();
        let _hit = insert(&mm, 1);
        let bracket = mm.invalidate(VaRange::ALL, Event::Clear);
        let deferred = [insert(&mm, 2), insert(&mm, 3)];
        let spares = || mm.intervals().lock().itree.spares.len();
        assert!(
            spares() != 0,
            "what they will need was made when they were inserted"
        );
        assert!(
            deferred
                .into_iter()
                .all(|interval| interval.remove().is_ok())
        );
        assert_eq!((spares(), mm.intervals().lock().deferred_inserts), (0, 0));
        drop(bracket);
    }

    /// A thread that ends an earlier window may notify after a later window has opened, and a
    /// condition variable may also wake spuriously.
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
