//! Tortures `srcu`: readers that sleep, nest and hand their sections to other threads; threads that
//! begin and end; updaters that use every way to wait; callbacks that queue callbacks, wait and
//! panic; domains that are made and dropped; and forks.
//!
//! Every object records whether it is alive. To free an object is to poison it; its memory is
//! released much later. So a reader that still holds the object sees the poison.

mod object;
mod readers;
mod updaters;

use crate::Options;
use crate::random::Random;
use object::World;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Counters for the last lines of output.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    sections: AtomicU64,
    moved: AtomicU64,
    slept: AtomicU64,
    threads: AtomicU64,
    synchronized: AtomicU64,
    polled: AtomicU64,
    called: AtomicU64,
    freed: AtomicU64,
    barriers: AtomicU64,
    domains: AtomicU64,
    children: AtomicU64,
    /// Uses of freed objects, wrong results, children that failed.
    errors: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

static READERS_DONE: AtomicBool = AtomicBool::new(false);

const READERS: u64 = 4;
const UPDATERS: usize = 3;
/// How many callbacks of each updater have run. After a `barrier`, the updater checks this count.
static RAN: [AtomicUsize; UPDATERS] = [const { AtomicUsize::new(0) }; UPDATERS];

pub(crate) fn run(options: &Options) -> ExitCode {
    println!(
        "stress srcu: seed {}, {} s, {options:?}",
        options.seed,
        options.length.as_secs()
    );
    if options.no_membarrier {
        // SAFETY: No other thread may use the environment at the same time. This is still the only
        // thread.
        unsafe { std::env::set_var("SRCU_NO_MEMBARRIER", "1") };
    }
    // Print no panics, because callbacks panic on purpose, many times a second.
    std::panic::set_hook(Box::new(|_| {}));
    static STOP: AtomicBool = AtomicBool::new(false);
    let stop = &STOP;
    let world: &'static World = Box::leak(Box::new(World::new(options.broken)));
    watch(options.length + Duration::from_secs(30), stop, world);
    let start = Instant::now();
    thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|stream| {
                scope.spawn(move || readers::generations(world, stop, options.seed, stream))
            })
            .collect();
        scope.spawn(|| readers::end_moved_sections(world, &READERS_DONE));
        for (stream, ran) in (100..).zip(&RAN) {
            let random = Random::new(options.seed, stream);
            scope.spawn(move || updaters::update(world, stop, random, ran));
        }
        scope
            .spawn(|| updaters::make_and_drop_domains(world, stop, Random::new(options.seed, 200)));
        if !options.no_fork {
            scope.spawn(|| updaters::fork_children(world, stop));
        }
        while start.elapsed() < options.length {
            thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("readers do not panic");
        }
        READERS_DONE.store(true, Ordering::Release);
    });
    world.finish();
    let errors = world.counts.errors.load(Ordering::Relaxed);
    println!("{:#?}", world.counts);
    println!(
        "stress srcu: {errors} errors in {:.1} s, seed {}",
        start.elapsed().as_secs_f64(),
        options.seed
    );
    ExitCode::from(u8::from(errors != 0))
}

/// Ends the process after `limit`. If the process still runs then, a thread hangs.
fn watch(limit: Duration, stop: &'static AtomicBool, world: &'static World) {
    thread::spawn(move || {
        thread::sleep(limit);
        eprintln!(
            "stress srcu: hangs, stopped: {}\n{world:#?}",
            stop.load(Ordering::Relaxed)
        );
        std::process::abort();
    });
}
