//! The thread that runs the callbacks of all domains.
//!
//! A thread that gives a domain work puts the domain into the inbox. Such a thread queues a
//! callback into an empty queue, calls `start_poll`, or ends the section or the grace period that
//! the batch waits for. The reclaimer takes one domain at a time, advances it as far as possible
//! without waiting, and forgets it. So a domain that waits for a reader does not delay the others,
//! and the reclaimer sleeps whenever no domain can advance.
//!
//! 1. *idle*: the queue and the batch are empty, `busy` is clear.
//! 2. *scheduled*: the domain is in the inbox, `scheduled` is set, and the inbox holds a count.
//! 3. *turn*: the reclaimer has taken the domain. It clears `scheduled` before it reads the queue,
//!    so later work schedules the domain again.
//! 4. *blocked*: the batch waits for a grace period. `busy` is set, and the batch holds a count.
//!    The thread that ends the grace period, or the section that it waits for, schedules the
//!    domain.
//!
//! # Safety
//! A domain from the inbox comes with a count of its state. The turn releases that count.

#[cfg(not(mmun_loom))]
#[deny(unsafe_code)]
mod status;

use super::run::run;
use super::state::State;
use super::state::inbox::schedule;
use crate::sync::{Ordering, mutant};
use std::ptr::NonNull;

/// How many callbacks of a domain run at most in one turn, before other domains get their turns.
const TURN: usize = 256;

/// If the last batch was at least this large, the reclaimer pauses before it takes the next one, so
/// that more callbacks share one grace period. Each grace period slows down the threads that queue
/// callbacks, because its heavy fences interrupt them. A call of `barrier` ends the pause.
const STORM: usize = 64;

/// Advances a domain as far as possible without waiting, and releases the inbox's count of it.
///
/// # Safety
/// `state` was taken from the inbox, and the caller is the reclaimer or acts in its place.
unsafe fn turn(state: NonNull<State>) {
    {
        // SAFETY: the state must be alive. The count that came with it is released only below.
        let state = unsafe { state.as_ref() };
        // ORDER(srcu-scheduled): cleared before the queue is loaded; partner in `schedule`.
        if !mutant("scheduled_cleared_late") {
            state.pending.scheduled.swap(false, Ordering::AcqRel);
        }
        work(state);
        if mutant("scheduled_cleared_late") {
            state.pending.scheduled.swap(false, Ordering::AcqRel);
        }
    }
    // SAFETY: `release` needs a count that the caller owns, which is that of the inbox.
    unsafe { State::release(state.as_ptr()) };
}

/// Advances a domain. The caller is the reclaimer, or acts in its place.
fn work(state: &State) {
    let pending = &state.pending;
    let batch = &state.updater.batch;
    if batch.is_empty() {
        if batch.taken() >= STORM {
            pause();
        }
        // ORDER(srcu-busy): `busy` is set before the swap that empties the queue, and that swap
        // releases the store. So a barrier that finds the queue empty finds `busy` set. Partner:
        // `is_idle`. Model: loom `a_barrier_waits_for_the_calls_of_both_threads`.
        pending.busy.store(true, Ordering::Relaxed);
        batch.fill(&pending.queue, || state.snapshot());
        if batch.is_empty() {
            pending.busy.store(false, Ordering::Relaxed);
        } else {
            state.retain();
        }
    }
    // ORDER(srcu-polled): Relaxed: `start_poll` stores before it schedules, ORDER(srcu-scheduled).
    if batch.is_empty() {
        state.drive(pending.polled.load(Ordering::Relaxed));
        return;
    }
    if !state.drive(batch.want()) {
        return;
    }
    for _ in 0..TURN {
        if let Some(callback) = batch.take_one() {
            // SAFETY: the callback must come from the batch of `state`, where `take_one` took it.
            unsafe { run(callback, state) };
        }
        if batch.is_empty() {
            // ORDER(srcu-busy): Release: a thread that finds `busy` clear sees that the callbacks
            // are done. Partner: `is_idle`.
            pending.busy.store(false, Ordering::Release);
            // SAFETY: `release` needs a count that the caller owns. This is the count of the batch,
            // which is now empty. The count of the inbox keeps the state alive, or in `barrier`
            // that of the handle.
            unsafe { State::release(state) };
            break;
        }
    }
    // Further callbacks wait until the other domains have had their turns.
    let polled = || state.passed(pending.polled.load(Ordering::Relaxed));
    if !batch.is_empty() || !pending.queue.load(Ordering::Relaxed).is_null() || !polled() {
        schedule(state);
    }
}

