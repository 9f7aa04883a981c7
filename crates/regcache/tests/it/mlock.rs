//! The `mlock` registrar.

use crate::support::pages;
use mmu_notifier::{Va, VaRange};
use regcache::{Device, Error, Merge, Mlock, Options};

/// Which of the pages of a buffer are locked, by the kernel's account: kilobytes of its mapping.
fn locked_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmLck:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn range(buffer: &[u8], first: usize, count: usize) -> VaRange {
    let start = (buffer.as_ptr().addr() as u64).next_multiple_of(4096) + 4096 * first as u64;
    VaRange::covering(Va::new(start), 4096 * count as u64).unwrap()
}

#[test]
fn a_page_stays_locked_until_its_last_region_goes() {
    let device = Device::new(Mlock::new(), Options::new().merge(Merge::Never));
    let cache = device.open(&mmu_source::current()).unwrap();
    let buffer = vec![1_u8; 40 * 4096];
    let (one, two) = (cache.get(range(&buffer, 0, 10)).unwrap(), cache.get(range(&buffer, 5, 10)).unwrap());
    assert_eq!((device.registrar().locked_pages(), locked_kb()), (15, 60));
    drop(one);
    cache.flush();
    assert_eq!((device.registrar().locked_pages(), locked_kb()), (10, 40));
    drop(two);
    assert_eq!((device.registrar().locked_pages(), locked_kb()), (0, 0));
}

#[test]
fn a_range_that_cannot_be_locked_is_refused() {
    let device = Device::new(Mlock::new(), Options::new());
    let cache = device.open(&mmu_source::current()).unwrap();
    let refused = cache.get(pages(1, 1));
    assert!(matches!(refused, Err(Error::NotMapped { .. })), "{refused:?}");
    assert_eq!(device.registrar().locked_pages(), 0);
}
