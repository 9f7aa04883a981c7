//! Compares the table with a plain list, and tests the notes of callbacks while the table is
//! locked.

use super::*;
use mmu_notifier::Va;

fn change(start: u64, len: u64) -> Change {
    Change {
        event: "unmap",
        range: covering(start, len).expect("a range"),
    }
}

fn is_stale(ranges: &Ranges, start: u64, len: u64) -> bool {
    matches!(ranges.look(start, len), Verdict::Stale(_))
}

#[test]
fn a_change_makes_stale_what_it_meets_and_nothing_else() {
    let ranges = Ranges::new();
    let keys = [
        (0x1000, 0x1000),
        (0x1000, 0x10_0000),
        (0x2000, 1),
        (0x5fff, 2),
        (0x8000, 0x1000),
    ];
    for (start, len) in keys {
        ranges.subscribe(start, len, None);
    }
    assert!(ranges.is_clean());
    assert!(ranges.changed(change(0x6000, 0x1000)));
    let stale: Vec<bool> = keys
        .iter()
        .map(|(start, len)| is_stale(&ranges, *start, *len))
        .collect();
    assert_eq!(stale, [false, true, false, true, false]);
    assert!(!ranges.is_clean());
    ranges.unsubscribe(0x1000, 0x10_0000);
    ranges.unsubscribe(0x5fff, 2);
    assert!(ranges.is_clean(), "nothing stale is left");
    assert!(
        !ranges.changed(change(0x6000, 0x1000)),
        "nothing is watched there"
    );
}

#[test]
fn equal_ranges_are_counted() {
    let ranges = Ranges::new();
    ranges.subscribe(0x1000, 8, None);
    ranges.subscribe(0x1000, 8, None);
    ranges.unsubscribe(0x1000, 8);
    ranges.changed(change(0x1000, 1));
    assert!(is_stale(&ranges, 0x1000, 8));
    ranges.unsubscribe(0x1000, 8);
    assert_eq!(
        (ranges.look(0x1000, 8), ranges.is_clean()),
        (Verdict::Unknown, true)
    );
    // A range that this process never subscribed.
    ranges.unsubscribe(0x1000, 8);
}

#[test]
fn a_callback_that_finds_the_table_locked_leaves_a_note() {
    let ranges = Ranges::new();
    let far = 0x7000_0000_0000;
    ranges.subscribe(0x1000, 8, None);
    ranges.subscribe(far + (5 << 21), 8, None);
    let held = ranges.table.lock().unwrap();
    // This thread itself holds the lock, as it does when entering a range frees memory.
    assert!(ranges.changed(change(far + (5 << 21), 4096)));
    drop(held);
    assert!(!ranges.is_clean());
    assert!(is_stale(&ranges, far + (5 << 21), 8));
    assert!(!is_stale(&ranges, 0x1000, 8), "another granule");
    assert_eq!(
        ranges.pending.load(Ordering::Relaxed),
        0,
        "the note was entered"
    );
    assert_eq!(ranges.dirty.load(Ordering::Relaxed), 1);
}

#[test]
fn a_note_of_everything_is_everything() {
    assert_eq!(granules(VaRange::ALL), u64::MAX);
    assert_eq!(granules(covering(0, 1).unwrap()), 1);
    assert_eq!(
        granules(covering((63 << 21) + 4096, 1 << 21).unwrap()),
        1 << 63 | 1,
        "the bits wrap around"
    );
    assert_eq!(granules(covering(0, 63 << 21).unwrap()), u64::MAX >> 1);
}

/// Every pair of a watched range and a change, among small and some large ranges.
#[test]
fn the_table_agrees_with_a_plain_list() {
    let spots: Vec<(u64, u64)> = [0x1000, 0x1800, 0x2000, 0x3000, 0xf000, 0x1_0000]
        .iter()
        .flat_map(|start| {
            [1, 0x800, 0x1000, 0x1001, 0x4000, 0xf000, 0x8000_0000].map(|len| (*start, len))
        })
        .collect();
    for (start, len) in &spots {
        let ranges = Ranges::new();
        spots
            .iter()
            .for_each(|(start, len)| ranges.subscribe(*start, *len, None));
        let change = change(*start, *len);
        ranges.changed(change);
        for (at, long) in &spots {
            let (from, to) = (
                change.range.start(),
                change.range.end().expect("below the end"),
            );
            let meets = Va::new(*at) < to && Va::new(at + long) > from;
            assert_eq!(
                is_stale(&ranges, *at, *long),
                meets,
                "{at:#x}+{long:#x} after {change:?}"
            );
        }
    }
}

/// Four threads subscribe and change ranges at the same time: a range that changed after its
/// subscription is stale.
#[test]
fn no_change_is_lost_between_threads() {
    let ranges = Ranges::new();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let ranges = &ranges;
            scope.spawn(move || {
                for round in 0..20_000_u64 {
                    // In even rounds in a granule of the thread's own, in odd ones between the
                    // ranges of the other threads.
                    let page = match round % 2 {
                        0 => (thread + 1) * 512 + round % 300,
                        _ => round % 100 * 4 + thread,
                    };
                    let start = page << 12;
                    ranges.subscribe(start, 4096, None);
                    ranges.changed(change(start, 4096));
                    assert!(
                        matches!(ranges.look(start, 4096), Verdict::Stale(_)),
                        "round {round}"
                    );
                    ranges.unsubscribe(start, 4096);
                }
            });
        }
    });
    assert_eq!(ranges.stale(), []);
    assert_eq!(ranges.count(), Some(0));
    assert_eq!(ranges.dirty.load(Ordering::Relaxed), 0);
}
