//! Runs one fast path a given number of times, under an emulator that counts instructions. Unlike
//! times, counts of instructions can be compared between two kinds of processors.
//!
//! `instructions {nothing | section | bracket | get | hit | watch} TIMES`. The difference between
//! two runs with different TIMES is the count of the additional rounds. `bench/README.md` has the
//! commands.
#![allow(missing_docs, reason = "a bench")]

use mmu_notifier::{Event, InvalidateRange, MmWithUser, Notifier, Subsystem, Va, VaRange};
use mmu_source::Watch;
use regcache::{Counting, Device, Options};
use srcu::Srcu;
use std::hint::black_box;

struct Empty;

impl Notifier for Empty {
    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {}
}

fn page(number: u64) -> VaRange {
    VaRange::covering(Va::new(number << 12), 1).expect("a page")
}

/// Runs `f` once, which initialises all objects that are made at first use, and then `times` more.
#[inline(never)]
fn repeat(times: u32, mut f: impl FnMut()) {
    f();
    for _ in 0..times {
        f();
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_default();
    let times = arguments.next().and_then(|times| times.parse().ok());
    let times = times.expect("how often");
    let mm = MmWithUser::new();
    match path.as_str() {
        "nothing" => repeat(times, || _ = black_box(&mm)),
        "section" => {
            let srcu = Srcu::new();
            repeat(times, || drop(black_box(&srcu).read_lock()));
        }
        "bracket" => repeat(times, || {
            drop(black_box(&mm).invalidate(page(1), Event::Clear));
        }),
        "get" => {
            let subsystem: Subsystem<Empty> = Subsystem::new(|_| Ok(Empty));
            let _held = subsystem.get(&mm).expect("outside of brackets");
            repeat(times, || {
                drop(black_box(&subsystem).get(&mm).expect("it is there"));
            });
        }
        "hit" => {
            let device = Device::new(Counting::default(), Options::new());
            let cache = device.open(&mm).expect("outside of brackets");
            // Register several regions, so that the look-up is realistic.
            let regions: Vec<_> = (0..16).map(|number| page(2 * number)).collect();
            for region in regions {
                drop(cache.get(region).expect("a free place"));
            }
            repeat(times, || {
                drop(black_box(&cache).get(page(6)).expect("it is there"));
            });
        }
        "watch" => {
            let watch = Watch::new(page(1)).expect("a watch");
            repeat(times, || assert!(black_box(&watch).is_valid()));
        }
        _ => panic!("nothing, section, bracket, get, hit or watch, and how often"),
    }
}
