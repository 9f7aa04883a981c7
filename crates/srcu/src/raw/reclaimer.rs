//! The one thread that runs the callbacks of all domains.
//!
//! A domain with something to do is put into the inbox by the caller that gave it something to do:
//! the first call into an empty queue, `start_poll`, or the reader that ends a section which a
//! batch waits for. The reclaimer takes one domain at a time, moves it as far as it gets without
//! waiting, and forgets it. So a domain that waits for a reader costs the others nothing, and the
//! thread sleeps whenever no domain can move.
//!
//! 1. *idle*: nothing queued, batch empty, `busy` clear.
//! 2. *scheduled*: in the inbox, `scheduled` set, counted.
//! 3. *turn*: taken; `scheduled` is cleared before anything is looked at, so what comes later
//!    schedules again.
//! 4. *blocked*: the batch waits for a grace period; `busy` set, counted. The thread that ends the
//!    grace period, or the section it waits for, schedules the domain.
//!
//! # Safety
//! A domain that comes out of the inbox brings a count of its state, which its turn gives up.

use super::run::run;
use super::state::State;
use super::state::inbox::schedule;
use crate::sync::{Ordering, mutant};
use std::ptr::NonNull;

/// Callbacks run in one turn before other domains get theirs.
const TURN: usize = 256;

/// After a batch as large as this, callbacks are coming in faster than grace periods pay for
/// themselves: each interrupts the threads that queue them twice. The reclaimer then pauses, unless
/// a thread waits for it, and takes more at once.
const STORM: usize = 64;

/// Moves a domain as far as it gets without waiting, and gives up the inbox's count of it.
///
/// # Safety
/// `state` was taken from the inbox, and the caller is the reclaimer.
unsafe fn turn(state: NonNull<State>) {
    {
        // SAFETY: The state must be alive: the count that came with it is given up below.
        let state = unsafe { state.as_ref() };
        // ORDER(srcu-scheduled): Cleared before the look at the queue; partner in `schedule`.
        if !mutant("scheduled_cleared_late") {
            state.pending.scheduled.swap(false, Ordering::AcqRel);
        }
        work(state);
        if mutant("scheduled_cleared_late") {
            state.pending.scheduled.swap(false, Ordering::AcqRel);
        }
    }
    // SAFETY: Wants the caller's count: that of the inbox.
    unsafe { State::release(state.as_ptr()) };
}

/// The caller is the reclaimer, or stands in for it.
fn work(state: &State) {
    let pending = &state.pending;
    let batch = &state.updater.batch;
    if batch.is_empty() {
        if batch.taken() >= STORM {
            pause();
        }
        // ORDER(srcu-busy): Set before the queue is emptied, whose swap releases it: a barrier that
        // finds the queue empty finds this set. Partner: `is_idle`. Model: loom
        // `a_barrier_waits_for_the_calls_of_both_threads`.
        pending.busy.store(true, Ordering::Relaxed);
        batch.fill(&pending.queue, || state.snapshot());
        if batch.is_empty() {
            pending.busy.store(false, Ordering::Relaxed);
        } else {
            state.retain();
        }
    }
    // ORDER(srcu-polled): Relaxed: `start_poll` schedules after it has stored,
    // ORDER(srcu-scheduled).
    if batch.is_empty() {
        state.drive(pending.polled.load(Ordering::Relaxed));
        return;
    }
    if !state.drive(batch.want()) {
        return;
    }
    for _ in 0..TURN {
        if let Some(callback) = batch.take_one() {
            // SAFETY: It must be from the batch, just now: it is.
            unsafe { run(callback, state) };
        }
        if batch.is_empty() {
            // ORDER(srcu-busy): Release: a thread that finds it clear sees the callbacks done.
            // Partner: `is_idle`.
            pending.busy.store(false, Ordering::Release);
            // SAFETY: Wants a count that is ours: that of the batch, which is empty now. The
            // inbox's keeps the state alive.
            unsafe { State::release(state) };
            break;
        }
    }
    // The rest waits until the other domains had their turns.
    let polled = || state.passed(pending.polled.load(Ordering::Relaxed));
    if !batch.is_empty() || !pending.queue.load(Ordering::Relaxed).is_null() || !polled() {
        schedule(state);
    }
}

