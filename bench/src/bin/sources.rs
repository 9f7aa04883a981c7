//! What do the kernel and the uffd source cost, compared with the system calls alone?
//!
//! `cargo run --release -p bench --bin sources [ROUNDS]`
//!
//! The first two tables need no KVM: the first only asks the source `kernel`, the second runs its
//! BPF program by hand (`BPF_PROG_TEST_RUN`). On a machine without KVM, the tables that need a
//! virtual machine are left out.
#![allow(missing_docs, reason = "a bench")]

use mmu_notifier::{InvalidateRange, Notifier, Registration, Va, VaRange};
use mmu_source::kernel::Kernel;
use mmu_source::uffd::Uffd;
use std::ffi::c_void;
use std::hint::black_box;
use std::ptr;
use std::sync::Arc;
use std::time::Instant;

const PAGE: usize = 4096;

/// Returns the nanoseconds for one of `times` runs of `f`.
fn each(times: u32, mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    (0..times).for_each(|_| f());
    start.elapsed().as_nanos() as f64 / f64::from(times)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures all `runs` in turn, and prints their medians and their ratios to the first run.
fn compare(rounds: usize, title: &str, runs: &mut [(&str, &mut dyn FnMut() -> f64)]) {
    let mut taken = vec![Vec::new(); runs.len()];
    for _ in 0..rounds {
        for (values, (_, run)) in taken.iter_mut().zip(runs.iter_mut()) {
            values.push(run());
        }
    }
    println!("{title}");
    let medians: Vec<f64> = taken.into_iter().map(median).collect();
    for ((name, _), value) in runs.iter().zip(&medians) {
        println!("  {name:<44} {value:>10.1} ns  {:>6.2}", value / medians[0]);
    }
}

fn map(bytes: usize) -> *mut c_void {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: the kernel chooses an address where nothing is mapped.
    let at = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at
}

/// Maps a page at an address where a page of `map` is or was. Only one thread of this program maps,
/// so no other mapping has got the address meanwhile.
fn map_over(at: *mut c_void) {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: the address is that of a page of `map`, and no other mapping has got it since.
    let again = unsafe { libc::mmap(at, PAGE, protection, flags | libc::MAP_FIXED, -1, 0) };
    assert_eq!(again, at);
}

fn unmap(at: *mut c_void, bytes: usize) {
    // SAFETY: the mapping comes from `map`, and no code uses it any more.
    unsafe { libc::munmap(at, bytes) };
}

fn touch(at: *mut c_void, bytes: usize) {
    for offset in (0..bytes).step_by(PAGE) {
        // SAFETY: the byte is in a mapping of `map`, which is writable.
        unsafe { at.cast::<u8>().wrapping_add(offset).write_volatile(1) };
    }
}

fn range(at: *mut c_void, bytes: usize) -> VaRange {
    VaRange::covering(Va::new(at.addr() as u64), bytes as u64).expect("a range")
}

fn page(number: u64) -> VaRange {
    VaRange::covering(Va::new(0x5000_0000_0000 + number * 0x13_000), 1).expect("a page")
}

struct Listens;

impl Notifier for Listens {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        black_box(range.range());
    }
}

fn cycle() -> f64 {
    each(2_000, || {
        let at = map(PAGE);
        touch(at, PAGE);
        unmap(at, PAGE);
    })
}

fn main() {
    let rounds = std::env::args()
        .nth(1)
        .map_or(9, |rounds| rounds.parse().expect("a number of rounds"));
    let _listens = Registration::new(&mmu_source::current(), Listens)
        .map_err(|_| ())
        .expect("outside of brackets");
    match Kernel::rehearse(1 << 18) {
        Ok(kernel) => by_hand(rounds, &kernel),
        Err(error) => println!("SKIP kernel by hand: {error}"),
    }
    match Kernel::start() {
        Ok(kernel) => {
            drop(kernel);
            on_and_off(rounds);
            real(rounds, &Kernel::start().expect("it has started before"));
        }
        Err(error) => println!("SKIP kernel: {error}"),
    }
    match Uffd::start() {
        Ok(source) => uffd(rounds, &source),
        Err(error) => println!("SKIP uffd: {error}"),
    }
}

