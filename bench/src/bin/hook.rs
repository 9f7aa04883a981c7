//! What does the libc hook add to a `munmap`, and how long does subscribing take while threads
//! unmap?
//!
//! `cargo run --release -p bench --bin hook [ROUNDS]`. `hook first [ROUNDS]` only measures the
//! first use, in fresh processes.
#![allow(missing_docs, missing_debug_implementations, reason = "a bench")]

use mmu_notifier::{InvalidateRange, MmWithUser, Notifier, Subscription, Subsystem};
use mmu_source::hook::Hook;
use mmu_source::kernel::Kernel;
use std::env;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

struct Empty;

impl Notifier for Empty {
    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {}
    fn invalidate_range_end(&self, _: &InvalidateRange<'_>) {}
}

const PAGE: usize = 4096;

fn main() {
    match env::args().nth(1).as_deref() {
        Some("first") => {
            return first(
                env::args()
                    .nth(2)
                    .map_or(31, |rounds| rounds.parse().expect("a number of rounds")),
            );
        }
        Some("first-use") => return first_use(&env::args().nth(2).expect("which sources")),
        _ => {}
    }
    let rounds = env::args()
        .nth(1)
        .map_or(31, |rounds| rounds.parse().expect("a number of rounds"));
    let mm = mmu_source::current();
    println!("{rounds} rounds, medians");
    let sites = mmu_source::hook::probe().expect("the hook works here");
    println!("sites: {}", sites.len());

    let refused = munmap_refused as fn() -> f64;
    let rows = [
        ("munmap, misaligned: refused", refused),
        (
            "mremap, misaligned: refused; flags and vectors are kept",
            mremap_refused,
        ),
        ("getpid by syscall(2): not hooked", getpid),
        ("munmap of 4 KiB, touched", munmap),
    ];
    for (name, measure) in rows {
        compare(name, measure, &mm, rounds);
    }
    installation(rounds);
    (0..=2).for_each(|threads| subscribing(&mm, threads));
}

/// The sources that a fresh process starts.
const FIRST: [&str; 4] = [
    "hook",
    "hook beside two threads",
    "kernel",
    "hook and kernel",
];

/// Prints how long the first use of a source takes. The variants are interleaved.
fn first(rounds: usize) {
    let program = env::current_exe().expect("this program has a name");
    let mut times: [Vec<f64>; FIRST.len()] = Default::default();
    for _ in 0..rounds {
        for (what, times) in FIRST.into_iter().zip(&mut times) {
            // If a BPF program is attached soon after another BPF program was detached, the kernel
            // waits for the tracepoint's grace period. So pause.
            thread::sleep(Duration::from_millis(150));
            let output = Command::new(&program)
                .args(["first-use", what])
                .output()
                .expect("it runs again");
            let time = String::from_utf8_lossy(&output.stdout);
            times.push(
                time.trim()
                    .parse()
                    .unwrap_or_else(|_| panic!("{what}: {output:?}")),
            );
        }
    }
    for (what, mut times) in FIRST.into_iter().zip(times) {
        times.sort_by(f64::total_cmp);
        println!(
            "first use, {what:24} {:7.2} ms, at best {:7.2} ms",
            median(times.clone()),
            times[0]
        );
    }
}

/// Starts the sources that `what` names, and prints how many milliseconds that took.
fn first_use(what: &str) {
    let threads = if what.ends_with("threads") { 2 } else { 0 };
    for _ in 0..threads {
        thread::spawn(thread::park);
    }
    let start = Instant::now();
    let hook = what
        .contains("hook")
        .then(|| Hook::install().expect("the hook works here"));
    let kernel = what
        .contains("kernel")
        .then(|| Kernel::start().expect("the kernel source works here"));
    println!("{}", start.elapsed().as_secs_f64() * 1e3);
    drop((hook, kernel));
}

/// Measures a function of libc without the hook, with the hook alone, with one subscriber and with
/// nine, interleaved. Prints the time of the first three, and the time that each further subscriber
/// adds. Each difference and ratio is a median over the rounds, because the machine's speed drifts.
fn compare(name: &str, measure: fn() -> f64, mm: &MmWithUser, rounds: usize) {
    let kinds: Vec<Subsystem<Empty>> = (0..9)
        .map(|_| Subsystem::new((|_| Ok(Empty)) as fn(&_) -> _))
        .collect();
    let get = |kind: &Subsystem<Empty>| kind.get(mm).expect("subscribes");
    let mut times: Vec<[f64; 4]> = Vec::new();
    for _ in 0..rounds {
        let bare = measure();
        let hook = Hook::install().expect("it worked in the probe");
        let alone = measure();
        let mut held: Vec<Subscription<Empty>> = vec![get(&kinds[0])];
        let one = measure();
        held.extend(kinds[1..].iter().map(get));
        let nine = measure();
        drop(held);
        kinds
            .iter()
            .for_each(|kind| kind.synchronize().expect("outside of callbacks"));
        drop(hook);
        times.push([bare, alone, one, nine]);
    }
    let of = |f: fn(&[f64; 4]) -> f64| median(times.iter().map(f).collect());
    println!("{name}");
    println!("  bare           {:9.1} ns", of(|t| t[0]));
    println!(
        "  hook alone     {:9.1} ns  {:+6.1} ns  {:.3}",
        of(|t| t[1]),
        of(|t| t[1] - t[0]),
        of(|t| t[1] / t[0])
    );
    println!(
        "  1 subscriber   {:9.1} ns  {:+6.1} ns  {:.3}",
        of(|t| t[2]),
        of(|t| t[2] - t[0]),
        of(|t| t[2] / t[0])
    );
    println!(
        "  each further              {:+6.1} ns",
        of(|t| (t[3] - t[2]) / 8.0)
    );
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Returns the nanoseconds per call.
fn time(calls: u32, mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..calls {
        call();
    }
    start.elapsed().as_nanos() as f64 / f64::from(calls)
}

fn munmap_refused() -> f64 {
    time(50_000, || {
        assert_eq!(
            // SAFETY: the kernel refuses a misaligned address, so the call has no effect.
            unsafe { libc::munmap(ptr::without_provenance_mut(0x1001), PAGE) },
            -1
        )
    })
}

fn mremap_refused() -> f64 {
    // SAFETY: the kernel refuses a misaligned address, so the call has no effect.
    let call = || unsafe { libc::mremap(ptr::without_provenance_mut(0x1001), 2 * PAGE, PAGE, 0) };
    time(50_000, || assert_eq!(call(), libc::MAP_FAILED))
}

fn getpid() -> f64 {
    time(50_000, || {
        // SAFETY: the system call takes no argument.
        assert!(unsafe { libc::syscall(libc::SYS_getpid) } > 0)
    })
}

fn munmap() -> f64 {
    const MAPPINGS: usize = 512;
    let mut total = 0.0;
    let times = 8;
    for _ in 0..times {
        let mappings: Vec<*mut libc::c_void> = (0..MAPPINGS).map(|_| touched()).collect();
        let mut next = mappings.iter();
        // SAFETY: the page was mapped for this call, and no code uses it.
        total += time(MAPPINGS as u32, || unsafe {
            assert_eq!(libc::munmap(*next.next().expect("as many"), PAGE), 0)
        });
    }
    total / f64::from(times)
}

fn touched() -> *mut libc::c_void {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses an address where nothing is mapped.
    let page = unsafe {
        libc::mmap(
            ptr::null_mut(),
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    assert_ne!(page, libc::MAP_FAILED);
    // SAFETY: the page was just mapped as writable, and no other code uses it.
    unsafe { page.cast::<u8>().write_volatile(1) };
    page
}

fn installation(rounds: usize) {
    let mut times = Vec::new();
    for _ in 0..rounds {
        times.push(time(100, || {
            drop(Hook::install().expect("it worked before"))
        }));
    }
    println!(
        "install and remove, one thread {:9.1} us",
        median(times) / 1e3
    );
}

/// Times a fresh subscription and its last put, while other threads map and unmap. If there are
/// then more threads than processors, the subscriber may wait for the bracket of a preempted
/// thread.
fn subscribing(mm: &MmWithUser, threads: usize) {
    let hook = Hook::install().expect("it worked before");
    let others: [Subsystem<Empty>; 2] = [const { Subsystem::new(|_| Ok(Empty)) }; 2];
    let _held = others
        .each_ref()
        .map(|kind| kind.get(mm).expect("subscribes"));
    let kind: Subsystem<Empty> = Subsystem::new(|_| Ok(Empty));
    let stop = AtomicBool::new(false);
    let mut times: Vec<f64> = Vec::new();
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // SAFETY: the page was mapped for this call, and no code uses it.
                    unsafe { libc::munmap(touched(), PAGE) };
                }
            });
        }
        for _ in 0..20_000 {
            times.push(time(1, || drop(kind.get(mm).expect("subscribes"))));
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(hook);
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize] / 1e3;
    println!(
        "subscribe and put, {threads} threads unmapping: p50 {:.1} us, p99 {:.1} us, most {:.1} us",
        at(0.5),
        at(0.99),
        at(1.0)
    );
}