/// Whether every callback queued before the call has returned.
pub(crate) fn is_idle(state: &State) -> bool {
    // ORDER(srcu-busy): Acquire twice, in this order. If the reclaimer emptied the queue, we see
    // `busy` as set before that, or as cleared after the callbacks. Partners: `fill`, `work`.
    let queued = !state.pending.queue.load(Ordering::Acquire).is_null();
    let busy = state.pending.busy.load(Ordering::Acquire) && !mutant("idle_ignores_busy");
    !queued && !busy
}

#[cfg(not(mmun_loom))]
use thread::pause;
#[cfg(not(mmun_loom))]
pub use thread::reclaim_here;
#[cfg(not(mmun_loom))]
pub(crate) use thread::{
    adopt, after_fork, barrier, drive_polled, start, start_if_inherited, start_unless_forked,
};

#[cfg(not(mmun_loom))]
mod thread {
    use super::{NonNull, Ordering, State, is_idle, schedule, turn, work};
    use crate::raw::callback::push_boxed;
    use crate::raw::current;
    use crate::raw::event::Event;
    use crate::raw::state::inbox::INBOX;
    use crate::raw::thread::Thread;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU8};

    /// 1. `NEVER` started; 2. `HELD` by a thread that starts the reclaimer or stands in for it;
    /// 3. `RUNNING`; 4. `GONE`: this is the child of a fork, or the system gave no thread.
    static STATUS: AtomicU8 = AtomicU8::new(NEVER);
    const NEVER: u8 = 0;
    const HELD: u8 = 1;
    const RUNNING: u8 = 2;
    const GONE: u8 = 3;

    /// Moves when a thread waits for a callback.
    static HURRY: Event = Event::new();
    const PAUSE_NANOSECONDS: i64 = 20_000;
    const ASK_AGAIN_NANOSECONDS: i64 = 100_000_000;
    /// How long a barrier that stands in sleeps between its turns.
    const STAND_IN_NANOSECONDS: i64 = 1_000_000;

    pub(super) fn pause() {
        HURRY.wait_at_most(HURRY.now(), PAUSE_NANOSECONDS);
    }

    fn run() -> ! {
        current::set_reclaimer(true);
        loop {
            let seen = INBOX.event.now();
            match INBOX.take() {
                // SAFETY: Wants a state from the inbox and the reclaimer: this is its thread, the
                // only one.
                Some(state) => unsafe { turn(state) },
                None => INBOX.event.wait(seen),
            }
        }
    }

    /// Starts the reclaimer if it does not run. Allocates only then.
    ///
    /// If the system gives no thread (`RLIMIT_NPROC`, the `pids.max` of a control group), the work
    /// stays queued. Later calls try again, and a barrier does the work of its own domain.
    pub(crate) fn start() {
        if is_absent() {
            start_or(|| ());
        }
    }

    /// As `start`, but not in the child of a fork and not after a failure. The caller may be inside
    /// an allocator now, and a `prepare` before promised that nothing is allocated.
    pub(crate) fn start_unless_forked() {
        if STATUS.load(Ordering::Relaxed) == NEVER {
            start_or(|| ());
        }
    }

    /// Starts the reclaimer in the child of a fork that inherited something to do.
    pub(crate) fn start_if_inherited() {
        if STATUS.load(Ordering::Relaxed) == GONE && !INBOX.is_empty() {
            start();
        }
    }

    /// Without a reclaimer: moves the grace period that `start_poll` asked for. Never waits.
    pub(crate) fn drive_polled(state: &State) {
        if is_absent() {
            let polled = state.pending.polled.load(Ordering::Relaxed);
            holding(|| {
                state.drive(polled);
                GONE
            });
        }
    }

    /// For a wait for callbacks that is no barrier: starts the reclaimer, or if the system gives no
    /// thread, runs what callbacks of any domain can run now. Says whether the caller can sleep
    /// until a callback wakes it; otherwise it must call this again and again.
    ///
    /// The caller must hold no lock that a callback takes.
    #[doc(hidden)]
    pub fn reclaim_here() -> bool {
        if is_absent() {
            start_or(|| {
                let before = current::set_reclaimer(true);
                while let Some(state) = INBOX.take() {
                    // SAFETY: Wants a state from the inbox, and the reclaimer, for which this
                    // thread stands in.
                    unsafe { turn(state) };
                }
                current::set_reclaimer(before);
            });
        }
        STATUS.load(Ordering::Relaxed) == RUNNING
    }

    /// Relaxed: a thread that starts the reclaimer or stands in for it looks again in `holding`.
    fn is_absent() -> bool {
        matches!(STATUS.load(Ordering::Relaxed), NEVER | GONE)
    }

    /// Starts the reclaimer. If there can be no thread, does `instead` in its place.
    #[cold]
    fn start_or(instead: impl FnOnce()) {
        holding(|| match Thread::spawn(c"srcu-reclaimer", || run()) {
            Ok(thread) => {
                thread.detach();
                RUNNING
            }
            Err(_) => {
                instead();
                GONE
            }
        });
    }

    /// Runs `f` while no other thread starts the reclaimer or stands in for it; the status that `f`
    /// returns follows. Does nothing if another thread does so now, or if the reclaimer runs.
    ///
    /// A status and not a lock: starting a thread allocates, and what that sets off may come here
    /// again.
    fn holding(f: impl FnOnce() -> u8) {
        for status in [NEVER, GONE] {
            // ORDER(srcu-stand-in): Acquire, for the batch as the last holder left it. Partner: the
            // store below.
            let taken = STATUS.compare_exchange(status, HELD, Ordering::Acquire, Ordering::Relaxed);
            if taken.is_ok() {
                // ORDER(srcu-stand-in): Release, partner above. A reclaimer that was started in `f`
                // sees the batch by its start.
                STATUS.store(f(), Ordering::Release);
                return;
            }
        }
    }

    /// What `barrier` waits on. Not on its stack, which a fork in another thread would pull away
    /// under the child's queue.
    struct Waiter {
        event: Event,
        done: AtomicBool,
        /// Nothing was queued behind it.
        last: AtomicBool,
    }

    /// Waits until all callbacks queued before have returned. Says whether none were queued
    /// meanwhile.
    pub(crate) fn barrier(state: &State) -> bool {
        if is_idle(state) {
            return true;
        }
        let waiter = Arc::new(Waiter {
            event: Event::new(),
            done: AtomicBool::new(false),
            last: AtomicBool::new(false),
        });
        let (callback, domain) = (Arc::clone(&waiter), Domain(NonNull::from(state)));
        let first = push_boxed(&state.pending.queue, move || {
            // A callback runs in the reclaimer, so it may look at the batch.
            let state = domain.get();
            let last = state.updater.batch.is_empty()
                && state.pending.queue.load(Ordering::Relaxed).is_null();
            callback.last.store(last, Ordering::Relaxed);
            // ORDER(srcu-barrier): Release for what the callbacks before this one did. Partner: the
            // Acquire below.
            callback.done.store(true, Ordering::Release);
            callback.event.advance();
        });
        if first {
            schedule(state);
        }
        HURRY.advance();
        loop {
            let seen = waiter.event.now();
            // ORDER(srcu-barrier): Acquire, partner above.
            if waiter.done.load(Ordering::Acquire) {
                return waiter.last.load(Ordering::Relaxed);
            }
            let mut stood_in = false;
            if is_absent() {
                start_or(|| {
                    // One turn, and only of this domain: a callback of another one may take a lock
                    // that this thread holds. The role is not kept while this thread waits for
                    // readers: one of them may wait in a barrier that needs it.
                    let before = current::set_reclaimer(true);
                    work(state);
                    current::set_reclaimer(before);
                    stood_in = true;
                });
            }
            // Otherwise ask again after a time: a thread that stands in may give up the role.
            let nanoseconds = match stood_in {
                true => STAND_IN_NANOSECONDS,
                false => ASK_AGAIN_NANOSECONDS,
            };
            waiter.event.wait_at_most(seen, nanoseconds);
        }
    }

    struct Domain(NonNull<State>);
    // SAFETY: `State` is `Sync`; the pointer is followed only in a callback of that state.
    unsafe impl Send for Domain {}
    impl Domain {
        fn get(&self) -> &State {
            // SAFETY: The state must be alive: see `Send`; a turn keeps it.
            unsafe { self.0.as_ref() }
        }
    }

    /// In the child of a fork: says whether this thread is the reclaimer, and if not, forgets the
    /// inbox.
    pub(crate) fn after_fork() -> bool {
        if current::is_reclaimer() {
            return true;
        }
        INBOX.after_fork();
        HURRY.after_fork();
        if STATUS.load(Ordering::Relaxed) != NEVER {
            STATUS.store(GONE, Ordering::Relaxed);
        }
        false
    }

    /// In the child of a fork: puts a domain that has something to do into the inbox.
    pub(crate) fn adopt(state: &State, reclaimer_survived: bool) {
        if !state.is_used() {
            return;
        }
        let pending = &state.pending;
        if !reclaimer_survived {
            state
                .updater
                .batch
                .after_fork(&pending.queue, || state.snapshot());
        }
        let batch = !state.updater.batch.is_empty();
        if !reclaimer_survived {
            // The callback that the reclaimer was in the middle of, in the parent, is not run
            // again.
            pending.busy.store(batch, Ordering::Relaxed);
            pending.scheduled.store(false, Ordering::Relaxed);
            state.set_refs(usize::from(state.owned.load(Ordering::Relaxed)) + usize::from(batch));
        }
        let queued = !pending.queue.load(Ordering::Relaxed).is_null();
        if batch || queued || !state.passed(pending.polled.load(Ordering::Relaxed)) {
            schedule(state);
        }
    }
}

