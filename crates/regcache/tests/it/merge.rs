//! Which requests are registered together.

use crate::support::{book, counting, pages};
use mmu_notifier::{Event, VaRange};
use proptest::prelude::*;
use proptest::test_runner::{TestError, TestRunner};
use regcache::{Merge, Options};

#[test]
fn overlapping_requests_become_one_region() {
    let (_mm, device, cache) = book(Options::new());
    drop(cache.get(pages(10, 10)).unwrap());
    drop(cache.get(pages(30, 10)).unwrap());
    let lease = cache.get(pages(15, 20)).unwrap();
    assert_eq!(lease.range(), pages(10, 30));
    assert_eq!(device.registrar().ranges(), [pages(10, 30)]);
    assert_eq!(cache.stats().replaced, 2);
}

#[test]
fn neighbours_are_merged_if_asked_for() {
    for (merge, expected) in [
        (Merge::Overlapping, pages(20, 10)),
        (Merge::Adjacent, pages(10, 30)),
    ] {
        let (_mm, _device, cache) = book(Options::new().merge(merge));
        drop(cache.get(pages(10, 10)).unwrap());
        drop(cache.get(pages(30, 10)).unwrap());
        assert_eq!(cache.get(pages(20, 10)).unwrap().range(), expected);
    }
}

#[test]
fn without_merging_regions_overlap() {
    let (mm, device, cache) = book(Options::new().merge(Merge::Never));
    drop(cache.get(pages(10, 10)).unwrap());
    assert_eq!(cache.get(pages(15, 10)).unwrap().range(), pages(15, 10));
    assert_eq!(device.registrar().ranges(), [pages(10, 10), pages(15, 10)]);
    drop(mm.invalidate(pages(17, 1), Event::Unmap));
    cache.reap();
    assert!(device.registrar().ranges().is_empty(), "both are gone");
}

#[test]
fn without_merging_no_more_than_a_crowd_overlaps() {
    let (_mm, _device, cache) = counting(Options::new().merge(Merge::Never).max_regions(4096));
    for pages_long in 1..2000 {
        drop(cache.get(pages(8, pages_long)).unwrap());
    }
    for first in (10_000..12_000).rev() {
        drop(cache.get(pages(first, 300)).unwrap());
    }
    let live = cache.stats().live_regions;
    assert!(live < 500, "{live} lie over each other");
}

#[test]
fn a_region_that_is_leased_stays_until_its_lease_ends_when_it_is_replaced() {
    let (_mm, device, cache) = book(Options::new());
    let lease = cache.get(pages(10, 10)).unwrap();
    drop(cache.get(pages(15, 10)).unwrap());
    assert_eq!(device.registrar().ranges(), [pages(10, 10), pages(10, 15)]);
    drop(lease);
    assert_eq!(device.registrar().ranges(), [pages(10, 15)]);
}

#[test]
fn merging_stops_at_the_limit() {
    let (_mm, _device, cache) = book(Options::new().max_region_bytes(16 << 12));
    drop(cache.get(pages(10, 10)).unwrap());
    assert_eq!(
        cache.get(pages(15, 12)).unwrap().range(),
        pages(15, 12),
        "17 pages would be too many"
    );
    assert_eq!(
        cache.get(pages(14, 3)).unwrap().range(),
        pages(10, 10),
        "covered"
    );
}

#[test]
fn a_hole_beside_the_request_is_left_out() {
    let (_mm, device, cache) = book(Options::new());
    drop(cache.get(pages(10, 10)).unwrap());
    // The rest of the region was unmapped without an event.
    device.registrar().unmap(pages(10, 2));
    assert_eq!(cache.get(pages(18, 4)).unwrap().range(), pages(18, 4));
}

#[test]
fn what_cannot_be_registered_with_its_neighbour_is_registered_alone() {
    let (_mm, device, cache) = book(Options::new());
    drop(cache.get(pages(10, 10)).unwrap());
    device.registrar().break_over(11);
    assert_eq!(cache.get(pages(18, 4)).unwrap().range(), pages(18, 4));
    assert!(
        cache.get(pages(18, 13)).is_err(),
        "what is too large alone is too large"
    );
}

