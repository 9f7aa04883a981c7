//! The thread that waits for records, in the vault's descriptor table, and has subscribers told.
//!
//! A client that looks at every use needs no wake-up. So this thread is woken by the first record
//! after a pause, and from then on looks once a millisecond, while the program sends no wake-up.
//! After a millisecond in which everything was handed on it sleeps again.
//!
//! It also closes machine B, which costs each change of this address space something, after a
//! while without waits. A process that fills now and then would make a machine each time: so if
//! one is made again soon after it was closed, it stays four times as long.

use super::layout::header;
use super::machine::Machines;
use super::programs::{load_resolver, may_skip, offsets};
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
/// How long after its end B is made again too soon.
const SOON: Duration = Duration::from_secs(1);
/// How often to look whether runs were skipped.
const SECOND: Duration = Duration::from_secs(1);
/// From this many records in a millisecond on, B is made without a request: with B the program
/// recognises the events of other address spaces.
const FLOOD: u64 = 64;
/// From this many ignored events in a millisecond on, B is kept.
const NOISE: u64 = 1;

/// Starts the thread, in the descriptor table of the vault, whose thread this is.
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
    // After the start, since it takes some milliseconds. Waits make machines until then.
    let load = |private: &OwnedFd| load_resolver(private, offsets()?).ok();
    if let Some(resolver) = private.as_ref().and_then(load) {
        vault.post(move |machines| machines.set_resolver(resolver));
    }
    drop(private);
    let mut lease = Lease::new();
    let mut nap = 1;
    let may_skip =
        may_skip(&std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default());
    let begun = Arc::clone(inner);
    // ORDER(source-begun): Release, for no data. Partner: the load in `wait_for_threads`.
    vault.post(move |_| begun.has_begun.store(true, Ordering::Release));
    loop {
        if inner.wants_a_call() {
            // Only with B is there something to do when nothing happens.
            let patience = inner.waits.has_b().then_some(lease.length);
            crate::wait::readable(
                ring.as_fd(),
                nudge.as_fd(),
                patience.or(may_skip.then_some(SECOND)),
            );
            crate::wait::clear(nudge.as_fd());
        }
        inner.header.u64(header::AWAKE).store(1, Ordering::Relaxed);
        let (handled, generation) = (inner.handled(), inner.generation());
        std::thread::sleep(Duration::from_millis(nap));
        // ORDER(source-stop): Acquire. Partner: the store in the drop of `Kernel`.
        if inner.stop.load(Ordering::Acquire) {
            return;
        }
        if !inner.is_caught_up() {
            inner.wake_teller();
        }
        // A callback may take its time.
        nap = if inner.handled() != handled || inner.is_caught_up() {
            1
        } else {
            (2 * nap).min(64)
        };
        if inner.generation() - generation > FLOOD && !inner.waits.has_b() {
            let shared = Arc::clone(inner);
            vault.post(move |machines| machines.make_b(&shared));
        }
        lease.look(inner, vault);
        // A skipped run is an event that was not counted.
        let shared = Arc::clone(inner);
        if may_skip {
            vault.post(move |machines| machines.look_for_missed_runs(&shared));
        }
    }
}

/// How long B stays.
struct Lease {
    length: Duration,
    /// What was so when its use was looked at last.
    at: Instant,
    begun: u64,
    ignored: u64,
    had_b: bool,
    /// When it ended last.
    ended: Option<Instant>,
}

impl Lease {
    fn new() -> Self {
        Self {
            length: LEASE[0],
            at: Instant::now(),
            begun: 0,
            ignored: 0,
            had_b: false,
            ended: None,
        }
    }

    /// Has B closed if it was of no use for a while.
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
        let noise = NOISE * self.length.as_millis() as u64;
        let is_idle = begun == self.begun && ignored.wrapping_sub(self.ignored) < noise;
        if has_b && self.had_b && is_idle {
            let shared = Arc::clone(inner);
            vault.post(move |machines| machines.close_idle_b(&shared, begun));
            self.ended = Some(Instant::now());
        }
        (self.at, self.begun, self.ignored, self.had_b) = (Instant::now(), begun, ignored, has_b);
    }
}
