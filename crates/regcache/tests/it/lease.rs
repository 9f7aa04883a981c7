//! Hits and leases, and what keeps a region registered.

use crate::support::{book, counting, pages};
use mmu_notifier::{Event, Va, VaRange};
use regcache::{Device, Lease, Options, RegCache};

#[test]
fn a_hit_is_any_region_that_covers_the_range() {
    let (_mm, device, cache) = counting(Options::new());
    let whole = cache.get(pages(100, 600)).unwrap();
    for (first, count) in [(100, 1), (100, 600), (699, 1), (350, 17)] {
        let lease = cache.get(pages(first, count)).unwrap();
        assert_eq!(
            (lease.range(), lease.handle()),
            (pages(100, 600), whole.handle())
        );
    }
    assert_eq!(device.registrar().registered(), 1);
    let stats = cache.stats();
    assert_eq!(
        (
            stats.hits,
            stats.misses,
            stats.live_regions,
            stats.live_bytes
        ),
        (4, 1, 1, 600 << 12)
    );
}

#[test]
fn regions_of_all_sizes_are_found_side_by_side() {
    let (_mm, device, cache) = counting(Options::new());
    let sizes = [
        1,
        3,
        8,
        9,
        64,
        100,
        511,
        512,
        5000,
        1 << 18,
        1 << 30,
        1 << 40,
    ];
    let mut first = 1;
    let regions = sizes.map(|size| {
        first += 2 * size;
        pages(first - size, size)
    });
    for region in regions {
        drop(cache.get(region).unwrap());
    }
    for region in regions {
        for at in [
            region.start(),
            Va::new(region.start().get() / 2 + region.last().get() / 2),
            region.last(),
        ] {
            assert_eq!(
                cache
                    .get(VaRange::covering(at, 1).unwrap())
                    .unwrap()
                    .range(),
                region
            );
        }
    }
    assert_eq!(device.registrar().registered(), regions.len() as u64);
}

#[test]
fn the_whole_address_space_can_be_a_region() {
    let (mm, device, cache) = counting(Options::new());
    let all = cache.get(VaRange::ALL).unwrap();
    assert_eq!(cache.get(pages(5, 1)).unwrap().range(), VaRange::ALL);
    assert_eq!(
        cache
            .get(VaRange::covering(Va::new(u64::MAX), 1).unwrap())
            .unwrap()
            .range(),
        VaRange::ALL
    );
    drop(all);
    drop(mm.invalidate(pages(77, 1), Event::Clear));
    assert_eq!(
        (
            device.registrar().deregistered(),
            cache.stats().regions,
            cache.stats().bytes
        ),
        (1, 0, 0)
    );
}

#[test]
fn a_cache_is_shared_by_all_who_open_it() {
    let (mm, device, cache) = counting(Options::new());
    let other = device.open(&mm).unwrap();
    drop(cache.get(pages(1, 1)).unwrap());
    drop(other.get(pages(1, 1)).unwrap());
    assert_eq!((other.stats().hits, other.stats().misses), (1, 1));
    let another_mm = mmu_notifier::MmWithUser::new();
    drop(device.open(&another_mm).unwrap().get(pages(1, 1)).unwrap());
    assert_eq!(device.registrar().registered(), 2);
}

#[test]
fn the_last_handle_deregisters_everything() {
    let (_mm, device, cache) = book(Options::new());
    for page in 0..100 {
        drop(cache.get(pages(10 * page, 1)).unwrap());
    }
    assert_eq!(device.registrar().ranges().len(), 100);
    drop(cache);
    device.synchronize().unwrap();
    assert!(device.registrar().ranges().is_empty());
}

#[test]
fn an_owned_lease_keeps_the_cache() {
    let (_mm, device, cache) = book(Options::new());
    let lease = cache.get_owned(pages(1, 1)).unwrap();
    drop(cache);
    device.synchronize().unwrap();
    assert_eq!(
        (device.registrar().ranges().len(), lease.get().range()),
        (1, pages(1, 1))
    );
    std::thread::spawn(move || drop(lease)).join().unwrap();
    device.synchronize().unwrap();
    assert!(device.registrar().ranges().is_empty());
}