/// The operations of the fuzz test: ranges are a first page and a count of pages. The index of a
/// lease or bracket is taken modulo their count.
#[derive(Debug, Clone)]
enum Op {
    Get(u64, u64),
    /// A lease that is kept.
    Lease(u64, u64),
    End(usize),
    Invalidate(u64, u64),
    /// An invalidation that stays open.
    Begin(u64, u64),
    Finish(usize),
    Flush,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    // Short ranges in a small area touch each other. Long ranges have granules of other levels and
    // touch several blocks.
    let range = prop_oneof![
        6 => (0_u64..60, 1_u64..8),
        3 => (0_u64..3000, prop_oneof![8 => 1_u64..12, 2 => 1_u64..700]),
    ];
    let op = (range, any::<usize>(), 0..24).prop_map(|((first, count), number, kind)| match kind {
        0..10 => Op::Get(first, count),
        10..14 => Op::Lease(first, count),
        14..17 => Op::End(number),
        17..20 => Op::Invalidate(first, count),
        20 => Op::Begin(first, count),
        21..23 => Op::Finish(number),
        _ => Op::Flush,
    });
    proptest::collection::vec(op, 1..120)
}

fn touches(one: VaRange, other: VaRange, merge: Merge) -> bool {
    let beside = |low: VaRange, high: VaRange| low.end() == Some(high.start());
    one.overlaps(other) || (merge == Merge::Adjacent && (beside(one, other) || beside(other, one)))
}

fn covers(outer: VaRange, inner: VaRange) -> bool {
    outer.start() <= inner.start() && inner.last() <= outer.last()
}

fn union(one: VaRange, other: VaRange) -> VaRange {
    let first = one.start().min(other.start());
    VaRange::covering(first, one.last().max(other.last()).get() - first.get() + 1).unwrap()
}

/// The reference model: lists of intervals.
#[derive(Default)]
struct Naive {
    /// The regions that look-ups find.
    live: Vec<VaRange>,
    /// The regions kept by leases, once for each lease: the registration's handle and range.
    leased: Vec<(u64, VaRange)>,
    /// The open invalidations.
    open: Vec<VaRange>,
}

/// A fault of the reference model, to show that the fuzz test detects faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    Nothing,
    KeepsWhatIsReplaced,
    KeepsWhatIsInvalidated,
    MergesOnce,
    MergesNeighbours,
    FindsWhatIsChanging,
    ForgetsLeases,
}

impl Naive {
    /// Returns the region that a request gets.
    fn get(&mut self, request: VaRange, merge: Merge, wrong: Wrong) -> VaRange {
        if let Some(found) = self.live.iter().find(|region| covers(**region, request)) {
            return *found;
        }
        let merge = if wrong == Wrong::MergesNeighbours {
            Merge::Adjacent
        } else {
            merge
        };
        let (mut region, mut rest) = (request, self.live.clone());
        while merge != Merge::Never
            && let Some(at) = rest.iter().position(|other| touches(*other, region, merge))
        {
            region = union(region, rest.swap_remove(at));
            if wrong == Wrong::MergesOnce {
                break;
            }
        }
        if wrong == Wrong::FindsWhatIsChanging
            || !self.open.iter().any(|open| open.overlaps(region))
        {
            if wrong != Wrong::KeepsWhatIsReplaced {
                self.live = rest;
            }
            self.live.push(region);
        }
        region
    }

    /// Returns the registered ranges in order.
    fn registered(&self, wrong: Wrong) -> Vec<VaRange> {
        let mut leased = if wrong == Wrong::ForgetsLeases {
            Vec::new()
        } else {
            self.leased.clone()
        };
        leased.sort();
        leased.dedup();
        // A leased region that look-ups still find is already in `live`.
        let mut registered = self.live.clone();
        for (_, range) in leased {
            if !self.live.contains(&range) {
                registered.push(range);
            }
        }
        registered.sort();
        registered
    }
}

