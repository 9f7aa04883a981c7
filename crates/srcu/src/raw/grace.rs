//! Grace periods: a state machine that any thread moves, and in which no thread waits.
//!
//! Sections count in one of two banks. A grace period ends when, since it began, each bank has been
//! *found quiet* once: as many ends as beginnings. At rest one look at both banks is enough.
//! Otherwise new sections are sent to a bank that was found quiet already, and the other one
//! drains.
//!
//! 1. *idle*: `seq` is even.
//! 2. *scan*: `seq` is odd; `open` says which banks have not been found quiet.
//! 3. *blocked*: a scan found the stale bank, the one that gets no new sections, still in use. If
//!    a waiter is interested then `waiting` names the bank and who is to be told, and there was
//!    another look at the bank after that was written.
//! 4. Both quiet: `seq` is advanced, those interested are told, idle again.
//!
//! Why both banks, and not just the one in use: a reader may have loaded the index, and slept
//! before it counted. It counts in a bank that two grace periods may have turned over in the
//! meantime; only a scan of either bank, in every grace period, is sure to see it.
//! `docs/ordering.md` has the argument in full.

use super::barrier;
use super::slot::Counters;
use super::state::progress::{Announced, Gp, RECLAIMER, UPDATERS};
use super::state::{State, inbox};
use crate::sync::{Ordering, fence, mutant, spin_loop};

/// Looks at the counters before a waiting updater goes to sleep.
const SPINS: usize = if cfg!(mmun_loom) { 0 } else { 200 };

enum Step {
    Ended,
    /// This bank is still in use.
    Blocked(usize),
}

impl State {
    /// The sequence number at which a grace period that begins after this call has ended.
    pub(crate) fn snapshot(&self) -> u64 {
        // ORDER(srcu-snapshot): Full fence between the caller's unlinking and the look at `seq`.
        // Partner: the heavy fence of the grace period's first scan, after it made `seq` odd. If we
        // read the number from before, readers behind that scan see the unlinking. Model: loom
        // `grace_periods_are_shared`.
        if !mutant("no_fence_in_snapshot") {
            fence(Ordering::SeqCst);
        }
        let seq = self.updater.seq.load(Ordering::Relaxed);
        // Even: the next one. Odd: not the one under way, whose scan may have been before the
        // unlinking, but the one after.
        let ahead = if mutant("joins_running_grace_period") {
            2
        } else {
            3
        };
        (seq + ahead) & !1
    }

    pub(crate) fn passed(&self, want: u64) -> bool {
        // ORDER(srcu-ended): Acquire for what the readers did, which the thread that ended it
        // acquired from them. Partner: the Release in `end`.
        self.updater.seq.load(Ordering::Acquire) >= want
    }

    /// Waits for all sections that began before. The caller is in none of them.
    pub(crate) fn synchronize(&self) {
        let want = self.snapshot();
        let mut spun = false;
        loop {
            // Read before the scan, so that what happens after it ends the sleep.
            let seen = self.updater.event.now();
            let bank = {
                let mut gp = self.updater.gp.lock();
                if self.passed(want) {
                    return;
                }
                if spun {
                    gp.interest |= UPDATERS;
                }
                match self.step(&mut gp, UPDATERS) {
                    Step::Ended => continue,
                    Step::Blocked(bank) => bank,
                }
            };
            if spun {
                self.updater.event.wait(seen);
            } else {
                spun = true;
                (0..SPINS)
                    .take_while(|_| !self.looks_quiet(bank))
                    .for_each(|_| spin_loop());
            }
        }
    }

    /// Moves grace periods on, without waiting, until `want` has passed; if it has not, the
    /// reclaimer will be told when it makes sense to try again.
    pub(crate) fn drive(&self, want: u64) -> bool {
        while !self.passed(want) {
            let mut gp = self.updater.gp.lock();
            if self.passed(want) {
                break;
            }
            gp.interest |= RECLAIMER;
            if let Step::Blocked(_) = self.step(&mut gp, RECLAIMER) {
                return false;
            }
        }
        true
    }

