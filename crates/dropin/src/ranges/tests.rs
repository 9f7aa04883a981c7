//! Compares the table with a plain list, and tests the notes of callbacks while the table is
//! locked.

use super::*;
use mmu_notifier::Va;
use mmu_source::kernel::Kernel;
use std::sync::Arc;

fn change(start: u64, len: u64) -> Change {
    Change {
        event: "unmap",
        range: covering(start, len).expect("a range"),
    }
}

/// Enters a registration that has no watch.
fn watched(ranges: &Ranges, start: u64, len: u64) {
    ranges.subscribe(start, len, || Ok(None));
}

fn is_stale(ranges: &Ranges, start: u64, len: u64) -> bool {
    matches!(ranges.look(start, len), Verdict::Stale(_))
}

#[test]
fn a_change_makes_stale_what_it_meets_and_nothing_else() {
    let ranges = Ranges::new(false);
    let keys = [
        (0x1000, 0x1000),
        (0x1000, 0x10_0000),
        (0x2000, 1),
        (0x5fff, 2),
        (0x8000, 0x1000),
    ];
    for (start, len) in keys {
        watched(&ranges, start, len);
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

std::thread_local! {
    /// A change that another thread makes while this thread enters notes.
    static DURING_THE_WALK: std::cell::Cell<Option<Change>> = const { std::cell::Cell::new(None) };
}

/// `enter_notes` calls this when it has looked at each range.
pub(super) fn after_the_walk(ranges: &Ranges) {
    if let Some(change) = DURING_THE_WALK.take() {
        assert!(
            ranges.changed(change),
            "the table is locked, so it is noted"
        );
    }
}

#[test]
fn a_note_that_is_set_again_while_notes_are_entered_stays() {
    let ranges = Ranges::new(false);
    let table = ranges.lock();
    assert!(ranges.changed(change(0x1000, 1)));
    drop(table);
    DURING_THE_WALK.set(Some(change(0x1000, 1)));
    drop(ranges.lock());
    assert!(!ranges.is_clean(), "the second note is still to be entered");
    drop(ranges.lock());
    assert!(ranges.is_clean());
}

#[test]
fn equal_ranges_are_counted() {
    let ranges = Ranges::new(false);
    watched(&ranges, 0x1000, 8);
    watched(&ranges, 0x1000, 8);
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
    let ranges = Ranges::new(false);
    let far = 0x7000_0000_0000;
    watched(&ranges, 0x1000, 8);
    watched(&ranges, far + (5 << 21), 8);
    let held = ranges.table.lock().unwrap();
    // This thread itself holds the lock, as when entering a range frees memory and so runs the
    // callback.
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
        let ranges = Ranges::new(false);
        spots
            .iter()
            .for_each(|(start, len)| watched(&ranges, *start, *len));
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
    let ranges = Ranges::new(false);
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
                    watched(ranges, start, 4096);
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

#[test]
fn a_range_that_was_refused_and_registered_anew_is_valid() {
    let ranges = Ranges::new(false);
    for _ in 0..3 {
        watched(&ranges, 0x1000, 8);
        assert_eq!(ranges.look(0x1000, 8), Verdict::Valid);
        ranges.changed(change(0x1000, 1));
        assert!(is_stale(&ranges, 0x1000, 8));
        // libfabric drops it, and up to 2.0 calls nothing.
        assert!(matches!(ranges.ask(0x1000, 8), Verdict::Stale(_)));
        assert!(ranges.is_clean());
    }
    assert_eq!(ranges.count(), Some(0));
}

#[test]
fn a_range_with_two_registrations_is_refused_until_all_are_dropped() {
    let ranges = Ranges::new(false);
    watched(&ranges, 0x1000, 8);
    watched(&ranges, 0x1000, 8);
    ranges.changed(change(0x1000, 1));
    // One cache asks and registers anew; the other still has the stale registration.
    assert!(matches!(ranges.ask(0x1000, 8), Verdict::Stale(_)));
    watched(&ranges, 0x1000, 8);
    assert!(is_stale(&ranges, 0x1000, 8));
    let stale = ranges.stale();
    assert_eq!(stale.len(), 1);
    // After `notify` and before its end is noted.
    watched(&ranges, 0x1000, 8);
    ranges.dropped(stale[0]);
    assert_eq!(ranges.look(0x1000, 8), Verdict::Valid);
    assert!(ranges.is_clean());
    // Only the last registration can be there.
    ranges.changed(change(0x1000, 1));
    ranges.ask(0x1000, 8);
    assert_eq!(ranges.count(), Some(0));
}

#[test]
fn a_change_after_the_list_was_made_is_not_forgotten() {
    let ranges = Ranges::new(false);
    watched(&ranges, 0x1000, 8);
    ranges.changed(change(0x1000, 1));
    let first = ranges.stale();
    watched(&ranges, 0x1000, 8);
    assert!(
        ranges.changed(change(0x1000, 1)),
        "the thread is woken again"
    );
    ranges.dropped(first[0]);
    assert!(is_stale(&ranges, 0x1000, 8));
    ranges
        .stale()
        .into_iter()
        .for_each(|stale| ranges.dropped(stale));
    assert_eq!((ranges.count(), ranges.is_clean()), (Some(0), true));
    // The number of the first change means nothing for a range that was entered again.
    watched(&ranges, 0x1000, 8);
    ranges.changed(change(0x1000, 1));
    ranges.dropped(first[0]);
    assert!(is_stale(&ranges, 0x1000, 8));
}

#[test]
fn changes_have_no_tag_and_the_library_gets_its_own_back() {
    let tag = if cfg!(target_arch = "aarch64") {
        0x0b << 56
    } else {
        0
    };
    let ranges = Ranges::new(false);
    watched(&ranges, tag | 0x1000, 8);
    watched(&ranges, 0x1000, 16);
    ranges.changed(change(0x1000, 1));
    let mut starts: Vec<u64> = ranges.stale().iter().map(|stale| stale.start).collect();
    starts.sort_unstable();
    assert_eq!(starts, [0x1000, tag | 0x1000]);
    assert!(is_stale(&ranges, tag | 0x1000, 8));
    ranges.unsubscribe(tag | 0x1000, 8);
    ranges.unsubscribe(0x1000, 16);
    assert_eq!((ranges.count(), ranges.is_clean()), (Some(0), true));
}

/// A kernel that has skipped the source's program has not touched the watch.
#[test]
fn a_valid_watch_proves_nothing_if_the_kernel_source_may_miss_changes() {
    let kernel = match Kernel::rehearse(1 << 18) {
        Ok(kernel) => kernel,
        Err(error) => return println!("SKIP: {error}"),
    };
    for may_miss in [false, true] {
        let ranges = Ranges::new(false).with_doubt(may_miss);
        let range = covering(0x1000, 4096).expect("a range");
        let make = || Ok(Some(kernel.watch(range).expect("a watch")));
        assert!(!ranges.subscribe(0x1000, 4096, make));
        ranges.changed(change(0x1000, 1));
        assert_eq!(is_stale(&ranges, 0x1000, 4096), may_miss);
    }
}

#[test]
fn a_range_that_cannot_be_watched_is_refused() {
    let ranges = Ranges::new(false);
    watched(&ranges, 0x1000, 8);
    let reason = change(0x1000, 1);
    assert!(ranges.subscribe(0x1000, 8, || Err(reason)));
    assert!(is_stale(&ranges, 0x1000, 8), "the other one, too");
    assert_eq!(ranges.stale().len(), 1);
    // The next one has no watch either.
    ranges
        .stale()
        .into_iter()
        .for_each(|stale| ranges.dropped(stale));
    for _ in 0..2 {
        assert!(ranges.subscribe(0x1000, 8, || Err(reason)));
        assert!(!ranges.is_clean() && is_stale(&ranges, 0x1000, 8));
        assert!(matches!(ranges.ask(0x1000, 8), Verdict::Stale(_)));
        assert_eq!((ranges.count(), ranges.is_clean()), (Some(0), true));
    }
}

/// The change was reported before the range was entered, so no callback has met the range.
#[test]
fn a_watch_that_is_invalid_already_makes_its_range_stale() {
    let kernel = match Kernel::rehearse(1 << 18) {
        Ok(kernel) => kernel,
        Err(error) => return println!("SKIP: {error}"),
    };
    let ranges = Ranges::new(false);
    let make = || {
        let watch = kernel.watch(covering(0x1000, 4096).expect("a range"));
        kernel.inject(0x1000, 0x2000).expect("the program runs");
        let _ = kernel.settle().expect("no fork");
        Ok(Some(watch.expect("a watch")))
    };
    assert!(ranges.subscribe(0x1000, 4096, make), "it must be dropped");
    assert!(!ranges.is_clean() && is_stale(&ranges, 0x1000, 4096));
}

#[test]
fn a_child_believes_nothing_until_the_caches_have_dropped_everything() {
    let ranges = Ranges::new(true);
    // One cache has registered the range anew; another may still hold the parent's registration.
    watched(&ranges, 0, 100);
    assert!(!ranges.is_clean());
    assert_eq!(ranges.ask(0, 100), Verdict::Unknown);
    assert_eq!(ranges.ask(0, 100), Verdict::Unknown);
    let all = ranges.stale();
    assert_eq!(all, [EVERYTHING]);
    assert_eq!(ranges.ask(0, 100), Verdict::Unknown);
    for stale in all {
        ranges.dropped(stale);
        // A second thread has been started meanwhile, and did the same.
        ranges.dropped(stale);
    }
    watched(&ranges, 0, 100);
    assert_eq!(ranges.ask(0, 100), Verdict::Valid);
    assert!(ranges.is_clean() && ranges.stale().is_empty());
    ranges.changed(change(0, 1));
    assert!(is_stale(&ranges, 0, 100));
}

/// Changes a page and refuses its registration.
fn refused(ranges: &Ranges, kernel: &Arc<Kernel>, start: u64) {
    kernel
        .inject(start, start + 4096)
        .expect("the program runs");
    // As if the wait of another thread ended just before the refusal: the renewal finds no change
    // under way.
    let _ = kernel.read_begin().expect("no fork");
    assert!(matches!(ranges.ask(start, 4096), Verdict::Stale(_)));
    assert!(ranges.is_clean());
}

#[test]
fn a_refused_range_is_parked_and_a_change_before_its_next_registration_is_seen() {
    let kernel = match Kernel::rehearse(1 << 18) {
        Ok(kernel) => kernel,
        Err(error) => return println!("SKIP: {error}"),
    };
    let ranges = Ranges::new(false);
    let make = |start| {
        let watch = kernel.watch(covering(start, 4096).expect("a range"));
        Ok(Some(watch.expect("a watch")))
    };
    let kept = || -> Result<Option<Watch>, Change> { panic!("the parked entry has a watch") };
    assert!(!ranges.subscribe(0x1000, 4096, || make(0x1000)));
    refused(&ranges, &kernel, 0x1000);
    // A parked range counts as removed.
    assert_eq!(ranges.count(), Some(0));
    assert_eq!(ranges.ask(0x1000, 4096), Verdict::Unknown);
    ranges.unsubscribe(0x1000, 4096);
    assert!(!ranges.subscribe(0x1000, 4096, kept));
    assert_eq!(ranges.look(0x1000, 4096), Verdict::Valid);
    assert_eq!(ranges.count(), Some(1));

    refused(&ranges, &kernel, 0x1000);
    kernel.inject(0x1000, 0x2000).expect("the program runs");
    let _ = kernel.settle().expect("no fork");
    let met = ranges.changed(change(0x1000, 4096));
    assert!(!met && ranges.is_clean(), "there is no registration");
    assert!(ranges.subscribe(0x1000, 4096, kept), "it is stale");
    assert!(!ranges.is_clean() && is_stale(&ranges, 0x1000, 4096));

    // At most one range is parked: another refusal removes the first one.
    assert!(!ranges.subscribe(0x8000, 4096, || make(0x8000)));
    refused_both(&ranges, &kernel);
}

/// Refuses both ranges. Only the second one can be parked then.
fn refused_both(ranges: &Ranges, kernel: &Arc<Kernel>) {
    let _ = kernel.read_begin().expect("no fork");
    assert!(matches!(ranges.ask(0x1000, 4096), Verdict::Stale(_)));
    refused(ranges, kernel, 0x8000);
    assert_eq!(ranges.count(), Some(0));
    let mut is_made = false;
    ranges.subscribe(0x1000, 4096, || {
        is_made = true;
        Ok(None)
    });
    assert!(is_made, "its entry was removed");
    assert_eq!(ranges.count(), Some(1));
}

/// The change that made the range stale may still be under way in another thread. libfabric must
/// not register the pages before that change is over.
#[test]
fn a_refusal_waits_for_the_change_and_a_later_one_is_seen() {
    let kernel = match Kernel::rehearse(1 << 18) {
        Ok(kernel) => kernel,
        Err(error) => return println!("SKIP: {error}"),
    };
    let ranges = Ranges::new(false);
    let make = || {
        let watch = kernel.watch_at_once(covering(0x1000, 4096).expect("a range"));
        Ok(Some(watch.expect("a watch")))
    };
    assert!(!ranges.subscribe(0x1000, 4096, make));
    for _ in 0..2 {
        kernel.inject(0x1000, 0x2000).expect("the program runs");
        let (_, machines) = kernel.waits();
        assert!(matches!(ranges.ask(0x1000, 4096), Verdict::Stale(_)));
        // A rehearsal has no machine B, so each wait makes a machine.
        assert_eq!(kernel.waits().1, machines + 1, "it has waited");
        kernel.inject(0x1000, 0x2000).expect("the program runs");
        // libfabric has registered the range before that change, and subscribes after it.
        assert!(ranges.subscribe(0x1000, 4096, make), "it must be dropped");
        assert!(!ranges.is_clean() && is_stale(&ranges, 0x1000, 4096));
    }
}

/// Up to 2.0, libfabric evicts registrations without a call of `unsubscribe`.
#[test]
fn the_table_stays_bounded_although_nothing_is_unsubscribed() {
    let ranges = Ranges::new(false);
    let start = |number: usize| (number as u64) << 13;
    let mut wakes = Vec::new();
    for number in 1..=4 * most::MOST {
        if ranges.subscribe(start(number), 4096, || Ok(None)) {
            wakes.push(number);
            assert!(is_stale(&ranges, start(number - most::MOST), 4096));
            assert!(!is_stale(&ranges, start(number), 4096));
            let stale = ranges.stale();
            assert_eq!(stale.len(), most::MOST / 2, "the older half");
            stale.into_iter().for_each(|stale| ranges.dropped(stale));
            assert!(ranges.is_clean());
            assert_eq!(ranges.count(), Some(most::MOST / 2 + 1));
        }
    }
    assert_eq!(wakes.len(), 1 + (3 * most::MOST - 1) / (most::MOST / 2));
    assert_eq!(wakes.first(), Some(&(most::MOST + 1)), "not before");
}

#[test]
fn a_version_that_unsubscribes_may_have_as_many_ranges_as_it_likes() {
    let ranges = Ranges::new(false);
    ranges.unsubscribe(0, 8);
    for number in 1..=2 * most::MOST as u64 {
        assert!(!ranges.subscribe(number << 13, 4096, || Ok(None)));
    }
    assert!(ranges.is_clean());
}
