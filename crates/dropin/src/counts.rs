//! The counters of the report. Any code may count, callbacks included; the report reads them once,
//! at exit.

use mmu_notifier::VaRange;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// A counter. Relaxed, because no other data is published through it.
#[derive(Debug)]
pub(crate) struct Count(AtomicU64);

impl Count {
    const fn new() -> Count {
        Count(AtomicU64::new(0))
    }

    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Relaxed);
    }

    /// Adds one, under a lock that every caller holds. `add` takes four times as long, which would
    /// slow a cache's look-up measurably.
    #[inline]
    pub(crate) fn add_one_under_lock(&self) {
        self.0.store(self.0.load(Relaxed) + 1, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }
}

/// Look-ups of a libfabric cache that found a registration.
pub(crate) static HITS: Count = Count::new();
/// How many of these look-ups found a stale registration.
pub(crate) static REFUSED: Count = Count::new();
/// Registrations that a libfabric cache asked this monitor to watch.
pub(crate) static WATCHED: Count = Count::new();
/// Stale registrations that the reaper made libfabric drop before a look-up found them.
pub(crate) static REAPED: Count = Count::new();
/// Changed ranges that were reported to UCX.
pub(crate) static TOLD: Count = Count::new();
/// Whether a UCX cache has called our `ucs_rcache_get`. A flag and not a count: the look-ups hold
/// no common lock, so a count would cost them an atomic addition.
pub(crate) static LOOKED_UP: AtomicBool = AtomicBool::new(false);
/// How often libfabric has started the monitor, failed starts included.
pub(crate) static STARTS: Count = Count::new();
/// Nanoseconds that the start of the sources took, on the first use.
pub(crate) static START_NS: Count = Count::new();

/// A change of memory that made registrations stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// The kind of the change: `unmap`, `clear`, ...
    pub(crate) event: &'static str,
    pub(crate) range: VaRange,
}

/// A refused hit: the stale registration, and the change that made it stale.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refusal {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) change: Change,
    pub(crate) times: u64,
}

/// How many refusals are kept that differ in the registration or in the kind of the change.
const KEPT: usize = 16;

static REFUSALS: Mutex<Vec<Refusal>> = Mutex::new(Vec::new());

/// Counts a refused hit of the registration `start..start + len`. Only `valid` calls this, under
/// libfabric's lock.
///
/// # Blocking
/// It may allocate, so it must not be called from a callback.
pub(crate) fn refused(start: u64, len: u64, change: Change) {
    REFUSED.add(1);
    // The report may hold the lock, or a thread that exists only in the parent of this process. The
    // refusal was counted above.
    let Ok(mut refusals) = REFUSALS.try_lock() else {
        return;
    };
    let same = |refusal: &&mut Refusal| {
        (refusal.start, refusal.len, refusal.change.event) == (start, len, change.event)
    };
    if let Some(refusal) = refusals.iter_mut().find(same) {
        refusal.times += 1;
    } else if refusals.len() < KEPT {
        refusals.push(Refusal {
            start,
            len,
            change,
            times: 1,
        });
    }
}

/// Resets the counters in the child of a fork, except two. `STARTS` stays, because libfabric does
/// not start the child's caches again. `START_NS` is set when the child's sources start.
pub(crate) fn forget() {
    for count in [&HITS, &REFUSED, &WATCHED, &REAPED, &TOLD] {
        count.set(0);
    }
    LOOKED_UP.store(false, Relaxed);
    if let Ok(mut refusals) = REFUSALS.try_lock() {
        refusals.clear();
    }
}

/// Returns the first `KEPT` different refusals, or none if a thread holds their lock.
pub(crate) fn refusals() -> Vec<Refusal> {
    // Must not wait for the lock: at exit, a thread may have been stopped while it held the lock.
    REFUSALS
        .try_lock()
        .map(|refusals| refusals.clone())
        .unwrap_or_default()
}
