//! Limits, and which regions are evicted.

use crate::support::{book, counting, pages};
use regcache::{Error, Options};

#[test]
fn what_is_used_stays() {
    let (_mm, device, cache) = counting(Options::new().max_regions(10));
    for page in 0..8 {
        drop(cache.get(pages(10 * page, 1)).unwrap());
    }
    for other in 100..200 {
        // The eight pages are used before each of the other pages is registered.
        for page in 0..8 {
            drop(cache.get(pages(10 * page, 1)).unwrap());
        }
        drop(cache.get(pages(10 * other, 1)).unwrap());
    }
    let stats = cache.stats();
    assert_eq!(stats.misses, 108, "none of the eight was evicted");
    assert!(stats.regions <= 10 && stats.evicted >= 98);
    assert_eq!(
        device.registrar().registered() - device.registrar().deregistered(),
        stats.regions
    );
}

#[test]
fn the_limit_of_bytes_is_kept() {
    let (_mm, device, cache) = book(Options::new().max_bytes(64 << 12));
    for region in 0..50 {
        drop(cache.get(pages(100 * region, 1 + region % 20)).unwrap());
        let registered: u64 = device
            .registrar()
            .ranges()
            .iter()
            .map(|range| range.pages())
            .sum();
        assert!(registered <= 64 && cache.stats().bytes == registered << 12);
    }
    assert!(
        matches!(cache.get(pages(0, 65)), Err(Error::TooLarge { limit, .. }) if limit == 64 << 12)
    );
}

#[test]
fn what_is_leased_is_not_evicted() {
    let (_mm, device, cache) = book(Options::new().max_regions(3));
    let leases = [1, 5].map(|page| cache.get(pages(page, 1)).unwrap());
    for page in 10..20 {
        drop(cache.get(pages(10 * page, 1)).unwrap());
    }
    assert!(leases.iter().all(|lease| lease.is_current()));
    let third = cache.get(pages(7, 1)).unwrap();
    let refused = cache.get(pages(9, 1));
    assert!(
        matches!(
            refused,
            Err(Error::Full {
                regions: 3,
                bytes: 12288,
                ..
            })
        ),
        "{refused:?}"
    );
    drop(third);
    drop(cache.get(pages(9, 1)).unwrap());
    assert_eq!(
        device.registrar().ranges(),
        [pages(1, 1), pages(5, 1), pages(9, 1)]
    );
}

#[test]
fn merging_does_not_make_a_request_fail_for_lack_of_room() {
    let (_mm, _device, cache) = book(Options::new().max_bytes(20 << 12));
    let lease = cache.get(pages(10, 10)).unwrap();
    assert_eq!(cache.get(pages(15, 8)).unwrap().range(), pages(15, 8));
    assert!(lease.is_current());
}
