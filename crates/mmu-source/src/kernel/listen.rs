//! The thread that waits for records, in the vault's descriptor table, and has subscribers told.
//!
//! Who looks at every use needs nobody to wake: so this thread is woken by the first record after a
//! pause, and from then on looks once a millisecond, while the program wakes nobody. After a
//! millisecond in which everything was handed on it sleeps again.

use super::Inner;
use super::machine::Machines;
use super::program::header;
use super::programs::load_resolver;
use crate::vault::Letterbox;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long machine B stays when nobody waits.
const IDLE: Duration = Duration::from_secs(1);
/// So many records in a millisecond, and B is made unasked: it tells our changes from others'.
const FLOOD: u64 = 64;
/// So many ignored events in a period of [`IDLE`] keep B.
const NOISE: u64 = 1000;

pub(super) fn listen(
    inner: &Arc<Inner>,
    ring: &OwnedFd,
    stop: &OwnedFd,
    private: Option<OwnedFd>,
    vault: &Letterbox<Machines>,
) {
    // After the start, since it takes some milliseconds. Waits make machines until then.
    if let Some(resolver) = private.as_ref().and_then(load_resolver) {
        vault.post(move |machines| machines.set_resolver(resolver));
    }
    drop(private);
    let mut before = Before::of(inner);
    let mut nap = 1;
    let may_skip = may_skip_runs();
    loop {
        if inner.wants_a_call() {
            // Only with B is there something to do when nothing happens.
            let patience = (inner.waits.has_b() || may_skip).then_some(IDLE);
            if !crate::wait::readable(ring.as_fd(), stop.as_fd(), patience) {
                return;
            }
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
        nap = if inner.handled() != handled || inner.is_caught_up() { 1 } else { (2 * nap).min(64) };
        if inner.generation() - generation > FLOOD && !inner.waits.has_b() {
            let shared = Arc::clone(inner);
            vault.post(move |machines| machines.make_b(&shared));
        }
        before.look(inner, vault);
        // A skipped run is an event that nobody counted.
        let shared = Arc::clone(inner);
        if may_skip {
            vault.post(move |machines| shared.note_missed(machines.missed_runs()));
        }
    }
}

/// Whether this kernel runs programs at tracepoints preemptibly, and skips one that the processor
/// is in the middle of.
fn may_skip_runs() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let major = release.split('.').next().and_then(|major| major.parse::<u32>().ok());
    // What is not known is taken for the worse.
    major.is_none_or(|major| major >= 7)
}

/// What was so when B's use was looked at last.
struct Before {
    at: std::time::Instant,
    begun: u64,
    ignored: u64,
}

impl Before {
    fn of(inner: &Inner) -> Self {
        let ignored = inner.header.u64(header::IGNORED).load(Ordering::Relaxed);
        Self { at: std::time::Instant::now(), begun: inner.waits.begun(), ignored }
    }

    /// Has B closed if it was of no use for a while.
    fn look(&mut self, inner: &Arc<Inner>, vault: &Letterbox<Machines>) {
        if self.at.elapsed() < IDLE {
            return;
        }
        let now = Self::of(inner);
        if inner.waits.has_b() && now.begun == self.begun && now.ignored.wrapping_sub(self.ignored) < NOISE {
            let (shared, begun) = (Arc::clone(inner), now.begun);
            vault.post(move |machines| machines.close_idle_b(&shared, begun));
        }
        *self = now;
    }
}
