//! The program itself, run by hand: no virtual machine is needed.

use super::*;
use mmu_notifier::Va;
use testkit::{Cap, require};

fn range(start: u64, len: u64) -> VaRange {
    VaRange::covering(Va::new(start), len).expect("a range")
}

/// Whether an event counts as a hit.
fn hits(kernel: &Kernel, range: VaRange) -> bool {
    let before = kernel.generation();
    kernel.inject(range.start().get(), range.end().map_or(0, Va::get)).expect("the program runs");
    kernel.generation() != before
}

#[test]
fn the_filter_finds_what_overlaps_and_little_else() {
    if !require(Cap::Bpf) {
        return;
    }
    let kernel = Kernel::rehearse(1 << 18).expect("BPF works here");
    const AT: u64 = 0x7f12_3456_7000;
    assert!(!hits(&kernel, range(AT, 4096)), "nothing is armed");
    let sizes = (0..32).map(|power| 4096 << power).chain([5 << 12, 17 << 12, (1 << 30) + 4096]);
    for size in sizes {
        let armed = kernel.arm(range(AT, size)).expect("it can be armed");
        for event in (0..36).map(|power| 4096_u64 << power) {
            for start in [AT, AT + size - 4096, AT.saturating_sub(event) + 4096] {
                assert!(
                    hits(&kernel, range(start & !4095, event)),
                    "event of {event:#x} at {start:#x}, armed {size:#x}"
                );
            }
        }
        assert!(hits(&kernel, VaRange::ALL));
        assert!(!hits(&kernel, range(AT + size + (1 << 44), 4096)), "far away from {size:#x}");
        assert!(size > 16 << 12 || !hits(&kernel, range(AT - 4096, 4096)), "the page before {size:#x}");
        drop(armed);
        assert!(!hits(&kernel, range(AT, size)), "disarmed");
    }
    let everything = kernel.arm(VaRange::ALL).expect("it can be armed");
    assert!(hits(&kernel, range(0x1000, 1)));
    drop(everything);
    assert_eq!(kernel.lost() + kernel.settle().expect("no fork"), kernel.generation() + kernel.lost());
}