/// Tells whether every callback queued before the call has returned.
pub(crate) fn is_idle(state: &State) -> bool {
    // ORDER(srcu-busy): Acquire twice, in this order. If this thread reads that the reclaimer has
    // emptied the queue, it then reads `busy` either as set before that, or as cleared after the
    // callbacks. Partners: `fill`, `work`.
    let queued = !state.pending.queue.load(Ordering::Acquire).is_null();
    let busy = state.pending.busy.load(Ordering::Acquire) && !mutant("idle_ignores_busy");
    !queued && !busy
}

#[cfg(not(mmun_loom))]
use thread::pause;
#[cfg(not(mmun_loom))]
pub(crate) use thread::{
    adopt, after_fork, barrier, drive_polled, lose, start, start_if_inherited, start_unless_forked,
};
#[cfg(not(mmun_loom))]
pub use thread::{reclaim_here, reclaimer_sleeps};

#[cfg(not(mmun_loom))]
mod thread {
    use super::status::{GONE, HELD, NEVER, RUNNING, Status};
    use super::{NonNull, Ordering, State, is_idle, schedule, turn, work};
    use crate::raw::callback::push_boxed;
    use crate::raw::current;
    use crate::raw::event::Event;
    use crate::raw::process;
    use crate::raw::state::inbox::INBOX;
    use crate::raw::thread::Thread;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    static STATUS: Status = Status::new();

    /// Returns the status. First repairs the domains in a child that has run no fork handler.
    fn status() -> u8 {
        process::check();
        STATUS.get()
    }

    /// A thread that begins to wait for a callback advances this event, which ends a pause.
    static HURRY: Event = Event::new();
    const PAUSE_NANOSECONDS: i64 = 20_000;
    const ASK_AGAIN_NANOSECONDS: i64 = 100_000_000;
    /// How long `barrier` sleeps between two turns in place of the reclaimer.
    const STAND_IN_NANOSECONDS: i64 = 1_000_000;

    pub(super) fn pause() {
        HURRY.wait_at_most(HURRY.now(), PAUSE_NANOSECONDS);
    }

    fn run() -> ! {
        current::set_reclaimer(true);
        loop {
            let seen = INBOX.event.now();
            match INBOX.take() {
                // SAFETY: `turn` needs a state from the inbox, and the reclaimer as its caller.
                // This is the only reclaimer thread.
                Some(state) => unsafe { turn(state) },
                None => INBOX.event.wait(seen),
            }
        }
    }

    /// Starts the reclaimer if it is not running. Allocates only in that case.
    ///
    /// If the system gives no thread (`RLIMIT_NPROC`, the `pids.max` of a control group), the work
    /// stays queued. Later calls try again, and `barrier` does the work of its own domain. Until
    /// then, a domain that has queued work keeps its page, also if the domain is dropped.
    pub(crate) fn start() {
        if status() != RUNNING {
            start_if_absent();
        }
    }

    #[cold]
    fn start_if_absent() {
        STATUS.start(try_start);
    }

    /// Like `start`, but does nothing if the reclaimer exists only in the parent of this child, or
    /// after a failed start. In both cases a later call of `start` starts the reclaimer. This
    /// function must not allocate there, because the caller may be inside an allocator, and relies
    /// on its earlier call of `prepare`.
    pub(crate) fn start_unless_forked() {
        match status() {
            NEVER => start_if_absent(),
            HELD => drop(STATUS.want()),
            _ => {}
        }
    }

