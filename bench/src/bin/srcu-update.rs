//! What do `synchronize` and `call` cost, and how soon does a callback run, compared with liburcu?
//!
//! `cargo run --release -p bench --bin srcu-update [ROUNDS]`
#![allow(
    missing_docs,
    missing_debug_implementations,
    dead_code,
    reason = "a bench"
)]

#[path = "../srcu_peers.rs"]
mod peers;

use peers::{Row, verdict};
use srcu::{Head, Srcu};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

const WAITS: u64 = 20_000;
const CALLS: u64 = 500_000;

fn ns(start: Instant, times: u64) -> f64 {
    start.elapsed().as_nanos() as f64 / times as f64
}

fn synchronize() -> f64 {
    let srcu = Srcu::new();
    drop(srcu.read_lock());
    let start = Instant::now();
    for _ in 0..WAITS {
        srcu.synchronize().expect("outside of sections");
    }
    ns(start, WAITS)
}

/// Runs `f` while another thread of the process spins. Each `membarrier` must interrupt that
/// thread.
fn beside_a_running_thread(f: fn() -> f64) -> f64 {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let result = f();
        stop.store(true, Ordering::Relaxed);
        result
    })
}

unsafe fn nothing(_: NonNull<Head>) {}

fn call_raw() -> f64 {
    let srcu = Srcu::new();
    srcu.prepare();
    let heads: Vec<Head> = (0..CALLS).map(|_| Head::new()).collect();
    let start = Instant::now();
    for head in &heads {
        // SAFETY: The head lives until the barrier has returned, and is queued once. `nothing` may
        // run on any thread.
        unsafe { srcu.call_raw(NonNull::from(head), nothing) };
    }
    let taken = ns(start, CALLS);
    srcu.barrier().expect("outside of sections");
    taken
}

fn call() -> f64 {
    let srcu = Srcu::new();
    srcu.prepare();
    let start = Instant::now();
    for at in 0..CALLS {
        srcu.call(move || {
            std::hint::black_box(at);
        });
    }
    let taken = ns(start, CALLS);
    srcu.barrier().expect("outside of sections");
    taken
}

/// Like [`call_raw`], while a section delays all callbacks. So this is the producer's cost while
/// the reclaimer runs no callbacks.
fn call_raw_held_up() -> f64 {
    let srcu = Srcu::new();
    srcu.prepare();
    let heads: Vec<Head> = (0..CALLS).map(|_| Head::new()).collect();
    let section = srcu.read_lock();
    let start = Instant::now();
    for head in &heads {
        // SAFETY: As in `call_raw`: the head lives until the barrier has returned, and is queued
        // once.
        unsafe { srcu.call_raw(NonNull::from(head), nothing) };
    }
    let taken = ns(start, CALLS);
    drop(section);
    srcu.barrier().expect("outside of sections");
    taken
}

/// Returns the time from the first call to the return of the last callback, divided by the number
/// of callbacks.
fn call_and_run() -> f64 {
    let srcu = Srcu::new();
    srcu.prepare();
    let heads: Vec<Head> = (0..CALLS).map(|_| Head::new()).collect();
    let start = Instant::now();
    for head in &heads {
        // SAFETY: As in `call_raw`: the head lives until the barrier has returned, and is queued
        // once.
        unsafe { srcu.call_raw(NonNull::from(head), nothing) };
    }
    srcu.barrier().expect("outside of sections");
    ns(start, CALLS)
}

/// Returns the median time from the end of the only section to the callback. The callback is queued
/// 300 us before that end.
fn latency() -> f64 {
    let srcu = Srcu::new();
    let mut delays: Vec<f64> = (0..100)
        .map(|_| {
            let (send, called) = channel();
            let section = srcu.read_lock();
            srcu.call(move || {
                let _ = send.send(Instant::now());
            });
            std::thread::sleep(Duration::from_micros(300));
            let start = Instant::now();
            drop(section);
            let at = called.recv().expect("the callback runs");
            at.duration_since(start).as_nanos() as f64
        })
        .collect();
    delays.sort_by(f64::total_cmp);
    delays[delays.len() / 2]
}

