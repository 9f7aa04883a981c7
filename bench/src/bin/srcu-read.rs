//! What does a read section cost, compared with other ways to protect a reader?
//!
//! `cargo run --release -p bench --bin srcu-read [ROUNDS]`
#![allow(
    missing_docs,
    missing_debug_implementations,
    dead_code,
    reason = "a bench"
)]

#[path = "../srcu_peers.rs"]
mod peers;

use peers::{Row, verdict};
use srcu::Srcu;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering, compiler_fence};
use std::sync::{Barrier, LazyLock, RwLock};
use std::time::Instant;

/// The number of sections in a slice.
const SECTIONS: u64 = 100_000;
/// The number of slices in a round. Only the best slice counts, because on a shared machine other
/// programs disturb most slices.
const SLICES: usize = 50;

/// Returns the ns for one section, in the best slice.
fn time(mut section: impl FnMut()) -> f64 {
    best_slice(|| {
        let start = Instant::now();
        for _ in 0..SECTIONS {
            section();
        }
        start.elapsed().as_nanos() as f64
    })
}

fn best_slice(slice: impl FnMut() -> f64) -> f64 {
    std::iter::repeat_with(slice)
        .take(SLICES)
        .fold(f64::INFINITY, f64::min)
        / SECTIONS as f64
}

/// The body of a section. It does nothing, but the compiler must not move accesses across it.
#[inline(always)]
fn inside() {
    compiler_fence(Ordering::SeqCst);
}

#[repr(align(128))]
struct Line([AtomicUsize; 2]);

/// The floor: two plain loads and stores on a cache line that only this thread uses. No section
/// with counters can cost less.
fn floor() -> f64 {
    let line = black_box(Line([AtomicUsize::new(0), AtomicUsize::new(0)]));
    time(|| {
        line.0[0].store(line.0[0].load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        inside();
        line.0[1].store(line.0[1].load(Ordering::Relaxed) + 1, Ordering::Release);
    })
}

static SRCU: Srcu = Srcu::new();

fn srcu_read_lock() -> f64 {
    let srcu = black_box(&SRCU);
    time(|| {
        let section = srcu.read_lock();
        inside();
        drop(section);
    })
}

fn srcu_reader() -> f64 {
    let reader = black_box(&SRCU).reader();
    time(|| {
        let section = reader.read_lock();
        inside();
        drop(section);
    })
}

fn srcu_down_read() -> f64 {
    let srcu = black_box(&SRCU);
    time(|| {
        let section = srcu.down_read();
        inside();
        drop(section);
    })
}

fn crossbeam_pin() -> f64 {
    time(|| {
        let guard = crossbeam_epoch::pin();
        inside();
        drop(guard);
    })
}

fn crossbeam_handle() -> f64 {
    static COLLECTOR: LazyLock<crossbeam_epoch::Collector> =
        LazyLock::new(crossbeam_epoch::Collector::new);
    let handle = COLLECTOR.register();
    time(|| {
        let guard = handle.pin();
        inside();
        drop(guard);
    })
}

fn seize_enter() -> f64 {
    static COLLECTOR: LazyLock<seize::Collector> = LazyLock::new(seize::Collector::new);
    let collector = &*COLLECTOR;
    time(|| {
        let guard = collector.enter();
        inside();
        drop(guard);
    })
}

fn haphazard_protect() -> f64 {
    static VALUE: LazyLock<haphazard::AtomicPtr<u64>> =
        LazyLock::new(|| haphazard::AtomicPtr::from(Box::new(1)));
    let value = &*VALUE;
    let mut hazard = haphazard::HazardPointer::new();
    time(|| {
        black_box(value.safe_load(&mut hazard));
        inside();
        hazard.reset_protection();
    })
}

fn arc_swap_load() -> f64 {
    static VALUE: LazyLock<arc_swap::ArcSwap<u64>> =
        LazyLock::new(|| arc_swap::ArcSwap::from_pointee(1));
    let value = &*VALUE;
    time(|| {
        let guard = value.load();
        inside();
        drop(guard);
    })
}

fn parking_lot_read() -> f64 {
    static LOCK: parking_lot::RwLock<u64> = parking_lot::RwLock::new(1);
    time(|| {
        let guard = LOCK.read();
        inside();
        drop(guard);
    })
}

fn std_read() -> f64 {
    static LOCK: RwLock<u64> = RwLock::new(1);
    time(|| {
        let guard = LOCK.read().expect("no thread panics here");
        inside();
        drop(guard);
    })
}

type Contender = (&'static str, fn() -> f64);

const CONTENDERS: &[Contender] = &[
    ("floor: two loads and stores", floor),
    ("srcu reader() handle", srcu_reader),
    ("srcu read_lock", srcu_read_lock),
    ("srcu down_read", srcu_down_read),
    #[cfg(has_urcu)]
    ("liburcu memb, inline", || {
        best_slice(|| peers::urcu::memb_read(SECTIONS))
    }),
    #[cfg(has_urcu)]
    ("liburcu bp, inline", || {
        best_slice(|| peers::urcu::bp_read(SECTIONS))
    }),
    ("crossbeam-epoch pin", crossbeam_pin),
    ("crossbeam-epoch own handle", crossbeam_handle),
    ("seize enter", seize_enter),
    ("haphazard protect", haphazard_protect),
    ("arc-swap load", arc_swap_load),
    ("parking_lot RwLock read", parking_lot_read),
    ("std RwLock read", std_read),
];

/// Returns the ns for a section: the mean of the threads' best slices.
fn measure(contender: fn() -> f64, threads: usize) -> f64 {
    let start = Barrier::new(threads);
    let total: f64 = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    contender()
                })
            })
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().expect("contenders do not panic"))
            .sum()
    });
    total / threads as f64
}

