//! Several threads settle, wait as a fill does, arm and drain, while two threads change armed
//! memory. No thread may be delayed for long.
//!
//! The main thread is the watchdog: it reads when each thread began its current operation.

use super::pages;
use mmu_notifier::{InvalidateRange, Notifier, Registration, Va, VaRange};
use mmu_source::kernel::Kernel;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The number of pages of each of the two changing threads.
pub(super) const PAGES: usize = 8;

/// The operation that each thread repeats.
pub(crate) const DEEDS: [&str; 7] = [
    "settle",
    "settle",
    "read_begin",
    "arm",
    "drain",
    "change",
    "change",
];

/// How often an operation was done, and its maximum duration in microseconds.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    pub(crate) times: AtomicU64,
    pub(crate) most: AtomicU64,
    /// When the current operation began, in microseconds since the start; 0 if none is under way.
    since: AtomicU64,
}

/// A subscriber whose callback takes some time, as that of a cache does.
struct Listens(AtomicU64);

impl Notifier for Listens {
    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
        (0..500).for_each(|_| _ = self.0.fetch_add(1, Ordering::Relaxed));
    }
}

/// Runs for the given time. If an operation takes longer than `patience`, ends the process, because
/// the operation's thread could not be joined.
pub(crate) fn rush(kernel: &Arc<Kernel>, length: Duration, patience: Duration) -> [Pace; 7] {
    let paces: [Pace; 7] = std::array::from_fn(|_| Pace::default());
    let listens = Registration::new(&mmu_source::current(), Listens(AtomicU64::new(0)))
        .expect("outside of brackets");
    let (start, stop) = (Instant::now(), AtomicBool::new(false));
    let now = || start.elapsed().as_micros() as u64 + 1;
    let memory = [PAGES; 2].map(pages::map);
    let _armed = memory.map(|at| kernel.arm(range(at)).expect("armed"));
    thread::scope(|scope| {
        let repeat = |deed: usize, mut f: Box<dyn FnMut() + Send>| {
            let (pace, stop, now) = (&paces[deed], &stop, &now);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let begin = now();
                    pace.since.store(begin, Ordering::Relaxed);
                    f();
                    pace.since.store(0, Ordering::Relaxed);
                    pace.most.fetch_max(now() - begin, Ordering::Relaxed);
                    pace.times.fetch_add(1, Ordering::Relaxed);
                }
            });
        };
        for deed in [0, 1] {
            let kernel = Arc::clone(kernel);
            repeat(
                deed,
                Box::new(move || _ = kernel.settle().expect("no fork")),
            );
        }
        let own = kernel.arm(range(memory[1])).expect("armed");
        repeat(
            2,
            Box::new(move || _ = own.read_begin().expect("a virtual machine")),
        );
        let (own, at) = (Arc::clone(kernel), memory[0]);
        repeat(
            3,
            Box::new(move || drop(own.arm(range(at)).expect("armed"))),
        );
        let own = Arc::clone(kernel);
        repeat(4, Box::new(move || assert!(!own.drain().refused)));
        repeat(5, Box::new(move || change(memory[0])));
        repeat(6, Box::new(move || change(memory[1])));
        while start.elapsed() < length {
            thread::sleep(Duration::from_millis(20));
            let late = paces.iter().position(|pace| {
                let since = pace.since.load(Ordering::Relaxed);
                since != 0 && now().saturating_sub(since) > patience.as_micros() as u64
            });
            if let Some(deed) = late {
                println!(
                    "{} has been held up for more than {patience:?}: {paces:?}, {kernel:?}",
                    DEEDS[deed]
                );
                std::process::abort();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(listens.unregister().is_ok(), "outside of brackets");
    memory
        .into_iter()
        .for_each(|base| pages::unmap(base, PAGES));
    paces
}

fn range(at: usize) -> VaRange {
    VaRange::covering(Va::new(at as u64), (PAGES * pages::size()) as u64).expect("a range")
}

/// Maps new pages over the existing pages, and then writes to each new page and discards it.
pub(super) fn change(base: usize) {
    pages::map_over(base, PAGES);
    for page in 0..PAGES {
        let page = pages::at(base + page * pages::size());
        // SAFETY: the page was mapped above, and stays until this thread maps over it.
        unsafe { page.cast::<u64>().write_volatile(1) };
        // SAFETY: the page belongs to this thread, and no reference points to it.
        let discarded = unsafe { libc::madvise(page, pages::size(), libc::MADV_DONTNEED) };
        assert_eq!(discarded, 0);
    }
}