/// Returns the median time from the call to the callback, in a domain without readers and other
/// callbacks.
fn idle_latency() -> f64 {
    let srcu = Srcu::new();
    let mut delays: Vec<f64> = (0..100)
        .map(|_| {
            std::thread::sleep(Duration::from_micros(100));
            let (send, called) = channel();
            let start = Instant::now();
            srcu.call(move || {
                let _ = send.send(Instant::now());
            });
            let at = called.recv().expect("the callback runs");
            at.duration_since(start).as_nanos() as f64
        })
        .collect();
    delays.sort_by(f64::total_cmp);
    delays[delays.len() / 2]
}

/// Returns the time to make a domain, use it for one section, and drop it.
fn domain() -> f64 {
    let start = Instant::now();
    for _ in 0..WAITS {
        let srcu = Srcu::new();
        drop(srcu.read_lock());
    }
    ns(start, WAITS)
}

type Contender = (&'static str, fn() -> f64);

const CONTENDERS: &[Contender] = &[
    ("srcu synchronize, no reader", synchronize),
    #[cfg(has_urcu)]
    ("liburcu memb synchronize_rcu, no reader", || {
        peers::urcu::memb_synchronize(WAITS) / WAITS as f64
    }),
    ("srcu synchronize, another thread runs", || {
        beside_a_running_thread(synchronize)
    }),
    #[cfg(has_urcu)]
    ("liburcu memb synchronize_rcu, another thread runs", || {
        beside_a_running_thread(|| peers::urcu::memb_synchronize(2000) / 2000.0)
    }),
    ("srcu call_raw", call_raw),
    ("srcu call_raw, all held up by a section", call_raw_held_up),
    ("srcu call", call),
    #[cfg(has_urcu)]
    ("liburcu memb call_rcu", || {
        peers::urcu::memb_call(CALLS) / CALLS as f64
    }),
    ("srcu call_raw, run to the end", call_and_run),
    ("srcu last reader's exit to callback", latency),
    ("srcu call to callback, at rest", idle_latency),
    #[cfg(has_urcu)]
    ("liburcu memb last reader's exit to callback", || {
        let mut delays: Vec<f64> = (0..5).map(|_| peers::urcu::memb_latency()).collect();
        delays.sort_by(f64::total_cmp);
        delays[2]
    }),
    ("srcu domain: new, one section, drop", domain),
];

fn main() {
    let rounds = peers::rounds(7);
    let mut rows: Vec<_> = CONTENDERS.iter().map(|(name, _)| Row::new(name)).collect();
    for _ in 0..rounds {
        for (row, (_, contender)) in rows.iter_mut().zip(CONTENDERS) {
            row.rounds.push(contender());
        }
    }
    println!("ns for one, median of {rounds} rounds, +- half the quartile distance\n");
    println!("| | ns |\n| --- | --- |");
    for row in &rows {
        println!(
            "| {} | {:.1} +-{:.0}% |",
            row.name,
            row.median(),
            row.spread()
        );
    }
    println!();
    let of = |name: &str| peers::row(&rows, name);
    if cfg!(has_urcu) {
        let ratio =
            of("srcu synchronize, no reader").ratio(of("liburcu memb synchronize_rcu, no reader"));
        verdict("synchronize to liburcu memb", ratio, 1.2);
        verdict(
            "call_raw to liburcu call_rcu",
            of("srcu call_raw").ratio(of("liburcu memb call_rcu")),
            0.3,
        );
    } else {
        println!("liburcu: not built in (liburcu-dev or a C compiler is missing)");
    }
    verdict(
        "last reader's exit to callback, of 50 us",
        of("srcu last reader's exit").median() / 50_000.0,
        1.0,
    );
}