    /// Starts the reclaimer in the child of a fork that has inherited work.
    pub(crate) fn start_if_inherited() {
        if status() == GONE && !INBOX.is_empty() {
            start();
        }
    }

    /// Advances the grace period of `start_poll` if there is no reclaimer. Never waits.
    pub(crate) fn drive_polled(state: &State) {
        // A grace period has a lock of its own, so this thread need not act for the reclaimer. If
        // the grace period is over, the domain is scheduled, because its batch may have waited for
        // the same grace period.
        if is_absent() && state.drive(state.pending.polled.load(Ordering::Relaxed)) {
            schedule(state);
        }
    }

    /// For a thread that waits for a callback without `barrier`: starts the reclaimer. If the
    /// system gives no thread, this call runs the callbacks that can run now, of all domains, until
    /// `done` says that the caller's callback has run. Returns whether the reclaimer runs. If so,
    /// the caller can sleep until the callback wakes it. If not, the caller must repeat this call
    /// until the callback has run. The result is false also while another thread starts the
    /// reclaimer or acts in its place.
    ///
    /// The caller must hold no lock that a callback takes.
    #[doc(hidden)]
    pub fn reclaim_here(done: impl Fn() -> bool) -> bool {
        if is_absent() {
            start_or(|| {
                current::as_reclaimer(|| {
                    // The inbox is first in, first out: a callback that always queues another one
                    // does not keep the caller's domain from its turn.
                    while !done() {
                        let Some(state) = INBOX.take() else { break };
                        // SAFETY: `turn` needs a state from the inbox, and the reclaimer as its
                        // caller. This thread acts in its place.
                        unsafe { turn(state) };
                    }
                });
            });
        }
        status() == RUNNING
    }

    /// Whether the reclaimer has no work, and sleeps or is about to: it is in no function of libc
    /// but `syscall`. True if there is no reclaimer. True also in the reclaimer itself, because it
    /// cannot wait for its own sleep.
    #[doc(hidden)]
    pub fn reclaimer_sleeps() -> bool {
        let is_there = matches!(status(), HELD | RUNNING);
        !is_there || current::is_reclaimer() || (INBOX.is_empty() && INBOX.event.has_sleepers())
    }

    /// Tells whether there is no reclaimer, and no thread starts it or acts in its place.
    fn is_absent() -> bool {
        matches!(status(), NEVER | GONE)
    }

    /// Starts the reclaimer. If the system gives no thread, calls `instead`.
    #[cold]
    fn start_or(instead: impl FnOnce()) {
        let has_held = STATUS.holding(|| {
            let status = try_start();
            if status == GONE {
                instead();
            }
            status
        });
        if has_held {
            STATUS.serve(try_start);
        }
    }

    /// Tries to start the thread, and returns the new status.
    fn try_start() -> u8 {
        match Thread::spawn(c"srcu-reclaimer", || run()) {
            Ok(thread) => {
                thread.detach();
                RUNNING
            }
            Err(_) => GONE,
        }
    }

    /// The object that `barrier` waits on. The object is not on the waiter's stack: in the child of
    /// a fork by another thread, that stack is gone, but the child's queue still points to the
    /// object.
    struct Waiter {
        event: Event,
        done: AtomicBool,
        /// Whether no callback was queued after this one.
        last: AtomicBool,
    }

