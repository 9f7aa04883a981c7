//! In the child of a fork, the inherited cache does nothing.

use crate::support::{counting, pages};
use mmu_notifier::{Event, MmWithUser};
use regcache::{Counting, Device, Error, Options, RegCache, Stats};
use testkit::in_child;

#[test]
fn a_child_gets_an_error_and_deregisters_nothing() {
    let (mm, device, cache) = counting(Options::new());
    let lease = cache.get(pages(1, 1)).unwrap();
    drop(cache.get(pages(5, 1)).unwrap());
    let child = |cache: RegCache<Counting>, lease: regcache::OwnedLease<Counting>| {
        let refused = matches!(cache.get(pages(1, 1)), Err(Error::Forked));
        let is_current = lease.get().is_current();
        drop(lease);
        drop(mm.invalidate(pages(1, 9), Event::Unmap));
        let flushed = cache.flush();
        cache.reap();
        // `stats` takes no lock either, because a thread of the parent may have held it at the
        // fork.
        let knows_nothing = cache.stats() == Stats::default();
        drop(cache);
        knows_nothing
            && refused
            && !is_current
            && flushed == 0
            && device.registrar().deregistered() == 0
    };
    let (clone, owned) = (
        cache.try_clone().unwrap(),
        cache.get_owned(pages(1, 1)).unwrap(),
    );
    assert!(in_child(|| child(clone, owned)));
    assert!(lease.is_current());
    drop(cache.get(pages(5, 1)).unwrap());
    assert_eq!(
        (
            device.registrar().registered(),
            device.registrar().deregistered()
        ),
        (2, 0)
    );
}

#[test]
fn a_device_of_the_parent_opens_no_cache_in_a_child() {
    let (_mm, device, _cache) = counting(Options::new());
    let forked = || matches!(device.open(&MmWithUser::new()), Err(Error::Forked));
    assert!(in_child(forked) && !forked());
}

#[test]
fn a_child_can_have_a_cache_of_its_own() {
    let (_mm, _device, cache) = counting(Options::new());
    drop(cache.get(pages(1, 1)).unwrap());
    assert!(in_child(|| {
        let mm = MmWithUser::new();
        let device = Device::new(Counting::default(), Options::new());
        let cache = device.open(&mm).unwrap();
        drop(cache.get(pages(1, 1)).unwrap());
        drop(cache.get(pages(1, 1)).unwrap());
        drop(mm.invalidate(pages(1, 1), Event::Unmap));
        device.registrar().registered() == 1 && device.registrar().deregistered() == 1
    }));
}
