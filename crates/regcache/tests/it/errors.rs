//! The errors that callers get.

use crate::support::{Refusal, book, counting, pages};
use mmu_notifier::{Event, GetError, MmWithUser, VaRange};
use regcache::{Cause, Counting, Device, Error, Merge, Options, RegCache, Registrar};
use std::error::Error as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

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
    assert!(matches!(
        refused,
        Error::NotMapped {
            source: Refusal::Unmapped,
            ..
        }
    ));
    assert_eq!(
        refused.to_string(),
        "register 0x8000-0xc000: not all of it is mapped"
    );
    assert_eq!(refused.source().unwrap().to_string(), "Unmapped");
    assert_eq!((cache.stats().regions, cache.stats().failed), (0, 1));
}

#[test]
fn a_registrar_that_fails_leaves_nothing_behind() {
    let (_mm, _device, cache) = book(Options::new());
    assert!(matches!(
        cache.get(pages(666_666, 1)),
        Err(Error::Registrar {
            source: Refusal::Broken,
            ..
        })
    ));
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

/// A registrar that panics when it deregisters one of the ranges `at`. `asked` records every range
/// for which `deregister` was called. With `in_cause`, each registration fails and `cause` panics.
#[derive(Default)]
struct Panics {
    at: Mutex<Vec<VaRange>>,
    asked: Mutex<Vec<VaRange>>,
    in_cause: bool,
}

impl Registrar for Panics {
    type Handle = VaRange;
    type Error = Refusal;

    fn register(&self, range: VaRange) -> Result<VaRange, Refusal> {
        if self.in_cause {
            Err(Refusal::Broken)
        } else {
            Ok(range)
        }
    }

    fn deregister(&self, range: VaRange) {
        self.asked.lock().unwrap().push(range);
        let panics = self.at.lock().unwrap().contains(&range);
        assert!(!panics, "deregister panics, as this test wants");
    }

    fn cause(&self, _error: &Refusal) -> Cause {
        panic!("cause panics, as this test wants")
    }
}

fn panics(registrar: Panics, options: Options) -> (MmWithUser, Device<Panics>, RegCache<Panics>) {
    let (mm, device) = (MmWithUser::new(), Device::new(registrar, options));
    let cache = device.open(&mm).unwrap();
    (mm, device, cache)
}

#[test]
fn a_panic_in_deregister_costs_one_region() {
    for all in [vec![0], vec![0, 1, 30, 63], (0..64).collect()] {
        let at = Mutex::new(all.iter().map(|n| pages(20 * n, 1)).collect());
        let (_mm, device, cache) = panics(
            Panics {
                at,
                ..Panics::default()
            },
            Options::new().max_regions(64),
        );
        let fill =
            |from: u64| (0..64).for_each(|n| drop(cache.get(pages(from + 20 * n, 1)).unwrap()));
        fill(0);
        assert!(
            catch_unwind(AssertUnwindSafe(|| cache.flush())).is_err(),
            "the caller hears of it"
        );
        assert_eq!(
            device.registrar().asked.lock().unwrap().len(),
            64,
            "all were deregistered, or tried once"
        );
        assert_eq!((cache.stats().regions, cache.stats().bytes), (0, 0));
        fill(100_000);
        assert_eq!(
            (cache.stats().live_regions, cache.stats().evicted),
            (64, 0),
            "every place is there again"
        );
    }
}

/// The request gets a lease of the replacing region before the panic. The panic must end that
/// lease, because the caller never gets it.
#[test]
fn a_panic_in_deregister_leaves_no_lease_behind() {
    let at = Mutex::new(vec![pages(1, 1)]);
    let (_mm, device, cache) = panics(
        Panics {
            at,
            ..Panics::default()
        },
        Options::new(),
    );
    drop(cache.get(pages(1, 1)).unwrap());
    assert!(catch_unwind(AssertUnwindSafe(|| drop(cache.get(pages(1, 2))))).is_err());
    cache.flush();
    assert_eq!(
        *device.registrar().asked.lock().unwrap(),
        [pages(1, 1), pages(1, 2)]
    );
    assert_eq!(cache.stats().regions, 0);
}

#[test]
fn a_registrar_that_panics_over_its_own_error_leaves_nothing_behind() {
    let (_mm, _device, cache) = panics(
        Panics {
            in_cause: true,
            ..Panics::default()
        },
        Options::new(),
    );
    for _ in 0..3 {
        // If the first request left its registration on the list of registrations in progress, the
        // second request would wait for ever.
        assert!(catch_unwind(AssertUnwindSafe(|| cache.get(pages(1, 1)).map(drop))).is_err());
    }
    assert_eq!((cache.stats().regions, cache.stats().failed), (0, 3));
}

/// The whole address space has 2^64 bytes, which exceeds every limit. The cache must not evict any
/// region for such a request.
#[test]
fn the_whole_address_space_is_too_large_for_any_limit() {
    for merge in [Merge::Never, Merge::Overlapping, Merge::Adjacent] {
        for max_bytes in [u64::MAX - 1, 1 << 40] {
            let options = Options::new()
                .merge(merge)
                .max_bytes(max_bytes)
                .max_region_bytes(u64::MAX);
            let (_mm, _device, cache) = counting(options);
            drop(cache.get(pages(1, 1)).unwrap());
            let refused = cache.get(VaRange::ALL).unwrap_err();
            assert!(
                matches!(
                    refused,
                    Error::TooLarge {
                        range: VaRange::ALL,
                        ..
                    }
                ),
                "{refused:?}"
            );
            let limit = format!("larger than the cache's limit of {max_bytes} bytes");
            assert_eq!(
                refused.to_string(),
                format!("register 0x0-0x10000000000000000: {limit}")
            );
            assert_eq!(
                (
                    cache.stats().live_regions,
                    cache.stats().evicted,
                    cache.stats().bytes
                ),
                (1, 0, 4096)
            );
        }
    }
}

#[test]
fn without_a_limit_there_is_room_for_the_whole_address_space_beside_others() {
    for merge in [Merge::Never, Merge::Overlapping, Merge::Adjacent] {
        let (mm, device, cache) = counting(Options::new().merge(merge));
        let [low, high] = [0, 1 << 51].map(|first| pages(first, 1 << 51));
        let leases = [low, high, VaRange::ALL].map(|range| cache.get(range).unwrap());
        assert_eq!(
            leases.each_ref().map(|lease| lease.range()),
            [low, high, VaRange::ALL]
        );
        assert_eq!(
            cache.stats().bytes,
            u64::MAX,
            "twice as much, and that is what can be said of it"
        );
        drop(leases);
        drop(mm.invalidate(pages(1, 1), Event::Unmap));
        cache.flush();
        assert_eq!(
            (
                cache.stats().regions,
                cache.stats().bytes,
                cache.stats().live_bytes
            ),
            (0, 0, 0)
        );
        assert_eq!(
            (device.registrar().deregistered(), cache.stats().evicted),
            (3, 0)
        );
    }
}

/// Two halves of the address space have 2^64 bytes together. There is room for one half, so the
/// other half is evicted.
#[test]
fn where_sums_do_not_fit_into_64_bits_the_limit_holds() {
    for merge in [Merge::Never, Merge::Overlapping, Merge::Adjacent] {
        let (_mm, device, cache) = counting(Options::new().merge(merge).max_bytes(u64::MAX - 1));
        let [low, high] = [0, 1 << 51].map(|first| pages(first, 1 << 51));
        for half in [low, high, low] {
            assert_eq!(cache.get(half).unwrap().range(), half);
            assert_eq!((cache.stats().regions, cache.stats().bytes), (1, 1 << 63));
        }
        let leased = cache.get(low).unwrap();
        assert!(
            matches!(cache.get(high), Err(Error::Full { regions: 1, .. })),
            "it is leased"
        );
        drop(leased);
        assert_eq!(device.registrar().deregistered(), 2);
    }
}

#[test]
fn stats_have_names() {
    let (_mm, _device, cache) = book(Options::new());
    drop(cache.get(pages(1, 1)).unwrap());
    let stats = cache.stats();
    assert!(
        stats.metrics().contains(&("misses_total", 1)) && stats.to_string().contains("regions 1")
    );
}

/// The limit leaves room for a page, and not for the arrays of a large cache.
#[test]
fn a_cache_without_memory_is_an_error() {
    assert!(testkit::in_child(|| {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
        let limit = pages * rustix::param::page_size() as u64 + (1 << 20);
        let limit = libc::rlimit {
            rlim_cur: limit,
            rlim_max: limit,
        };
        let device = Device::new(Counting::default(), Options::new().max_regions(1 << 22));
        let mm = MmWithUser::new();
        // SAFETY: the call reads a limit, which is a local variable.
        let refused = unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
        assert_eq!(refused, 0);
        let refused = device.open(&mm).map(drop);
        matches!(refused, Err(Error::Open { source: GetError::Alloc(error) })
            if error.kind() == std::io::ErrorKind::OutOfMemory)
    }));
}
