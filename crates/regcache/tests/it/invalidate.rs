//! The effect of callbacks on regions, leases and registrations in progress.

use crate::support::{Book, book, counting, pages};
use mmu_notifier::{Event, MmWithUser, VaRange};
use regcache::{Device, Error, Options};
use std::sync::Arc;

#[test]
fn an_unleased_region_is_deregistered_before_the_memory_goes_away() {
    let (mm, device, cache) = counting(Options::new());
    drop(cache.get(pages(10, 4)).unwrap());
    drop(cache.get(pages(20, 4)).unwrap());
    let bracket = mm.invalidate(pages(13, 1), Event::Unmap);
    assert_eq!(
        (device.registrar().deregistered(), cache.stats().invalidated),
        (1, 1)
    );
    drop(bracket);
    drop(cache.get(pages(20, 4)).unwrap());
    assert_eq!(
        device.registrar().registered(),
        2,
        "the other one is still there"
    );
    drop(cache.get(pages(10, 4)).unwrap());
    assert_eq!(device.registrar().registered(), 3);
}

#[test]
fn a_registrar_that_must_not_run_in_callbacks_is_called_by_the_next_miss() {
    let (mm, device, cache) = book(Options::new());
    drop(cache.get(pages(10, 4)).unwrap());
    drop(mm.invalidate(pages(10, 1), Event::Unmap));
    assert_eq!(
        (
            device.registrar().ranges().len(),
            cache.stats().live_regions
        ),
        (1, 0)
    );
    drop(cache.get(pages(50, 4)).unwrap());
    assert_eq!(device.registrar().ranges(), [pages(50, 4)]);
}

#[test]
fn a_leased_region_leaves_the_look_up_at_once_and_is_deregistered_at_the_end() {
    let (mm, device, cache) = counting(Options::new());
    let (one, two) = (
        cache.get(pages(10, 4)).unwrap(),
        cache.get(pages(11, 1)).unwrap(),
    );
    assert!(one.is_current() && two.is_current());
    let bracket = mm.invalidate(pages(10, 1), Event::Unmap);
    assert!(!one.is_current() && !two.is_current());
    drop(bracket);
    let fresh = cache.get(pages(10, 4)).unwrap();
    assert!(fresh.is_current() && fresh.handle() != one.handle());
    drop(one);
    assert_eq!(device.registrar().deregistered(), 0);
    drop(two);
    assert_eq!(device.registrar().deregistered(), 1);
}

#[test]
fn what_is_asked_for_while_it_changes_is_not_put_into_the_look_up() {
    let (mm, device, cache) = counting(Options::new());
    let bracket = mm.invalidate(pages(10, 1), Event::Clear);
    let inside = cache.get(pages(10, 4)).unwrap();
    assert!(!inside.is_current());
    let elsewhere = cache.get(pages(20, 4)).unwrap();
    assert!(elsewhere.is_current());
    drop(bracket);
    assert_ne!(cache.get(pages(10, 4)).unwrap().handle(), inside.handle());
    drop(inside);
    assert_eq!(
        (device.registrar().deregistered(), cache.stats().collisions),
        (1, 1)
    );
}

#[test]
fn a_region_between_two_changes_is_put_into_the_look_up() {
    let (mm, _device, cache) = counting(Options::new());
    let brackets = [10, 30].map(|page| mm.invalidate(pages(page, 1), Event::Clear));
    assert!(cache.get(pages(20, 1)).unwrap().is_current());
    assert!(
        !cache.get(pages(10, 1)).unwrap().is_current()
            && !cache.get(pages(30, 1)).unwrap().is_current()
    );
    drop(brackets);
    assert!(
        cache.get(pages(10, 1)).unwrap().is_current()
            && cache.get(pages(30, 1)).unwrap().is_current()
    );
}

#[test]
fn a_registration_that_an_invalidation_meets_is_tried_again() {
    let mm = MmWithUser::new();
    let device = Device::new(Book::default(), Options::new());
    let cache = device.open(&mm).unwrap();
    let in_registrar = mm.clone();
    device
        .registrar()
        .during_next(move || drop(in_registrar.invalidate(pages(12, 1), Event::Unmap)));
    let lease = cache.get(pages(10, 4)).unwrap();
    assert!(lease.is_current());
    assert_eq!(
        *lease.handle(),
        2,
        "the first registration may be of the old memory"
    );
    let stats = cache.stats();
    assert_eq!(
        (
            stats.collisions,
            stats.registered,
            stats.deregistered,
            stats.misses
        ),
        (1, 2, 1, 1)
    );
}

#[test]
fn an_invalidation_beside_a_registration_does_not_matter() {
    let (mm, device, cache) = book(Options::new());
    let in_registrar = mm.clone();
    device
        .registrar()
        .during_next(move || drop(in_registrar.invalidate(pages(14, 1), Event::Unmap)));
    assert_eq!(*cache.get(pages(10, 4)).unwrap().handle(), 1);
}

#[test]
fn every_kind_of_event_counts() {
    let (mm, _device, cache) = counting(Options::new());
    let events = [
        Event::Unmap,
        Event::Clear,
        Event::ProtectionVma,
        Event::ProtectionPage,
        Event::Migrate { owner: None },
    ];
    for event in events {
        let lease = cache.get(pages(10, 1)).unwrap();
        drop(mm.invalidate(pages(10, 1), event));
        assert!(!lease.is_current(), "{}", event.name());
    }
    let lease = cache.get(pages(10, 1)).unwrap();
    drop(mm.try_invalidate(pages(10, 1), Event::Clear).unwrap());
    assert!(!lease.is_current());
}

#[test]
fn a_long_range_with_many_regions_is_cleared() {
    let (mm, device, cache) = counting(Options::new());
    for region in 0..2000 {
        drop(cache.get(pages(region * 3, 1 + region % 2)).unwrap());
    }
    drop(mm.invalidate(pages(1, 2999), Event::Unmap));
    assert_eq!(
        cache.stats().live_regions,
        1001,
        "all from page 3000 on, and the one at page 0"
    );
    drop(mm.invalidate(VaRange::ALL, Event::Unmap));
    assert_eq!(
        (device.registrar().deregistered(), cache.stats().regions),
        (2000, 0)
    );
}

#[test]
fn the_end_of_the_address_space_takes_everything_and_refuses_more() {
    let (mm, device, cache) = counting(Options::new());
    let lease = cache.get(pages(1, 1)).unwrap();
    drop(cache.get(pages(5, 1)).unwrap());
    drop(mm);
    assert_eq!(device.registrar().deregistered(), 1);
    assert!(!lease.is_current());
    assert!(matches!(cache.get(pages(1, 1)), Err(Error::Exited)));
    drop(lease);
    assert_eq!(device.registrar().deregistered(), 2);
}

#[test]
fn a_registration_under_way_when_the_address_space_ends_is_undone() {
    let mm = MmWithUser::new();
    let device = Device::new(Book::default(), Options::new());
    let cache = Arc::new(device.open(&mm).unwrap());
    device.registrar().during_next(move || drop(mm));
    assert!(matches!(cache.get(pages(1, 1)), Err(Error::Exited)));
    assert!(device.registrar().ranges().is_empty());
}
