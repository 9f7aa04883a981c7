//! Grace periods: a state machine that any thread can advance, and in which no thread waits.
//!
//! Sections count in one of two banks. A bank is *quiet* if a scan finds as many ends as
//! beginnings. A grace period ends when each bank has been found quiet once since it began. If no
//! section is open, one scan of both banks is enough. Otherwise new sections are sent to a bank
//! that has already been found quiet, and the other bank drains.
//!
//! 1. *idle*: `seq` is even.
//! 2. *scan*: `seq` is odd. `open` says which banks have not been found quiet.
//! 3. *blocked*: a scan found the stale bank (the bank that `index` does not select) still in use.
//!    Only readers that loaded `index` before its last change still begin sections in that bank. If
//!    a thread must be notified of the end, `waiting` names the bank and the threads to notify. The
//!    thread that wrote `waiting` has then checked the bank again.
//! 4. Both banks are quiet: `seq` is advanced, interested threads are notified, and the state is
//!    idle again.
//!
//! Why scan both banks, and not only the one in use? A reader may have loaded the index and then
//! been preempted before it counted. Meanwhile, grace periods may have switched the banks once or
//! more. So the reader may count in the bank in use or in the stale bank. Only a scan of both banks
//! in every grace period is certain to see the reader. `docs/ordering.md` has the whole argument.

use super::barrier;
use super::slot::Counters;
use super::state::progress::{Announced, Gp, RECLAIMER, UPDATERS};
use super::state::{State, inbox};
use crate::sync::{Ordering, fence, mutant, spin_loop};

/// How many times a waiting updater polls the counters at most before it sleeps.
const SPINS: usize = if cfg!(mmun_loom) { 0 } else { 200 };

enum Step {
    Ended,
    /// This bank is still in use.
    Blocked(usize),
}

impl State {
    /// Returns the value of `seq` at which a grace period has begun and ended after this call.
    pub(crate) fn snapshot(&self) -> u64 {
        // ORDER(srcu-snapshot): full fence between the caller's unlinking and the load of `seq`.
        // Partner: the heavy fence of the grace period's first scan, after `seq` became odd. If
        // this thread reads the old `seq`, readers that begin after that scan see the unlinking.
        // Model: loom `grace_periods_are_shared`.
        if !mutant("no_fence_in_snapshot") {
            fence(Ordering::SeqCst);
        }
        let seq = self.updater.seq.load(Ordering::Relaxed);
        // If `seq` is even, the next grace period suffices. If `seq` is odd, the current grace
        // period does not suffice, because its scan may have come before the unlinking. The grace
        // period after it does.
        let ahead = if mutant("joins_running_grace_period") {
            2
        } else {
            3
        };
        (seq + ahead) & !1
    }

    pub(crate) fn passed(&self, want: u64) -> bool {
        // ORDER(srcu-ended): Acquire, for the readers' accesses, which the thread that ended the
        // grace period has acquired from the readers. Partner: the Release in `end`.
        self.updater.seq.load(Ordering::Acquire) >= want
    }

    /// Waits for all sections that began before the call. The caller is in none of them.
    pub(crate) fn synchronize(&self) {
        let want = self.snapshot();
        let mut spun = false;
        loop {
            // Read the event's count before the scan, so that any later change ends the sleep.
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

    /// Advances grace periods without waiting, until `want` has passed. If a section prevents that,
    /// returns false, and the reclaimer will be notified when another attempt makes sense.
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

    /// Begins a grace period if none is in progress, and advances it as far as possible.
    fn step(&self, gp: &mut Gp, who: u32) -> Step {
        let Announced { bank, interest } = gp.announced;
        if interest != 0 && interest == gp.interest && !self.looks_quiet(bank) {
            // The bank is still in use, and the interested threads are announced: the reader that
            // ends the last section notifies them. Another heavy fence would achieve nothing.
            return Step::Blocked(bank);
        }
        let seq = self.updater.seq.load(Ordering::Relaxed);
        if seq & 1 == 0 {
            gp.open = [true; 2];
            if mutant("one_bank") {
                gp.open[self.index.load(Ordering::Relaxed) & 1 ^ 1] = false;
            }
            // ORDER(srcu-snapshot): this store comes before the heavy fence in `scan`. Partner: in
            // `snapshot`.
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
                // Relaxed: readers may use either bank at any time. The switch only lets the other
                // bank drain.
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
            // ORDER(srcu-wake): heavy fence between the announcement and another check of the ends.
            // Partner: the light fence between the end of a section and the load of `waiting`. If
            // the announcement comes first, the reader sees it; if the end comes first, the check
            // sees the end. (The fence in `scan` does not help, because it comes after the scan has
            // read the ends.) Model: loom `a_wake_up_is_not_lost`.
            if !mutant("no_fence_after_announcement") {
                barrier::heavy();
            }
            if mutant("no_look_after_announcement") || !self.looks_quiet(stale) {
                return Step::Blocked(stale);
            }
        }
    }

    /// Clears `open` for the banks that are found quiet.
    fn scan(&self, open: &mut [bool; 2]) {
        let swapped = mutant("locks_before_unlocks");
        let first = if swapped {
            self.locked()
        } else {
            self.unlocked()
        };
        // ORDER(srcu-enter): heavy fence between the unlinking and the sum of beginnings. Partner:
        // the light fence of a reader between its count and its first read. If the reader's count
        // comes first, the sum contains the reader; if the heavy fence comes first, the reader sees
        // the unlinking.
        // ORDER(srcu-scan): heavy fence between the two sums. For every end in the first sum, the
        // second contains the beginning. So equal sums mean that no counted section is open.
        // Partner: the program order of a section. Model: loom
        // `a_later_section_does_not_stand_for_an_earlier_one`.
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

    /// Checks a bank without a fence between the sums. The answer "quiet" may be wrong, and a
    /// `scan` must confirm it. The answer "in use" may be outdated: the last section may have ended
    /// without this thread seeing its end yet.
    fn looks_quiet(&self, bank: usize) -> bool {
        self.unlocked()[bank] == self.locked()[bank]
    }

    fn end(&self, gp: &mut Gp, who: u32) {
        let interest = std::mem::replace(gp, Gp::IDLE).interest;
        self.forget_interest();
        let seq = self.updater.seq.load(Ordering::Relaxed);
        // ORDER(srcu-ended): Release; partner in `passed`.
        self.updater.seq.store(seq + 1, Ordering::Release);
        self.tell(interest & !(who & RECLAIMER));
    }

    /// Notifies the threads that wait for this bank. The caller is a reader that has ended a
    /// section of the bank.
    #[cold]
    pub(crate) fn section_ended(&self, bank: usize) {
        // ORDER(srcu-wake): this load comes after the reader's light fence, like the load in the
        // caller.
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

    /// Tells whether a section of any thread is open. Exact if none begins or ends during the call.
    pub(crate) fn any_open(&self) -> bool {
        self.unlocked() != self.locked()
    }

    /// Restarts the current grace period in the child of a fork, because the thread that was
    /// advancing it does not exist there.
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
