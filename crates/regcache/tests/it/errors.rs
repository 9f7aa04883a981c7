//! What callers are told when something fails.

use crate::support::{Refusal, book, pages};
use regcache::{Error, Options};
use std::error::Error as _;
use std::panic::{AssertUnwindSafe, catch_unwind};

#[test]
fn a_limit_of_the_registrar_evicts_and_is_tried_once_more() {
    let (_mm, device, cache) = book(Options::new());
    for page in 0..8 {
        drop(cache.get(pages(10 * page, 1)).unwrap());
    }
    device.registrar().limit(8);
    let lease = cache.get(pages(500, 1)).unwrap();
    assert!(lease.is_current() && cache.stats().evicted >= 1 && cache.stats().failed == 1);
    device.registrar().limit(0);
    let refused = cache.get(pages(900, 1));
    assert!(
        matches!(refused, Err(Error::LimitReached { evicted: 1.., source: Refusal::Limit, range }) if range == pages(900, 1)),
        "{refused:?}"
    );
    assert!(lease.is_current(), "what is leased was spared");
}

#[test]
fn a_range_that_is_not_mapped_is_refused() {
    let (_mm, device, cache) = book(Options::new());
    device.registrar().unmap(pages(10, 1));
    let refused = cache.get(pages(8, 4)).unwrap_err();
    assert!(matches!(refused, Error::NotMapped { source: Refusal::Unmapped, .. }));
    assert_eq!(refused.to_string(), "register 0x8000-0xc000: not all of it is mapped");
    assert_eq!(refused.source().unwrap().to_string(), "Unmapped");
    assert_eq!((cache.stats().regions, cache.stats().failed), (0, 1));
}

#[test]
fn a_registrar_that_fails_leaves_nothing_behind() {
    let (_mm, _device, cache) = book(Options::new());
    assert!(matches!(cache.get(pages(666_666, 1)), Err(Error::Registrar { source: Refusal::Broken, .. })));
    assert_eq!((cache.stats().regions, cache.stats().bytes), (0, 0));
}

#[test]
fn a_registrar_that_panics_leaves_nothing_behind() {
    let (_mm, device, cache) = book(Options::new());
    device.registrar().during_next(|| panic!("on purpose"));
    assert!(catch_unwind(AssertUnwindSafe(|| cache.get(pages(1, 1)).map(drop))).is_err());
    assert_eq!((cache.stats().regions, cache.stats().failed), (0, 1));
    drop(cache.get(pages(1, 1)).unwrap());
}

#[test]
fn stats_have_names() {
    let (_mm, _device, cache) = book(Options::new());
    drop(cache.get(pages(1, 1)).unwrap());
    let stats = cache.stats();
    assert!(stats.metrics().contains(&("misses_total", 1)) && stats.to_string().contains("regions 1"));
}