fn by_hand(rounds: usize, kernel: &Arc<Kernel>) {
    let generation = kernel.settle().expect("no fork");
    compare(
        rounds,
        "questions to the kernel source",
        &mut [
            ("generation()", &mut || {
                each(10_000_000, || _ = black_box(kernel.generation()))
            }),
            ("is_current()", &mut || {
                each(10_000_000, || {
                    _ = black_box(kernel.is_current(black_box(generation)))
                })
            }),
            ("settle(), nothing to tell", &mut || {
                each(10_000_000, || drop(black_box(kernel.settle())))
            }),
        ],
    );
    let miss = |kernel: &Kernel| {
        each(20_000, || {
            kernel
                .inject(0x6000_0000_0000, 0x6000_0000_1000)
                .expect("it runs")
        })
    };
    // Pages that are not armed. There are so many of them that a few share a counter of the filter
    // with an armed page.
    let mixed = |kernel: &Kernel| {
        let mut number = 0;
        each(20_000, || {
            number = (number + 1) % 4096;
            let at = 0x6000_0000_0000 + number * 0x1000;
            kernel.inject(at, at + 0x1000).expect("it runs");
        })
    };
    let arm = |count: u64| -> Vec<_> {
        (0..count)
            .map(|number| kernel.arm(page(number)).expect("armed"))
            .collect()
    };
    compare(
        rounds,
        "the BPF program by hand, the system call included",
        &mut [
            ("nothing armed", &mut || miss(kernel)),
            ("10 armed, a page that is not", &mut || {
                let _armed = arm(10);
                mixed(kernel)
            }),
            ("10,000 armed, a page that is not", &mut || {
                let _armed = arm(10_000);
                mixed(kernel)
            }),
            ("an armed page, and settle()", &mut || {
                let _armed = arm(10);
                let at = page(3).start().get();
                each(20_000, || {
                    kernel.inject(at, at + 4096).expect("it runs");
                    _ = black_box(kernel.settle().expect("no fork"));
                })
            }),
        ],
    );
}

/// Compares a cycle without the source with cycles while the source runs. Each measurement starts
/// the source anew. A first cycle, which is not counted, lets the kernel finish the work that the
/// start or the stop has caused.
fn on_and_off(rounds: usize) {
    let on = |armed: u64| {
        let kernel = Kernel::start().expect("it has started before");
        let _armed: Vec<_> = (0..armed)
            .map(|number| kernel.arm(page(number)).expect("armed"))
            .collect();
        cycle();
        cycle()
    };
    compare(
        rounds,
        "mmap, touch, munmap of a page",
        &mut [
            ("bare", &mut || {
                cycle();
                cycle()
            }),
            ("kernel on, nothing armed", &mut || on(0)),
            ("kernel on, 10 other ranges armed", &mut || on(10)),
        ],
    );
}

fn real(rounds: usize, kernel: &Arc<Kernel>) {
    // Returns the time from the unmapping of a page that was touched to the end of `f`.
    let unmapping = |arm: bool, f: &mut dyn FnMut()| {
        const TIMES: u32 = 500;
        let at = map(PAGE);
        let armed = arm.then(|| kernel.arm(range(at, PAGE)).expect("armed"));
        let mut taken = 0.0;
        for _ in 0..TIMES {
            map_over(at);
            touch(at, PAGE);
            let start = Instant::now();
            unmap(at, PAGE);
            f();
            taken += start.elapsed().as_nanos() as f64;
        }
        drop(armed);
        taken / f64::from(TIMES)
    };
    compare(
        rounds,
        "munmap of a page",
        &mut [
            ("not armed", &mut || unmapping(false, &mut || {})),
            ("armed", &mut || unmapping(true, &mut || {})),
            ("armed, and drain()", &mut || {
                unmapping(true, &mut || _ = black_box(kernel.drain()))
            }),
            ("armed, and settle()", &mut || {
                unmapping(true, &mut || {
                    _ = black_box(kernel.settle().expect("no fork"))
                })
            }),
        ],
    );
    let whole = kernel.arm(page(0)).expect("armed");
    compare(
        rounds,
        "waiting for changes under way",
        &mut [("read_begin() after a change", &mut || {
            each(50, || {
                unmap(map(PAGE), PAGE);
                _ = whole.read_begin().expect("a virtual machine");
            })
        })],
    );
}

fn uffd(rounds: usize, source: &Arc<Uffd>) {
    const PAGES: usize = 512;
    let first_touch = |arm: bool| {
        let at = map(PAGES * PAGE);
        let armed = arm.then(|| source.arm(range(at, PAGES * PAGE)).expect("armed"));
        let start = Instant::now();
        touch(at, PAGES * PAGE);
        let taken = start.elapsed().as_nanos() as f64 / PAGES as f64;
        drop(armed);
        unmap(at, PAGES * PAGE);
        taken
    };
    compare(
        rounds * 5,
        "uffd: first touch of a page",
        &mut [
            ("bare", &mut || first_touch(false)),
            ("armed", &mut || first_touch(true)),
        ],
    );
    let armed_cycle = |settle: bool| {
        let mut taken = 0.0;
        for _ in 0..500 {
            let start = Instant::now();
            let at = map(PAGE);
            taken += start.elapsed().as_nanos() as f64;
            let armed = source.arm(range(at, PAGE)).expect("armed");
            let start = Instant::now();
            touch(at, PAGE);
            unmap(at, PAGE);
            if settle {
                source.settle().expect("no fork");
            }
            taken += start.elapsed().as_nanos() as f64;
            drop(armed);
        }
        taken / 500.0
    };
    compare(
        rounds,
        "uffd: mmap, touch, munmap of a page (arming not counted)",
        &mut [
            ("bare", &mut cycle),
            ("armed", &mut || armed_cycle(false)),
            ("armed, and settle()", &mut || armed_cycle(true)),
        ],
    );
}