    /// Waits until all callbacks queued before the call have returned. Returns whether no callback
    /// was queued meanwhile.
    pub(crate) fn barrier(state: &State) -> bool {
        process::check();
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
            // A callback runs on the reclaimer, so it may access the batch.
            let state = domain.get();
            let last = state.updater.batch.is_empty()
                && state.pending.queue.load(Ordering::Relaxed).is_null();
            callback.last.store(last, Ordering::Relaxed);
            // ORDER(srcu-barrier): Release, for the effects of the callbacks before this one.
            // Partner: the Acquire below.
            callback.done.store(true, Ordering::Release);
            callback.event.advance();
        });
        if first {
            schedule(state);
        }
        HURRY.advance();
        loop {
            let seen = waiter.event.now();
            // ORDER(srcu-barrier): Acquire; partner above.
            if waiter.done.load(Ordering::Acquire) {
                return waiter.last.load(Ordering::Relaxed);
            }
            let (mut stood_in, mut has_more) = (false, false);
            if is_absent() {
                start_or(|| {
                    // A turn of this domain only, because a callback of another domain may take a
                    // lock that this thread holds. One turn only, because the status must become
                    // free again. The readers that this domain waits for may themselves wait in
                    // `barrier`, and must then be able to act as the reclaimer.
                    current::as_reclaimer(|| work(state));
                    stood_in = true;
                    let batch = &state.updater.batch;
                    has_more = batch.is_empty() || state.passed(batch.want());
                });
            }
            // If another thread acts as the reclaimer, it may stop at any time. So this thread
            // checks again after a while.
            if stood_in && has_more {
                continue;
            }
            let nanoseconds = match stood_in {
                true => STAND_IN_NANOSECONDS,
                false => ASK_AGAIN_NANOSECONDS,
            };
            waiter.event.wait_at_most(seen, nanoseconds);
        }
    }

    struct Domain(NonNull<State>);
    // SAFETY: `State` is `Sync`, and the pointer is dereferenced only in a callback of that state.
    unsafe impl Send for Domain {}
    impl Domain {
        fn get(&self) -> &State {
            // SAFETY: the state must be alive. This runs in a callback, and its turn keeps the
            // state alive.
            unsafe { self.0.as_ref() }
        }
    }

    /// In the child of a fork: returns whether this thread is the reclaimer. If not, empties the
    /// inbox. Before this call, no domain is marked as scheduled.
    pub(crate) fn after_fork() -> bool {
        if current::is_reclaimer() {
            INBOX.mark_scheduled();
            return true;
        }
        INBOX.after_fork();
        HURRY.after_fork();
        STATUS.after_fork();
        false
    }

    /// In the child of a fork: the reclaimer exists only in the parent.
    pub(crate) fn lose() {
        STATUS.after_fork();
    }

    /// In the child of a fork: puts a domain with work into the inbox.
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
            // The callback that the parent's reclaimer was running does not run again in the child.
            pending.busy.store(batch, Ordering::Relaxed);
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

/// Models have no reclaimer thread: the threads that wait for callbacks act as the reclaimer.
#[cfg(mmun_loom)]
mod model {
    use super::{State, is_idle, turn};
    use crate::raw::current;

    pub(super) fn pause() {}

    pub(crate) fn start() {}

    pub(crate) fn start_unless_forked() {}

    pub(crate) fn start_if_inherited() {}

    pub(crate) fn drive_polled(_: &State) {}

    /// Always true: the threads of a model take the turns themselves.
    #[doc(hidden)]
    pub fn reclaim_here(_: impl Fn() -> bool) -> bool {
        true
    }

    /// Runs one turn if the domain is in the inbox.
    pub(crate) fn take_turn(state: &State) {
        let _acting = state.inbox.acting.lock();
        current::as_reclaimer(|| {
            if let Some(state) = state.inbox.take() {
                // SAFETY: `turn` needs a state from the inbox, and the reclaimer as its caller.
                // The holder of `acting` is the reclaimer.
                unsafe { turn(state) };
            }
        });
    }

    pub(crate) fn barrier(state: &State) -> bool {
        if is_idle(state) {
            return true;
        }
        let _acting = state.inbox.acting.lock();
        current::as_reclaimer(|| {
            loop {
                let seen = state.inbox.event.now();
                if is_idle(state) {
                    return;
                }
                match state.inbox.take() {
                    // SAFETY: `turn` needs a state from the inbox, and the reclaimer as its caller.
                    // The holder of `acting` is the reclaimer.
                    Some(state) => unsafe { turn(state) },
                    None => state.inbox.event.wait(seen),
                }
            }
        });
        true
    }
}