#[test]
fn more_leases_than_a_thread_has_slots_keep_their_regions() {
    let (mm, device, cache) = counting(Options::new());
    let leases: Vec<_> = (0..1000)
        .map(|n| cache.get(pages(10 * (n % 500), 1)).unwrap())
        .collect();
    drop(mm.invalidate(VaRange::ALL, Event::Unmap));
    assert_eq!(
        (
            device.registrar().deregistered(),
            cache.stats().live_regions
        ),
        (0, 0)
    );
    // The order mixes leases in slots with leases that are counted in their regions.
    for (at, lease) in leases.into_iter().enumerate().rev() {
        drop(lease);
        assert_eq!(
            device.registrar().deregistered(),
            500_u64.saturating_sub(at as u64)
        );
    }
}

#[test]
fn a_lease_can_end_on_another_thread() {
    let (mm, device, cache) = counting(Options::new());
    let lease = cache.get(pages(1, 1)).unwrap();
    drop(mm.invalidate(pages(1, 1), Event::Unmap));
    std::thread::scope(|scope| scope.spawn(move || drop(lease)).join().unwrap());
    assert_eq!(device.registrar().deregistered(), 1);
    // This request uses the slot that the other thread has emptied.
    drop(cache.get(pages(1, 1)).unwrap());
}

#[test]
fn flush_empties_the_look_up_and_leased_regions_stay_registered() {
    let (_mm, device, cache) = book(Options::new());
    let lease = cache.get(pages(1, 1)).unwrap();
    drop(cache.get(pages(5, 1)).unwrap());
    assert_eq!(cache.flush(), 2);
    assert!(!lease.is_current());
    assert_eq!(device.registrar().ranges(), [pages(1, 1)]);
    drop(lease);
    assert!(device.registrar().ranges().is_empty());
}

#[test]
fn a_forgotten_lease_keeps_its_region_registered() {
    let (_mm, device, cache) = book(Options::new());
    std::mem::forget(cache.get(pages(1, 1)).unwrap());
    drop(cache.get(pages(5, 1)).unwrap());
    drop(cache);
    device.synchronize().unwrap();
    assert_eq!(device.registrar().ranges(), [pages(1, 1)]);
}

#[test]
fn get_for_leases_the_pages_of_a_buffer() {
    let (_mm, _device, cache) = counting(Options::new());
    let buffer = vec![0_u32; 5000];
    let lease = cache.get_for(&buffer).unwrap();
    assert!(
        lease
            .range()
            .contains(Va::new(buffer.as_ptr().addr() as u64))
    );
    assert!(
        lease
            .range()
            .contains(Va::new(buffer.as_ptr().addr() as u64 + 19_999))
    );
}

#[test]
fn get_owned_for_leases_the_pages_of_a_buffer_and_keeps_the_cache() {
    let (_mm, device, cache) = counting(Options::new());
    let buffer = vec![0_u32; 5000];
    let lease = cache.get_owned_for(&buffer).unwrap();
    assert_eq!(lease.get().range(), VaRange::of(&buffer).unwrap());
    drop(cache);
    device.synchronize().unwrap();
    assert_eq!(
        device.registrar().deregistered(),
        0,
        "the lease keeps the cache"
    );
    drop(lease);
    device.synchronize().unwrap();
    assert_eq!(device.registrar().deregistered(), 1);
}

#[test]
#[should_panic(expected = "a buffer that is not empty covers a page")]
fn get_owned_for_refuses_an_empty_buffer() {
    let (_mm, _device, cache) = counting(Options::new());
    let _ = cache.get_owned_for::<u8>(&[]);
}

#[test]
fn handles_can_be_shared_and_sent() {
    fn shared<T: Send + Sync>(_: &T) {}
    let (_mm, device, cache) = counting(Options::new());
    shared::<Device<_>>(&device);
    shared::<RegCache<_>>(&cache);
    shared::<Lease<'_, _>>(&cache.get(pages(1, 1)).unwrap());
    assert_eq!(cache.try_clone().unwrap().stats(), cache.stats());
}
