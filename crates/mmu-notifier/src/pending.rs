//! The count of a subsystem's unfinished frees, and the wait for them.

use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Arc, Condvar, Mutex, forks, lock, mutant};
use once_cell::race::OnceBox;

/// Counts the unfinished frees of one subsystem, in two banks.
///
/// 1. A put counts its free in the current bank.
/// 2. `synchronize` waits until the other bank is empty, and makes that bank current.
/// 3. Then `synchronize` waits until the bank that was current before is empty.
///
/// Every free that was queued before the call is counted in one of the two banks, so `synchronize`
/// waits for all of them. New puts cannot delay it for ever, because it never waits for the bank
/// that new puts fill. A put that read `current` before step 2 may still count in the bank that was
/// current then; there are finitely many such puts.
///
/// A `Pending` belongs to one process. In the child of a fork, threads that exist in the parent
/// only may hold its locks, or may have counted frees that never finish in the child. So the child
/// does not use it and makes a new one, without a lock, because a thread of the parent may hold
/// that lock too.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) users_max: u32,
    /// The value of [`forks`] in the process that made this `Pending`.
    pub(crate) forks: usize,
    /// In the child of a fork: the `Pending` that the child made.
    pub(crate) child: OnceBox<Arc<Pending>>,
    /// Both counts in one word, so that one load sees both.
    banks: AtomicU64,
    current: AtomicUsize,
    /// Held by the thread that runs `synchronize`.
    turn: Mutex<()>,
    emptied: (Mutex<()>, Condvar),
}

impl Pending {
    pub(crate) fn new(users_max: u32) -> Self {
        Self {
            users_max,
            forks: forks(),
            child: OnceBox::new(),
            banks: AtomicU64::new(0),
            current: AtomicUsize::new(0),
            turn: Mutex::new(()),
            emptied: (Mutex::new(()), Condvar::new()),
        }
    }

    /// Counts a free that is about to be queued, and returns its bank.
    pub(crate) fn queued(&self) -> u8 {
        // ORDER: Relaxed is enough. If the put happens before `synchronize`, `synchronize` sees its
        // count, in whichever bank the count is. If not, `synchronize` need not see the put.
        let bank = self.current.load(Ordering::Relaxed);
        self.banks.fetch_add(one(bank), Ordering::Relaxed);
        u8::from(bank != 0)
    }

    /// Counts a free as done.
    pub(crate) fn freed(&self, bank: u8) {
        if self.forks != forks() {
            // The drop of the value has forked, and this is the child, where `is_empty` is true
            // whatever the count is. So if this thread ran the free inside `synchronize`, it does
            // not wait for the count.
            return;
        }
        // ORDER(core-freed): orders the free before the count. Partner: the load in `wait_for`.
        // If weaker, `synchronize` could return before the effects of the free are visible.
        let order = if mutant("freed_relaxed") {
            Ordering::Relaxed
        } else {
            Ordering::Release
        };
        let bank = usize::from(bank);
        if count(self.banks.fetch_sub(one(bank), order), bank) == 1 {
            // Under the lock, so that the notification cannot come between a waiter's check and its
            // sleep.
            let _lock = lock(&self.emptied.0);
            self.emptied.1.notify_all();
        }
    }

    pub(crate) fn synchronize(&self) {
        let _turn = lock(&self.turn);
        let current = self.current.load(Ordering::Relaxed);
        if !mutant("one_bank") {
            self.wait_for(1 - current);
        }
        self.current.store(1 - current, Ordering::Relaxed);
        self.wait_for(current);
    }

    /// Returns true if all frees are done. If a free puts another notifier, that put is counted
    /// before the free is done, so this function misses no chain.
    pub(crate) fn is_idle(&self) -> bool {
        // ORDER(core-freed): partner of the subtraction in `freed`.
        self.banks.load(Ordering::Acquire) == 0
    }

    fn wait_for(&self, bank: usize) {
        // Outside the lock: without a reclaimer, `reclaim_here` runs the frees, and `freed` takes
        // the lock.
        while !self.is_empty(bank) && !srcu::reclaim_here(|| self.is_empty(bank)) {
            std::thread::sleep(WITHOUT_RECLAIMER);
        }
        let mut emptied = lock(&self.emptied.0);
        while !self.is_empty(bank) {
            emptied = self
                .emptied
                .1
                .wait(emptied)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn is_empty(&self, bank: usize) -> bool {
        // In the child of a fork no free is counted any more.
        // ORDER(core-freed): partner of the subtraction in `freed`.
        count(self.banks.load(Ordering::Acquire), bank) == 0 || self.forks != forks()
    }
}

/// How long a thread that waits for frees sleeps between its calls of `reclaim_here`, if the system
/// gives no thread for the reclaimer.
const WITHOUT_RECLAIMER: std::time::Duration = std::time::Duration::from_millis(1);

/// One free, as a part of `banks`. A bank cannot overflow: the nodes of 2^32 queued frees do not
/// fit into memory.
const fn one(bank: usize) -> u64 {
    1 << (32 * bank)
}

const fn count(banks: u64, bank: usize) -> u64 {
    (banks >> (32 * bank)) & 0xffff_ffff
}