#[cfg(mmun_loom)]
use model::pause;
#[cfg(mmun_loom)]
pub use model::reclaim_here;
#[cfg(mmun_loom)]
pub(crate) use model::{
    barrier, drive_polled, start, start_if_inherited, start_unless_forked, take_turn,
};

/// Models have no thread of ours: the threads that wait for callbacks take the turns.
#[cfg(mmun_loom)]
mod model {
    use super::{State, is_idle, turn};
    use crate::raw::current;

    pub(super) fn pause() {}

    pub(crate) fn start() {}

    pub(crate) fn start_unless_forked() {}

    pub(crate) fn start_if_inherited() {}

    pub(crate) fn drive_polled(_: &State) {}

    /// A model takes the turns itself.
    #[doc(hidden)]
    pub fn reclaim_here() -> bool {
        true
    }

    /// One turn, if the domain is in the inbox.
    pub(crate) fn take_turn(state: &State) {
        let _acting = state.inbox.acting.lock();
        let before = current::set_reclaimer(true);
        if let Some(state) = state.inbox.take() {
            // SAFETY: As in `barrier`.
            unsafe { turn(state) };
        }
        current::set_reclaimer(before);
    }

    pub(crate) fn barrier(state: &State) -> bool {
        if is_idle(state) {
            return true;
        }
        let _acting = state.inbox.acting.lock();
        let before = current::set_reclaimer(true);
        loop {
            let seen = state.inbox.event.now();
            if is_idle(state) {
                break;
            }
            match state.inbox.take() {
                // SAFETY: Wants a state from the inbox and the reclaimer: the holder of `acting` is
                // the reclaimer.
                Some(state) => unsafe { turn(state) },
                None => state.inbox.event.wait(seen),
            }
        }
        current::set_reclaimer(before);
        true
    }
}
