//! The listener: a thread in the vault's descriptor table that waits for records and makes another
//! thread run the callbacks.
//!
//! A wake-up for each record would be expensive, and a client that checks at every use needs no
//! wake-up. So only the first record after a pause wakes the listener. The program itself notes in
//! `awake` that it has sent this wake-up. It sends no more, even if the listener does not run for a
//! while on a busy machine: a wake-up interrupts the processor, which takes microseconds in a
//! virtual machine. The listener then checks for new records once a millisecond, or less often
//! while a callback takes long. After a check that finds all records passed on, the listener sleeps
//! again.
//!
//! The listener sleeps in `poll`. After a wake-up `poll` looks at the ring, and sleeps on if the
//! ring is empty. So a thread that takes in the record must not empty the ring: see `Ring::pop`.
//!
//! The listener also closes machine B after a time without waits, because B costs each change of
//! this address space some time. If a process fills its cache now and then, B would be made anew
//! each time. So if B is made again soon after it was closed, it stays four times as long, at most
//! a second.

use super::layout::{awake, header};
use super::machine::Machines;
use super::programs::{load_resolver, offsets, this_kernel_may_skip};
use super::{Inner, kernel_error};
use crate::Error;
use crate::vault::Letterbox;
use srcu::Thread;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long machine B stays without waits: at first, and at most.
const LEASE: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(1)];
/// If B is made again within this time after it was closed, it was closed too soon.
const SOON: Duration = Duration::from_secs(1);
/// How often an idle listener checks whether the kernel skipped runs.
const SECOND: Duration = Duration::from_secs(1);
/// If there are more hits than this between two checks, the listener makes B without a request:
/// with B, the program recognises the events of other address spaces.
const FLOOD: u64 = 64;
/// If on average at least this many hits are ignored in a millisecond, the listener keeps B.
const NOISE: u64 = 1;

/// Starts the listener. The caller is the vault's thread, so the listener shares the vault's
/// descriptor table.
pub(super) fn start(
    machines: &mut Machines,
    inner: &Arc<Inner>,
    ring: OwnedFd,
) -> Result<(), Error> {
    let failed = |call| move |error| kernel_error(call, error);
    let nudge = crate::wait::event_fd().map_err(failed("eventfd"))?;
    let nudged = nudge.try_clone().map_err(failed("dup"))?;
    let private = machines.private().map_err(failed("dup"))?;
    let (shared, vault) = (Arc::clone(inner), machines.letterbox());
    let run = move || listen(&shared, &ring, &nudged, private, &vault);
    let thread = Thread::spawn(c"mmu-listen", run).map_err(failed("start of a thread"))?;
    machines.set_listener(Arc::clone(inner), nudge, thread);
    Ok(())
}

fn listen(
    inner: &Arc<Inner>,
    ring: &OwnedFd,
    nudge: &OwnedFd,
    private: Option<OwnedFd>,
    vault: &Letterbox<Machines>,
) {
    // Loading the resolver takes some milliseconds, so the start of the source does not wait for
    // it. Until the resolver is loaded, waits make machines.
    let load = |private: &OwnedFd| load_resolver(private, offsets()?).ok();
    if let Some(resolver) = private.as_ref().and_then(load) {
        vault.post(move |machines| machines.set_resolver(resolver));
    }
    drop(private);
    let mut lease = Lease::new();
    let mut nap = 1;
    let may_skip = this_kernel_may_skip();
    let mut asked = Instant::now();
    let begun = Arc::clone(inner);
    // ORDER(source-begun): Release; it publishes no data. Partner: the load in `wait_for_threads`.
    vault.post(move |_| begun.has_begun.store(true, Ordering::Release));
    loop {
        if inner.wants_a_call() {
            // Without B and without records the listener has no work, except to check for skipped
            // runs.
            let patience = inner.waits.has_b().then_some(lease.length);
            crate::wait::readable(
                ring.as_fd(),
                nudge.as_fd(),
                Some(patience.unwrap_or(SECOND)),
            );
            crate::wait::clear(nudge.as_fd());
        }
        inner
            .header
            .u64(header::AWAKE)
            .store(awake::YES, Ordering::Relaxed);
        let (handled, generation) = (inner.handled(), inner.generation());
        std::thread::sleep(Duration::from_millis(nap));
        // ORDER(source-stop): Acquire. Partner: the store in the drop of `Kernel`.
        if inner.stop.load(Ordering::Acquire) {
            return;
        }
        if !inner.is_caught_up() {
            inner.wake_teller();
        }
        // Back off while a callback takes long.
        nap = if inner.handled() != handled || inner.is_caught_up() {
            1
        } else {
            (2 * nap).min(64)
        };
        let is_flood = inner.generation() - generation > FLOOD;
        if is_flood && lease.suspects_others() && !inner.waits.has_b() {
            let shared = Arc::clone(inner);
            vault.post(move |machines| machines.make_b(&shared));
        }
        lease.look(inner, vault);
        // A skipped run is an event that was not counted.
        let shared = Arc::clone(inner);
        // The release may not tell: a distributor can bring the change of Linux 7.0 to an older
        // kernel.
        if may_skip || asked.elapsed() >= SECOND {
            asked = Instant::now();
            vault.post(move |machines| machines.look_for_missed_runs(&shared, may_skip));
        }
    }
}

/// How long B stays.
struct Lease {
    length: Duration,
    /// The state at the last check of B's use.
    at: Instant,
    begun: u64,
    ignored: u64,
    generation: u64,
    had_b: bool,
    /// When B was last closed.
    ended: Option<Instant>,
    /// Whether B was closed although many changes were counted: all of this address space.
    is_own: bool,
}

impl Lease {
    fn new() -> Self {
        Self {
            length: LEASE[0],
            at: Instant::now(),
            begun: 0,
            ignored: 0,
            generation: 0,
            had_b: false,
            ended: None,
            is_own: false,
        }
    }

    /// Tells whether many records may come from other address spaces.
    fn suspects_others(&self) -> bool {
        !self.is_own || self.ended.is_none_or(|ended| ended.elapsed() >= SOON)
    }

    /// Closes B if it was not used for a while.
    fn look(&mut self, inner: &Arc<Inner>, vault: &Letterbox<Machines>) {
        let has_b = inner.waits.has_b();
        if has_b && !self.had_b {
            let soon = self.ended.is_some_and(|ended| ended.elapsed() < SOON);
            self.length = if soon {
                (4 * self.length).min(LEASE[1])
            } else {
                LEASE[0]
            };
        } else if self.at.elapsed() < self.length {
            return;
        }
        let begun = inner.waits.begun();
        let ignored = inner.header.u64(header::IGNORED).load(Ordering::Relaxed);
        let generation = inner.generation();
        let noise = NOISE * self.length.as_millis() as u64;
        // Each change of this address space is ignored once, at B's tracepoint, and counted at A's.
        let own = generation.wrapping_sub(self.generation);
        let others = ignored.wrapping_sub(self.ignored).saturating_sub(own);
        if has_b && self.had_b && begun == self.begun && others < noise {
            let shared = Arc::clone(inner);
            vault.post(move |machines| machines.close_idle_b(&shared, begun));
            self.ended = Some(Instant::now());
            self.is_own = own >= noise;
        }
        self.at = Instant::now();
        (self.begun, self.ignored, self.generation) = (begun, ignored, generation);
        self.had_b = has_b;
    }
}