fn check(ops: &[Op], merge: Merge, wrong: Wrong) -> Result<(), TestCaseError> {
    let (mm, device, cache) = book(Options::new().merge(merge));
    let (mut naive, mut leases, mut brackets) = (Naive::default(), Vec::new(), Vec::new());
    for op in ops {
        match *op {
            Op::Get(first, count) | Op::Lease(first, count) => {
                let lease = cache.get(pages(first, count)).unwrap();
                let expected = naive.get(pages(first, count), merge, wrong);
                if merge == Merge::Never {
                    // Any region that covers the request is right.
                    prop_assert!(covers(lease.range(), pages(first, count)));
                    prop_assert!(lease.range() == expected || naive.live.contains(&lease.range()));
                } else {
                    prop_assert_eq!(lease.range(), expected);
                }
                prop_assert_eq!(lease.is_current(), naive.live.contains(&lease.range()));
                if matches!(op, Op::Lease(..)) {
                    naive.leased.push((*lease.handle(), lease.range()));
                    leases.push(lease);
                }
            }
            Op::End(number) if !leases.is_empty() => {
                let number = number % leases.len();
                drop(leases.swap_remove(number));
                naive.leased.swap_remove(number);
            }
            Op::Invalidate(first, count) => {
                drop(mm.invalidate(pages(first, count), Event::Unmap));
                if wrong != Wrong::KeepsWhatIsInvalidated {
                    naive
                        .live
                        .retain(|region| !region.overlaps(pages(first, count)));
                }
            }
            Op::Begin(first, count) => {
                brackets.push(mm.invalidate(pages(first, count), Event::Unmap));
                naive.open.push(pages(first, count));
                naive
                    .live
                    .retain(|region| !region.overlaps(pages(first, count)));
            }
            Op::Finish(number) if !brackets.is_empty() => {
                let number = number % brackets.len();
                drop(brackets.swap_remove(number));
                naive.open.swap_remove(number);
            }
            Op::Flush => {
                prop_assert_eq!(cache.flush(), naive.live.len() as u64);
                naive.live.clear();
            }
            Op::End(_) | Op::Finish(_) => {}
        }
        cache.reap();
        // If a leased region was invalidated and the same range was registered again, there are two
        // registrations of that range.
        let mut registered = device.registrar().ranges();
        registered.dedup();
        let mut expected = naive.registered(wrong);
        expected.dedup();
        prop_assert_eq!(registered, expected);
        let stats = cache.stats();
        let bytes: u64 = naive.live.iter().map(|region| region.pages() << 12).sum();
        prop_assert_eq!(
            (stats.live_regions, stats.live_bytes),
            (naive.live.len() as u64, bytes)
        );
        for (lease, (_, range)) in leases.iter().zip(&naive.leased) {
            prop_assert_eq!(lease.range(), *range, "what is leased stays");
        }
    }
    drop((leases, brackets));
    cache.flush();
    prop_assert!(device.registrar().ranges().is_empty());
    Ok(())
}

const MERGES: [Merge; 3] = [Merge::Never, Merge::Overlapping, Merge::Adjacent];

/// The fuzz test must soon detect every fault of the reference model.
#[test]
fn the_fuzz_test_detects_each_wrong_variant() {
    let wrongs = [
        Wrong::KeepsWhatIsReplaced,
        Wrong::KeepsWhatIsInvalidated,
        Wrong::MergesOnce,
        Wrong::MergesNeighbours,
        Wrong::FindsWhatIsChanging,
        Wrong::ForgetsLeases,
    ];
    for wrong in wrongs {
        let config = ProptestConfig {
            cases: 100,
            max_shrink_iters: 0,
            failure_persistence: None,
            ..Default::default()
        };
        let mut runner = TestRunner::new(config);
        let result = runner.run(&ops(), |ops| check(&ops, Merge::Overlapping, wrong));
        assert!(
            matches!(result, Err(TestError::Fail(..))),
            "{wrong:?} goes unnoticed"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(testkit::rounds(1000) as u32))]

    #[test]
    fn merging_agrees_with_a_naive_list(ops in ops(), merge in 0_usize..3) {
        check(&ops, MERGES[merge], Wrong::Nothing)?;
    }

    #[test]
    fn a_limit_on_merging_is_kept_and_every_request_covered(ops in ops(), limit in 1_u64..100) {
        let (_mm, _device, cache) = counting(Options::new().merge(Merge::Adjacent).max_region_bytes(limit << 12));
        for op in ops {
            if let Op::Get(first, count) = op {
                let got = cache.get(pages(first, count)).unwrap().range();
                prop_assert!(covers(got, pages(first, count)));
                prop_assert!(got.pages() <= limit.max(got.pages().min(700)));
                prop_assert!(got.pages() <= limit || got.pages() <= 700 && cache.get(got).unwrap().range() == got);
            }
        }
    }
}
