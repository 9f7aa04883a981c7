//! Tortures `regcache` with real transfers. Threads write buffers to files and read files into
//! buffers, through fixed buffers of io_uring. Meanwhile other threads replace, move, drop and
//! truncate the memory at the same addresses, and fork.
//!
//! Each buffer holds a pattern that depends on the buffer's version and address. The changing
//! thread makes the version odd before the change, and even afterwards. If the version was even
//! before a transfer and is the same afterwards, the transfer must have moved exactly the pattern
//! of that version. Other bytes mean that the registration was stale.

mod change;
mod pool;
mod transfer;

use crate::random::Random;
use crate::{Options, Source};
use mmu_source::hook::Hook;
use mmu_source::kernel::Kernel;
use pool::Pool;
use regcache::{Merge, RegCache, Stats, Uring};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use transfer::Worker;

/// Counters for the last lines of output.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    written: AtomicU64,
    read: AtomicU64,
    /// Transfers during which the buffer changed, so that they cannot be checked.
    overtaken: AtomicU64,
    leases: AtomicU64,
    refused: AtomicU64,
    changed: AtomicU64,
    children: AtomicU64,
    /// Transfers that moved other bytes than the buffer held.
    stale: AtomicU64,
    /// Requests that failed, and regions that stayed registered without a lease.
    errors: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

const WORKERS: u64 = 3;
const CHANGERS: u64 = 2;

pub(crate) fn run(options: &Options) -> ExitCode {
    println!(
        "stress regcache: seed {}, {} s, {options:?}",
        options.seed,
        options.length.as_secs()
    );
    let start = Instant::now();
    match torture(options) {
        Ok((counts, stats)) => {
            let bad = counts.stale.load(Ordering::Relaxed) + counts.errors.load(Ordering::Relaxed);
            println!("{counts:#?}");
            stats.iter().for_each(|stats| println!("{stats}"));
            println!(
                "stress regcache: {bad} errors in {:.1} s, seed {}",
                start.elapsed().as_secs_f64(),
                options.seed
            );
            ExitCode::from(u8::from(bad != 0))
        }
        Err(why) => {
            eprintln!("stress: {why}");
            ExitCode::from(2)
        }
    }
}

/// Runs for the requested time. Returns the counters, and the statistics of each cache.
fn torture(options: &Options) -> Result<(Arc<Counts>, Vec<Stats>), Box<dyn std::error::Error>> {
    if options.no_membarrier {
        // SAFETY: No other thread may use the environment at the same time. This function has not
        // started a thread yet.
        unsafe { std::env::set_var("REGCACHE_NO_MEMBARRIER", "1") };
    }
    let kernel = match options.source {
        Source::Kernel => Some(Kernel::start()?),
        Source::Rehearsal => Some(Kernel::rehearse(1 << 16)?),
        Source::Bracket | Source::Hook => None,
    };
    let _hook = if options.source == Source::Hook {
        Some(Hook::install()?)
    } else {
        None
    };
    let pool = Pool::new(options.seed)?;
    let counts = Arc::new(Counts::default());
    let stop = Arc::new(AtomicBool::new(false));
    watch(
        options.length + Duration::from_secs(30),
        Arc::clone(&counts),
    );
    let merges = [Merge::Never, Merge::Overlapping, Merge::Adjacent];
    // With `--broken`, the kernel source still reports changes, but the caches do not ask it.
    let is_asked = !(options.broken && options.source == Source::Kernel);
    let asked = kernel.as_ref().filter(|_| is_asked);
    let mut workers = (0..WORKERS)
        .map(|stream| Worker::new(merges[stream as usize % 3], asked.cloned()))
        .collect::<Result<Vec<_>, _>>()?;
    let caches: Vec<RegCache<Uring>> = workers
        .iter()
        .map(|worker| worker.cache.try_clone())
        .collect::<Result<_, _>>()?;
    let start = Instant::now();
    thread::scope(|scope| {
        let (pool, counts, stop, caches, kernel) =
            (&pool, &counts, &stop, &caches, kernel.as_deref());
        for (stream, worker) in (0..).zip(&mut workers) {
            scope.spawn(move || worker.run(pool, counts, stop, Random::new(options.seed, stream)));
        }
        for stream in 100..100 + CHANGERS {
            scope.spawn(move || {
                change::run(
                    pool,
                    options,
                    kernel,
                    counts,
                    stop,
                    Random::new(options.seed, stream),
                )
            });
        }
        scope.spawn(move || churn(pool, caches, counts, stop, Random::new(options.seed, 200)));
        while start.elapsed() < options.length {
            thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let stats = caches.iter().map(RegCache::stats).collect();
    // The source's thread may still be deregistering a region in a callback. `drain` waits for it.
    if let Some(kernel) = &kernel {
        kernel.drain();
    }
    for cache in &caches {
        cache.flush();
        if cache.stats().regions != 0 {
            println!("a region without a lease is still registered");
            add(&counts.errors);
        }
    }
    Ok((counts, stats))
}

/// Holds leases of all caches for a while, and drops them in random order.
fn churn(
    pool: &Pool,
    caches: &[RegCache<Uring>],
    counts: &Counts,
    stop: &AtomicBool,
    mut random: Random,
) {
    let mut held = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let range = pool.some_range(&mut random);
        match caches[random.below(caches.len())].get(range) {
            Ok(lease) => held.push(lease),
            Err(_) => add(&counts.refused),
        }
        add(&counts.leases);
        if held.len() > 12 || random.one_in(4) {
            while held.len() > random.below(12) {
                drop(held.swap_remove(random.below(held.len())));
            }
        }
    }
}

/// Ends the process after `limit`. If the counters still exist then, a thread hangs.
fn watch(limit: Duration, counts: Arc<Counts>) {
    let counts = Arc::downgrade(&counts);
    thread::spawn(move || {
        thread::sleep(limit);
        if let Some(counts) = counts.upgrade() {
            eprintln!("stress regcache: hangs\n{counts:#?}");
            std::process::abort();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::{Cap, require};

    fn torture_for(seconds: u64, source: Source, broken: bool) -> u64 {
        let options = Options {
            length: Duration::from_secs(seconds),
            source,
            broken,
            ..Options::new(seconds)
        };
        let (counts, _) = torture(&options).unwrap();
        assert_eq!(counts.errors.load(Ordering::Relaxed), 0);
        assert!(
            counts.written.load(Ordering::Relaxed) > 0
                && counts.changed.load(Ordering::Relaxed) > 0
        );
        counts.stale.load(Ordering::Relaxed)
    }

    #[test]
    fn no_stale_transfer_in_five_seconds() {
        if !require(Cap::IoUring) {
            return;
        }
        assert_eq!(torture_for(2, Source::Bracket, false), 0);
        assert_ne!(
            torture_for(1, Source::Bracket, true),
            0,
            "the checker finds the fault"
        );
        if require(Cap::Bpf) {
            assert_eq!(torture_for(2, Source::Rehearsal, false), 0);
            assert_ne!(
                torture_for(1, Source::Rehearsal, true),
                0,
                "the checker finds the fault"
            );
        }
        if require(Cap::Kvm) && require(Cap::Bpf) {
            assert_eq!(torture_for(2, Source::Kernel, false), 0);
            assert_ne!(
                torture_for(2, Source::Kernel, true),
                0,
                "the checker finds the fault"
            );
        }
    }
}