    /// Moves the grace period as far as it gets, beginning one if there is none.
    fn step(&self, gp: &mut Gp, who: u32) -> Step {
        let Announced { bank, interest } = gp.announced;
        if interest != 0 && interest == gp.interest && !self.looks_quiet(bank) {
            // The reader that ends the last section tells us, so another heavy fence would bring
            // nothing.
            return Step::Blocked(bank);
        }
        let seq = self.updater.seq.load(Ordering::Relaxed);
        if seq & 1 == 0 {
            gp.open = [true; 2];
            if mutant("one_bank") {
                gp.open[self.index.load(Ordering::Relaxed) & 1 ^ 1] = false;
            }
            // ORDER(srcu-snapshot): Before the heavy fence in `scan`; partner in `snapshot`.
            self.updater.seq.store(seq + 1, Ordering::Relaxed);
        }
        loop {
            self.scan(&mut gp.open);
            if gp.open == [false; 2] {
                self.end(gp, who);
                return Step::Ended;
            }
            let index = self.index.load(Ordering::Relaxed);
            let mut stale = index & 1 ^ 1;
            if !gp.open[stale] {
                // Relaxed: readers may use either bank at any time; this only lets the other one
                // drain.
                self.index.store(index ^ 1, Ordering::Relaxed);
                stale ^= 1;
            }
            let announce = Announced {
                bank: stale,
                interest: gp.interest,
            };
            if gp.interest == 0 || gp.announced == announce {
                return Step::Blocked(stale);
            }
            self.waiting[stale ^ 1].store(0, Ordering::Relaxed);
            self.waiting[stale].store(gp.interest, Ordering::Relaxed);
            gp.announced = announce;
            // ORDER(srcu-wake): Between the announcement and another look at the ends. Partner: the
            // light fence between the end of a section and its look at `waiting`. Either the reader
            // sees the announcement, or we see the end. (The fence in `scan` comes after its look
            // at the ends.) Model: loom `a_wake_up_is_not_lost`.
            if !mutant("no_fence_after_announcement") {
                barrier::heavy();
            }
            if mutant("no_look_after_announcement") || !self.looks_quiet(stale) {
                return Step::Blocked(stale);
            }
        }
    }

    /// Clears `open` for the banks found quiet.
    fn scan(&self, open: &mut [bool; 2]) {
        let swapped = mutant("locks_before_unlocks");
        let first = if swapped {
            self.locked()
        } else {
            self.unlocked()
        };
        // ORDER(srcu-enter): Between the unlinking and the sum of beginnings. Partner: the light
        // fence of a reader between its count and its first read. Either the sum has the reader, or
        // the reader sees the unlinking. ORDER(srcu-scan): Between the sums: every end summed has
        // its beginning summed too, so that equal sums mean that no section counted is open.
        // Partner: the program order of a section. Model: loom `s_86_a_late_reader_is_not_missed`.
        if !mutant("no_heavy_fence") {
            barrier::heavy();
        }
        let second = if swapped {
            self.unlocked()
        } else {
            self.locked()
        };
        for bank in 0..2 {
            open[bank] &= first[bank] != second[bank];
        }
    }

    fn unlocked(&self) -> [usize; 2] {
        self.sum(|counters, bank| counters.unlocked(bank))
    }

    fn locked(&self) -> [usize; 2] {
        self.sum(|counters, bank| counters.locked(bank))
    }

    fn sum(&self, count: impl Fn(&Counters, usize) -> usize) -> [usize; 2] {
        let mut sums = [0usize; 2];
        self.table.each(|slot| {
            for (bank, sum) in sums.iter_mut().enumerate() {
                *sum = sum.wrapping_add(count(&slot.local, bank));
                if !mutant("moved_not_counted") {
                    *sum = sum.wrapping_add(count(&slot.moved, bank));
                }
            }
        });
        sums
    }

    /// A look without a fence between the sums. Quiet may be wrong and wants a `scan`. In use may
    /// be late: then a section has ended whose end has not reached us yet.
    fn looks_quiet(&self, bank: usize) -> bool {
        self.unlocked()[bank] == self.locked()[bank]
    }

    fn end(&self, gp: &mut Gp, who: u32) {
        let interest = std::mem::replace(gp, Gp::IDLE).interest;
        self.forget_interest();
        let seq = self.updater.seq.load(Ordering::Relaxed);
        // ORDER(srcu-ended): Release, partner in `passed`.
        self.updater.seq.store(seq + 1, Ordering::Release);
        self.tell(interest & !(who & RECLAIMER));
    }

    /// A reader has ended a section of a bank that is waited for.
    #[cold]
    pub(crate) fn section_ended(&self, bank: usize) {
        // ORDER(srcu-wake): Behind the reader's light fence, as the load that brought us here.
        self.tell(self.waiting[bank].load(Ordering::Relaxed));
    }

    fn forget_interest(&self) {
        for bank in &self.waiting {
            bank.store(0, Ordering::Relaxed);
        }
    }

    fn tell(&self, interest: u32) {
        if interest & UPDATERS != 0 {
            self.updater.event.advance();
        }
        if interest & RECLAIMER != 0 {
            inbox::schedule(self);
        }
    }

    /// Whether a section of any thread is open. Exact if none begins or ends during the call.
    pub(crate) fn any_open(&self) -> bool {
        self.unlocked() != self.locked()
    }

    /// Begins the grace period under way again, in the child of a fork: its mover may have been in
    /// the middle of it.
    #[cfg(not(mmun_loom))]
    pub(crate) fn restart(&self) {
        if self.updater.seq.load(Ordering::Relaxed) & 1 == 1 {
            *self.updater.gp.lock() = Gp {
                open: [true; 2],
                ..Gp::IDLE
            };
            self.forget_interest();
        }
    }
}
