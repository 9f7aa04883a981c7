//! Tests with several threads.

use crate::support::{book, counting, pages};
use mmu_notifier::{Event, VaRange};
use regcache::{Error, Merge, Options};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

/// Returns a function that blocks its caller, a receiver that gets a message when the function was
/// called, and a sender whose message lets the function return.
fn gate() -> (impl FnOnce() + Send + 'static, Receiver<()>, Sender<()>) {
    let (entered, wait_entered) = mpsc::channel();
    let (go_on, wait_go_on) = mpsc::channel();
    let stop_here = move || {
        entered.send(()).unwrap();
        wait_go_on.recv().unwrap();
    };
    (stop_here, wait_entered, go_on)
}

#[test]
fn concurrent_misses_for_one_region_register_once() {
    let (_mm, device, cache) = book(Options::new());
    let (stop_here, wait_entered, go_on) = gate();
    device.registrar().during_next(stop_here);
    thread::scope(|scope| {
        let first = scope.spawn(|| *cache.get(pages(1, 8)).unwrap().handle());
        wait_entered.recv().unwrap();
        let others: Vec<_> = (0..3)
            .map(|n| {
                scope.spawn({
                    let cache = &cache;
                    move || *cache.get(pages(1 + n, 2)).unwrap().handle()
                })
            })
            .collect();
        while cache.stats().waits < 3 {
            thread::yield_now();
        }
        go_on.send(()).unwrap();
        assert_eq!(first.join().unwrap(), 1);
        assert!(others.into_iter().all(|other| other.join().unwrap() == 1));
    });
    assert_eq!((cache.stats().registered, cache.stats().misses), (1, 1));
}

#[test]
fn a_request_waits_for_a_place_that_another_thread_is_about_to_give_back() {
    let (_mm, device, cache) = book(Options::new().max_regions(1));
    drop(cache.get(pages(1, 1)).unwrap());
    let (stop_here, wait_entered, go_on) = gate();
    device.registrar().at_next_end(stop_here);
    thread::scope(|scope| {
        scope.spawn(|| cache.flush());
        wait_entered.recv().unwrap();
        let other = scope.spawn(|| cache.get(pages(5, 1)).map(|lease| lease.range()));
        while cache.stats().waits == 0 && !other.is_finished() {
            thread::yield_now();
        }
        go_on.send(()).unwrap();
        assert_eq!(other.join().unwrap().unwrap(), pages(5, 1));
    });
}

#[test]
fn a_registrar_that_panics_leaves_its_places_to_others() {
    let (_mm, device, cache) = book(Options::new().max_regions(1));
    drop(cache.get(pages(1, 1)).unwrap());
    device.registrar().at_next_end(|| panic!("as tests do"));
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cache.flush())).is_err());
    assert_eq!(cache.get(pages(5, 1)).unwrap().range(), pages(5, 1));
}

#[test]
fn a_registrar_that_panics_while_a_registration_is_undone_leaves_its_place_to_others() {
    let (mm, device, cache) = book(Options::new().max_regions(1));
    let here = mm.clone();
    // The memory changes during the registration, and deregistering panics.
    device
        .registrar()
        .during_next(move || drop(here.invalidate(pages(1, 1), Event::Unmap)));
    device.registrar().at_next_end(|| panic!("as tests do"));
    assert!(
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cache
            .get(pages(1, 1))
            .map(drop)))
        .is_err()
    );
    assert_eq!(cache.get(pages(5, 1)).unwrap().range(), pages(5, 1));
}

#[test]
fn a_request_waits_for_a_place_in_which_another_thread_is_registering() {
    let (_mm, device, cache) = book(Options::new().max_regions(1));
    let (stop_here, wait_entered, go_on) = gate();
    device.registrar().during_next(stop_here);
    thread::scope(|scope| {
        scope.spawn(|| cache.get(pages(1, 1)).map(drop).unwrap());
        wait_entered.recv().unwrap();
        let other = scope.spawn(|| cache.get(pages(5, 1)).map(|lease| lease.range()));
        while cache.stats().waits == 0 && !other.is_finished() {
            thread::yield_now();
        }
        go_on.send(()).unwrap();
        // When `other` tries again, the first thread's lease may not have ended yet.
        assert!(matches!(
            other.join().unwrap(),
            Ok(_) | Err(Error::Full { .. })
        ));
        assert_ne!(cache.stats().waits, 0, "it did not wait");
    });
}

#[test]
fn threads_come_and_go_and_their_slots_are_used_again() {
    let (mm, device, cache) = counting(Options::new());
    for round in 0..200 {
        thread::scope(|scope| {
            scope.spawn(|| drop(cache.get(pages(round % 7, 1)).unwrap()));
        });
    }
    drop(mm.invalidate(VaRange::ALL, Event::Unmap));
    assert_eq!(
        (
            device.registrar().registered(),
            device.registrar().deregistered()
        ),
        (7, 7)
    );
}

/// Leases, merges, evictions and invalidations at the same time. Every lease must have a registered
/// range.
#[test]
fn a_lease_never_shows_a_range_that_is_not_registered() {
    for merge in [Merge::Never, Merge::Overlapping, Merge::Adjacent] {
        let (mm, device, cache) = book(
            Options::new()
                .merge(merge)
                .max_regions(40)
                .max_region_bytes(32 << 12),
        );
        let (stop, gets) = (AtomicBool::new(false), AtomicU64::new(0));
        let line = Barrier::new(3);
        thread::scope(|scope| {
            for seed in 1..=2_u64 {
                let (cache, device, stop, gets, line) = (&cache, &device, &stop, &gets, &line);
                scope.spawn(move || {
                    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    line.wait();
                    while !stop.load(Ordering::Relaxed) {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let range = pages(random % 100 * 2, 1 + (random >> 32) % 5);
                        let lease = cache.get(range).unwrap();
                        let registered = lease.range();
                        assert!(
                            registered.start() <= range.start()
                                && range.last() <= registered.last()
                        );
                        if random.is_multiple_of(16) {
                            assert!(
                                device.registrar().ranges().contains(&registered),
                                "{registered} is leased"
                            );
                        }
                        gets.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            line.wait();
            let mut page = 0;
            while gets.load(Ordering::Relaxed) < 20_000 {
                page = (page + 37) % 200;
                drop(mm.invalidate(pages(page, 3), Event::Unmap));
                thread::yield_now();
            }
            stop.store(true, Ordering::Relaxed);
        });
        cache.flush();
        assert!(device.registrar().ranges().is_empty(), "nothing is leaked");
        let stats = cache.stats();
        assert_eq!(
            (stats.regions, stats.bytes, stats.registered),
            (0, 0, stats.deregistered)
        );
    }
}
