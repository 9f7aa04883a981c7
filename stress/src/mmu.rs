//! Soaks `mmu-notifier`: threads that get, put, register, unregister, insert, remove, invalidate,
//! fault and exit at random, on address spaces that come and go.
//!
//! Every notifier records whether it is alive, and counts its starts and ends. Each address space
//! has one frame, which changes only inside brackets. A shadow may only contain the current frame.
//! At the end every object must have been freed, and no window of an interval may be open.

mod actor;
mod subscriber;
#[cfg(mmun_tsan)]
#[path = "../../crates/mmu-notifier/src/sync/traced.rs"]
mod traced;

use crate::Options;
use crate::random::Random;
use actor::Actor;
use mmu_notifier::{Mm, MmWithUser};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use subscriber::{Probe, Probes};

#[cfg(not(mmun_tsan))]
use std::sync::{Mutex, MutexGuard};
#[cfg(mmun_tsan)]
use traced::{Mutex, MutexGuard};

const THREADS: u64 = 8;
const SPACES: usize = 3;
const SUBSYSTEMS: usize = 3;

/// How many replaced address spaces are kept. If there are more, those to which no other handle
/// exists are checked and dropped.
const RETIRED: usize = 1000;

/// Counters for the last lines of output.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    allocs: AtomicU64,
    frees: AtomicU64,
    gets: AtomicU64,
    overflows: AtomicU64,
    flushes: AtomicU64,
    registrations: AtomicU64,
    intervals: AtomicU64,
    brackets: AtomicU64,
    finishes: AtomicU64,
    refused: AtomicU64,
    faults: AtomicU64,
    retries: AtomicU64,
    exits: AtomicU64,
    synchronized: AtomicU64,
    /// Uses of freed notifiers, unpaired ends, stale frames, leaks.
    errors: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// An address space and the frame of the one page that shadows watch.
#[derive(Debug, Clone)]
pub(crate) struct Space {
    pub(crate) mm: MmWithUser,
    /// The number of the current frame, which changes only inside brackets.
    pub(crate) frame: Arc<AtomicU64>,
}

impl Space {
    fn new() -> Self {
        Self {
            mm: MmWithUser::new(),
            frame: Arc::default(),
        }
    }
}

/// The state that all threads share.
#[derive(Debug)]
pub(crate) struct World {
    spaces: [Mutex<Space>; SPACES],
    pub(crate) subsystems: [Probes; SUBSYSTEMS],
    /// Subscriptions that any callback may take and put.
    pub(crate) orphans: Mutex<Vec<mmu_notifier::Subscription<Probe>>>,
    /// The address spaces that were replaced and have not been checked yet.
    retired: Mutex<Vec<Mm>>,
    pub(crate) counts: Counts,
    pub(crate) broken: bool,
}

impl World {
    fn new(broken: bool) -> &'static Self {
        Box::leak(Box::new(Self {
            spaces: [(); SPACES].map(|()| Mutex::new(Space::new())),
            subsystems: [(); SUBSYSTEMS].map(|()| subscriber::subsystem()),
            orphans: Mutex::default(),
            retired: Mutex::default(),
            counts: Counts::default(),
            broken,
        }))
    }

    pub(crate) fn space(&self, number: usize) -> Space {
        lock(&self.spaces[number]).clone()
    }

    /// Replaces the address space with this index by a new one, and drops a user of the old address
    /// space. If that was its last user, the drop is exit.
    pub(crate) fn replace(&self, number: usize) {
        let old = std::mem::replace(&mut *lock(&self.spaces[number]), Space::new());
        let handle = (*old.mm).clone();
        drop(old);
        let mut retired = lock(&self.retired);
        retired.push(handle);
        if retired.len() > RETIRED {
            retired.retain(|mm| mm.mm_count() > 1 || !self.check_idle(mm));
        }
        drop(retired);
        add(&self.counts.exits);
    }

    /// Checks an address space to which no other handle exists.
    fn check_idle(&self, mm: &Mm) -> bool {
        let (seq, open) = mm.interval_snapshot();
        self.check(
            open == 0 && seq % 2 == 0,
            "an interval's window is still open",
        );
        self.check(mm.callback_panics() == 0, "a callback has panicked");
        self.check(
            mm.mm_users() == 0,
            "an address space has ended and has users",
        );
        true
    }

    /// Counts an error if `good` is false.
    pub(crate) fn check(&self, good: bool, what: &str) {
        if !good && self.counts.errors.fetch_add(1, Ordering::Relaxed) < 10 {
            eprintln!("stress mmu: {what}");
        }
    }

    /// Makes the final checks. No other thread holds an object any more.
    fn finish(&self) {
        lock(&self.orphans).clear();
        for subsystem in &self.subsystems {
            self.check(
                subsystem.drain_until_idle().is_ok(),
                "a drain outside of brackets was refused",
            );
        }
        (0..SPACES).for_each(|number| self.replace(number));
        for mm in &*lock(&self.retired) {
            // Poll, because no function waits for the free of a registration, which has no
            // subsystem.
            wait_until(|| mm.mm_count() == 1);
            self.check_idle(mm);
        }
        wait_until(|| {
            self.counts.frees.load(Ordering::Relaxed) == self.counts.allocs.load(Ordering::Relaxed)
        });
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Yields until `condition` returns true. If it never does, the watchdog ends the process.
fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        thread::yield_now();
    }
}

pub(crate) fn run(options: &Options) -> ExitCode {
    println!(
        "stress mmu: seed {}, {} s, {options:?}",
        options.seed,
        options.length.as_secs()
    );
    if options.no_membarrier {
        // SAFETY: No other thread may use the environment at the same time. This is still the only
        // thread.
        unsafe { std::env::set_var("SRCU_NO_MEMBARRIER", "1") };
    }
    let world = World::new(options.broken);
    watch(options.length + Duration::from_secs(60), world);
    let start = Instant::now();
    let errors = soak(world, options.seed, options.length);
    println!("{:#?}", world.counts);
    println!(
        "stress mmu: {errors} errors in {:.1} s, seed {}",
        start.elapsed().as_secs_f64(),
        options.seed
    );
    ExitCode::from(u8::from(errors != 0))
}

/// Runs all threads for `length`, and returns the number of errors.
fn soak(world: &'static World, seed: u64, length: Duration) -> u64 {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for stream in 0..THREADS {
            let stop = &stop;
            scope.spawn(move || Actor::new(world, Random::new(seed, stream)).run(stop));
        }
        thread::sleep(length);
        stop.store(true, Ordering::Relaxed);
    });
    world.finish();
    world.counts.errors.load(Ordering::Relaxed)
}

/// Ends the process after `limit`. If the process still runs then, a thread hangs or an object was
/// never freed.
fn watch(limit: Duration, world: &'static World) {
    thread::spawn(move || {
        thread::sleep(limit);
        eprintln!("stress mmu: hangs\n{:#?}", world.counts);
        std::process::abort();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b_48_a_short_soak_leaves_every_count_at_zero() {
        let world = World::new(false);
        assert_eq!(soak(world, 48, Duration::from_secs(2)), 0);
        let counts = &world.counts;
        let all = [
            &counts.allocs,
            &counts.registrations,
            &counts.intervals,
            &counts.refused,
            &counts.faults,
        ];
        for done in all
            .into_iter()
            .chain([&counts.overflows, &counts.flushes, &counts.exits])
        {
            assert!(
                done.load(Ordering::Relaxed) > 0,
                "it did not do everything: {counts:?}"
            );
        }
    }
}
