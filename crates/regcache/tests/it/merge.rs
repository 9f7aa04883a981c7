//! What is registered together.

use crate::support::{book, counting, pages};
use mmu_notifier::{Event, VaRange};
use proptest::prelude::*;
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
    for (merge, expected) in [(Merge::Overlapping, pages(20, 10)), (Merge::Adjacent, pages(10, 30))] {
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
    assert_eq!(cache.get(pages(15, 12)).unwrap().range(), pages(15, 12), "17 pages would be too many");
    assert_eq!(cache.get(pages(14, 3)).unwrap().range(), pages(10, 10), "covered");
}

#[test]
fn a_hole_beside_the_request_is_left_out() {
    let (_mm, device, cache) = book(Options::new());
    drop(cache.get(pages(10, 10)).unwrap());
    // The rest of it went away, and nobody has said so.
    device.registrar().unmap(pages(10, 2));
    assert_eq!(cache.get(pages(18, 4)).unwrap().range(), pages(18, 4));
}

#[test]
fn what_cannot_be_registered_with_its_neighbour_is_registered_alone() {
    let (_mm, device, cache) = book(Options::new());
    drop(cache.get(pages(10, 10)).unwrap());
    device.registrar().break_over(11);
    assert_eq!(cache.get(pages(18, 4)).unwrap().range(), pages(18, 4));
    assert!(cache.get(pages(18, 13)).is_err(), "what is too large alone is too large");
}

/// What the fuzz does.
#[derive(Debug, Clone)]
enum Op {
    Get(u64, u64),
    Invalidate(u64, u64),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let range = (0_u64..3000, prop_oneof![8 => 1_u64..12, 2 => 1_u64..700]);
    let op = (range, 0..4).prop_map(|((first, count), kind)| match kind {
        0 => Op::Invalidate(first, count),
        _ => Op::Get(first, count),
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

/// The obvious way: a list of intervals. Returns what a request gets.
fn naive_get(list: &mut Vec<VaRange>, request: VaRange, merge: Merge) -> VaRange {
    if let Some(found) = list.iter().find(|region| covers(**region, request)) {
        return *found;
    }
    let mut region = request;
    if merge != Merge::Never {
        while let Some(at) = list.iter().position(|other| touches(*other, region, merge)) {
            region = union(region, list.swap_remove(at));
        }
    }
    list.push(region);
    region
}

fn check(ops: &[Op], merge: Merge) -> Result<(), TestCaseError> {
    let (mm, device, cache) = book(Options::new().merge(merge));
    let mut list = Vec::new();
    for op in ops {
        match *op {
            Op::Get(first, count) => {
                let got = cache.get(pages(first, count)).unwrap().range();
                let expected = naive_get(&mut list, pages(first, count), merge);
                if merge == Merge::Never {
                    prop_assert!(covers(got, pages(first, count)) && list.contains(&got));
                } else {
                    prop_assert_eq!(got, expected);
                }
            }
            Op::Invalidate(first, count) => {
                drop(mm.invalidate(pages(first, count), Event::Unmap));
                list.retain(|region| !region.overlaps(pages(first, count)));
                cache.reap();
            }
        }
        list.sort();
        prop_assert_eq!(&device.registrar().ranges(), &list);
        let stats = cache.stats();
        let bytes: u64 = list.iter().map(|region| region.pages() << 12).sum();
        prop_assert_eq!((stats.live_regions, stats.live_bytes), (list.len() as u64, bytes));
        prop_assert_eq!((stats.regions, stats.bytes), (list.len() as u64, bytes));
    }
    Ok(())
}

proptest! {
    #[test]
    fn merging_agrees_with_a_naive_list(ops in ops(), merge in 0_usize..3) {
        check(&ops, [Merge::Never, Merge::Overlapping, Merge::Adjacent][merge])?;
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
