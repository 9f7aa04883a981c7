//! What do brackets, get, put and intervals cost, compared with an empty SRCU section and with the
//! usual map of `Arc`s?
//!
//! `cargo run --release -p bench --bin notifier [ROUNDS]`
#![allow(missing_docs, missing_debug_implementations, reason = "a bench")]

use mmu_notifier::{
    Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, MmWithUser, Notifier, Subsystem,
    Va, VaRange,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Instant;

/// An allocator that counts allocations, for the rows of memory and for the last puts, which must
/// not allocate.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: Each function calls the same function of `System`, which keeps the contract of the trait.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: The layout has a size other than zero, because the caller promises so.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: The caller promises that `place` came from `alloc` with this layout, and so from
        // `System`.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Empty;

impl Notifier for Empty {
    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {}
    fn invalidate_range_end(&self, _: &InvalidateRange<'_>) {}
}

impl IntervalOps for Empty {
    fn invalidate(&mut self, range: &InvalidateRange<'_>) -> Option<Finish> {
        black_box(range.range());
        None
    }
}

fn page(number: u64) -> VaRange {
    VaRange::covering(Va::new(number << 12), 1).expect("a page")
}

fn subsystem() -> Subsystem<Empty> {
    Subsystem::new(|_| Ok(Empty))
}

/// Returns the nanoseconds for one of `times` runs of `f`.
fn each(times: u32, mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..times {
        f();
    }
    start.elapsed().as_nanos() as f64 / f64::from(times)
}

/// Like [`each`], on `threads` threads at once. Returns the mean over the threads.
fn on_threads(threads: usize, times: u32, f: impl Fn(usize) + Sync) -> f64 {
    let line = Barrier::new(threads);
    let taken: Vec<f64> = std::thread::scope(|scope| {
        let run = |number| {
            line.wait();
            each(times, || f(number))
        };
        let handles: Vec<_> = (0..threads)
            .map(|number| scope.spawn(move || run(number)))
            .collect();
        handles
            .into_iter()
            .map(|handle| handle.join().expect("a bench thread"))
            .collect()
    });
    taken.iter().sum::<f64>() / threads as f64
}

const TIMES: u32 = 1_000_000;

fn section(threads: usize) -> f64 {
    let srcu = srcu::Srcu::new();
    on_threads(threads, TIMES, |_| drop(srcu.read_lock()))
}

fn bracket(subscribers: usize, threads: usize) -> f64 {
    let mm = MmWithUser::new();
    let subsystems: Vec<_> = (0..subscribers).map(|_| subsystem()).collect();
    let _held: Vec<_> = subsystems
        .iter()
        .map(|one| one.get(&mm).expect("outside of brackets"))
        .collect();
    on_threads(threads, TIMES, |_| {
        drop(mm.invalidate(page(1), Event::Clear))
    })
}

/// The floor of dispatch: a list with the same number of callbacks. Each round walks the list
/// twice, once for the starts and once for the ends, and does no other work.
struct Bare {
    next: Option<Box<Bare>>,
    start: fn(&VaRange),
    end: fn(&VaRange),
}

impl Bare {
    #[inline(never)]
    fn call(list: Option<&Self>, of: impl Fn(&Self) -> fn(&VaRange), range: &VaRange) {
        let mut at = list;
        while let Some(one) = at {
            at = one.next.as_deref();
            of(one)(range);
        }
    }
}

fn bare(callbacks: usize) -> f64 {
    let mut list = None;
    for _ in 0..callbacks {
        list = Some(Box::new(Bare {
            next: list,
            start: black_box(|_| ()),
            end: black_box(|_| ()),
        }));
    }
    let range = page(1);
    each(TIMES, || {
        Bare::call(list.as_deref(), |one| one.start, &range);
        Bare::call(list.as_deref(), |one| one.end, &range);
    })
}

fn get_put(threads: usize, shared: bool) -> f64 {
    let subsystem = subsystem();
    let mms: Vec<_> = (0..threads).map(|_| MmWithUser::new()).collect();
    let _held: Vec<_> = mms
        .iter()
        .map(|mm| subsystem.get(mm).expect("outside of brackets"))
        .collect();
    let mm = |number: usize| &mms[if shared { 0 } else { number }];
    on_threads(threads, TIMES, |number| drop(subsystem.get(mm(number))))
}

fn map_of_arcs(threads: usize, shared: bool) -> f64 {
    let map: Mutex<HashMap<(usize, u64), Arc<u64>>> = Mutex::new(
        (0..threads as u64)
            .map(|mm| ((7, mm), Arc::new(mm)))
            .collect(),
    );
    let key = |number: usize| (7, if shared { 0 } else { number as u64 });
    on_threads(threads, TIMES, |number| {
        let found = map
            .lock()
            .expect("no panic")
            .get(&key(number))
            .map(Arc::clone);
        drop(black_box(found));
    })
}

/// Makes a burst of last puts, while a bracket delays the frees. Returns the time of one put, and
/// the number of allocations of all.
fn last_puts() -> (f64, usize) {
    const BURST: u32 = 1000;
    let mm = MmWithUser::new();
    let subsystems: Vec<_> = (0..BURST).map(|_| subsystem()).collect();
    let mut held: Vec<_> = subsystems
        .iter()
        .map(|one| one.get(&mm).expect("outside of brackets"))
        .collect();
    let bracket = mm.invalidate(page(1), Event::Clear);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let taken = each(BURST, || held.pop().expect("one for each").put());
    let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
    drop(bracket);
    (taken, allocated)
}

/// Times gets that make a notifier. The put is not timed, and keeps the list short.
fn fresh_get() -> f64 {
    const TIMES: u32 = 5000;
    let (mm, subsystem) = (MmWithUser::new(), subsystem());
    let mut taken = 0;
    for _ in 0..TIMES {
        let start = Instant::now();
        let got = subsystem.get(&mm).expect("outside of brackets");
        taken += start.elapsed().as_nanos();
        got.put();
        subsystem.synchronize().expect("outside of brackets");
    }
    taken as f64 / f64::from(TIMES)
}

fn interval_hit(count: u64) -> f64 {
    let mm = MmWithUser::new();
    let nodes: Vec<_> = (0..count)
        .map(|n| IntervalNotifier::insert(&mm, page(2 * n), Empty).expect("outside of brackets"))
        .collect();
    let mut random = 88_172_645_463_325_252_u64;
    let taken = each(200_000, || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        drop(mm.invalidate(page(2 * (random % count)), Event::Clear));
    });
    drop(nodes);
    taken
}

fn bytes(f: impl FnOnce()) -> usize {
    let before = BYTES.load(Ordering::Relaxed);
    f();
    BYTES.load(Ordering::Relaxed) - before
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints a row: a name, the median, and a ratio with its bar.
fn row(name: &str, ns: f64, ratio: Option<(f64, &str)>, bar: &str) {
    let ratio = ratio.map_or(String::new(), |(ratio, of)| format!("{ratio:.2} of {of}"));
    println!("{name:<46} {ns:>10.2} ns   {ratio:<24} {bar}");
}

fn main() {
    let rounds: usize = std::env::args()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(7);
    let run = |f: &dyn Fn() -> f64| median((0..rounds).map(|_| f()).collect());
    // Figures that are compared are measured alternately, so that a drift of the machine affects
    // both.
    let mut columns: Vec<Vec<f64>> = vec![Vec::new(); 16];
    for _ in 0..rounds {
        let values = [
            section(1),
            bracket(0, 1),
            bracket(1, 1),
            bracket(9, 1),
            section(2),
            bracket(0, 2),
            bracket(1, 2),
            bracket(9, 2),
            get_put(1, true),
            map_of_arcs(1, true),
            get_put(2, true),
            map_of_arcs(2, true),
            get_put(2, false),
            map_of_arcs(2, false),
            bare(1),
            bare(9),
        ];
        columns
            .iter_mut()
            .zip(values)
            .for_each(|(column, value)| column.push(value));
    }
    let m: Vec<f64> = columns.into_iter().map(median).collect();
    println!("{rounds} rounds, medians\n");
    for (threads, at) in [(1, 0), (2, 4)] {
        println!("{threads} thread(s)");
        row("  SRCU section, empty", m[at], None, "");
        row(
            "  bracket, no subscriber",
            m[at + 1],
            Some((m[at + 1] / m[at], "a section")),
            "<= 5 ns",
        );
        row(
            "  bracket, one subscriber",
            m[at + 2],
            Some((m[at + 2] / m[at], "a section")),
            "<= 4",
        );
        row(
            "  each further subscriber",
            (m[at + 3] - m[at + 2]) / 8.0,
            None,
            "<= 3 ns",
        );
    }
    row(
        "floor: 2 callbacks in a bare list",
        m[14],
        Some((m[2] / m[14], "it: a bracket, 1 subscriber")),
        "",
    );
    row(
        "floor: each further in a bare list",
        (m[15] - m[14]) / 8.0,
        None,
        "",
    );
    row(
        "get + put, 1 thread",
        m[8],
        Some((m[8] / m[9], "Mutex<HashMap>")),
        "<= 0.35",
    );
    row(
        "get + put, 2 threads, one mm",
        m[10],
        Some((m[10] / m[11], "Mutex<HashMap>")),
        "<= 0.5",
    );
    row(
        "get + put, 2 threads, own mm",
        m[12],
        Some((m[12] / m[13], "Mutex<HashMap>")),
        "<= 0.15",
    );
    let allocated = last_puts().1;
    row(
        "last put, in a burst of 1,000",
        run(&|| last_puts().0),
        None,
        &format!("<= 60 ns; {allocated} allocations"),
    );
    row("fresh get", run(&fresh_get), None, "<= 3 us");
    for count in [10, 1000, 1_000_000] {
        let name = format!("interval invalidate, 1 of {count}");
        row(
            &name,
            median((0..rounds.min(5)).map(|_| interval_hit(count)).collect()),
            None,
            "1 of 10^6 < 1 us",
        );
    }
    let mm = MmWithUser::new();
    let one = subsystem();
    let warm = subsystem();
    let _warm = warm.get(&mm);
    one.get(&mm).expect("outside of brackets").put();
    let mut held = None;
    println!(
        "memory: one subscription {} B",
        bytes(|| held = one.get(&mm).ok())
    );
    let mut nodes = Vec::with_capacity(1000);
    let intervals = bytes(|| {
        nodes.extend((0..1000).map(|n| IntervalNotifier::insert(&mm, page(2 * n), Empty)))
    });
    println!(
        "memory: one interval, of 1,000, with its share of the tree {} B",
        intervals / 1000
    );
    let mut empty = None;
    println!(
        "memory: one empty Mm {} B",
        bytes(|| empty = Some(MmWithUser::new()))
    );
    drop((held, nodes, empty));
}