fn main() {
    let rounds = peers::rounds(15);
    let mut tables = [1, 2].map(|threads| {
        (
            threads,
            CONTENDERS
                .iter()
                .map(|(name, _)| Row::new(name))
                .collect::<Vec<_>>(),
        )
    });
    for _ in 0..rounds {
        for (threads, rows) in &mut tables {
            for (row, (_, contender)) in rows.iter_mut().zip(CONTENDERS) {
                row.rounds.push(measure(*contender, *threads));
            }
        }
    }
    let [(_, one), (_, two)] = &tables;
    let of = peers::row;
    let pin = of(one, "crossbeam-epoch pin");
    println!(
        "ns for a section (enter and leave), median of {rounds} rounds (best of {SLICES} slices), +- half the quartile distance\n"
    );
    println!(
        "| | 1 thread | 2 threads | 2 to 1 | to crossbeam pin |\n| --- | --- | --- | --- | --- |"
    );
    for (one, two) in one.iter().zip(two) {
        println!(
            "| {} | {:.2} +-{:.0}% | {:.2} +-{:.0}% | {:.2} | {:.2} |",
            one.name,
            one.median(),
            one.spread(),
            two.median(),
            two.spread(),
            two.ratio(one),
            one.ratio(pin)
        );
    }
    println!();
    if cfg!(not(has_urcu)) {
        println!("liburcu: not built in (liburcu-dev or a C compiler is missing)");
    }
    let (lock, reader) = (of(one, "srcu read_lock"), of(one, "srcu reader"));
    verdict("read_lock to crossbeam-epoch pin", lock.ratio(pin), 0.55);
    verdict("reader to the floor", reader.ratio(of(one, "floor")), 1.3);
    if cfg!(has_urcu) {
        verdict(
            "reader to liburcu memb inline",
            reader.ratio(of(one, "liburcu memb")),
            1.0,
        );
    }
    verdict(
        "read_lock, 2 threads to 1",
        of(two, "srcu read_lock").ratio(lock),
        1.2,
    );
    verdict(
        "reader, 2 threads to 1",
        of(two, "srcu reader").ratio(reader),
        1.2,
    );
}
