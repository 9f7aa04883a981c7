//! The `mlock` registrar.

use crate::support::pages;
use mmu_notifier::{MmWithUser, Va, VaRange};
use regcache::{Device, Error, Merge, Mlock, Options};

/// Returns how many kilobytes of this process the kernel counts as locked.
fn locked_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmLck:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The size of a page.
fn page_size() -> usize {
    // SAFETY: the call takes an integer and has no preconditions.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// Returns `count` pages of a buffer. `first` is the index of the first one, among the pages that
/// are completely inside the buffer.
fn range(buffer: &[u8], first: usize, count: usize) -> VaRange {
    let start = (buffer.as_ptr().addr() as u64).next_multiple_of(page_size() as u64);
    let start = start + (page_size() * first) as u64;
    VaRange::covering(Va::new(start), (page_size() * count) as u64).unwrap()
}

#[test]
fn a_page_stays_locked_until_its_last_region_goes() {
    let device = Device::new(Mlock::new(), Options::new().merge(Merge::Never));
    let cache = device.open(&mmu_source::current()).unwrap();
    let buffer = vec![1_u8; 40 * page_size()];
    let (one, two) = (
        cache.get(range(&buffer, 0, 10)).unwrap(),
        cache.get(range(&buffer, 5, 10)).unwrap(),
    );
    let locked = || (device.registrar().locked_pages(), locked_kb());
    let pages = |count: usize| (count, (count * page_size() / 1024) as u64);
    assert_eq!(locked(), pages(15));
    drop(one);
    cache.flush();
    assert_eq!(locked(), pages(10));
    drop(two);
    assert_eq!(locked(), pages(0));
}

#[test]
fn a_range_that_is_a_hole_is_refused_at_once() {
    let device = Device::new(Mlock::new(), Options::new().max_bytes(u64::MAX));
    let mm = MmWithUser::new();
    let cache = device.open(&mm).unwrap();
    let refused = cache.get(VaRange::ALL).map(drop);
    assert!(
        matches!(refused, Err(Error::NotMapped { .. })),
        "{refused:?}"
    );
    assert_eq!(device.registrar().locked_pages(), 0);
}

#[test]
fn a_range_that_cannot_be_locked_is_refused() {
    let device = Device::new(Mlock::new(), Options::new());
    let cache = device.open(&mmu_source::current()).unwrap();
    let refused = cache.get(pages(1, 1));
    assert!(
        matches!(refused, Err(Error::NotMapped { .. })),
        "{refused:?}"
    );
    assert_eq!(device.registrar().locked_pages(), 0);
}

/// Drops the privilege to lock without a limit, and sets a limit.
fn limit_locked_memory(bytes: u64) {
    // `struct __user_cap_header_struct` of version 3 for this process, and two `struct
    // __user_cap_data_struct`.
    let header = [0x2008_0522_u32, 0];
    let mut sets = [[0_u32; 3]; 2];
    assert_eq!(
        // SAFETY: the call writes two structs of three words.
        unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) },
        0
    );
    sets[0].iter_mut().for_each(|set| *set &= !(1 << 14));
    assert_eq!(
        // SAFETY: the call only reads the header and two structs of three words.
        unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) },
        0
    );
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: the call reads a `struct rlimit`, which is a local variable.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) }, 0);
}

#[test]
fn at_the_limit_of_locked_memory_something_is_evicted_or_the_error_says_so() {
    assert!(testkit::in_child(|| {
        limit_locked_memory(16 * page_size() as u64);
        let mm = mmu_notifier::MmWithUser::new();
        let device = Device::new(Mlock::new(), Options::new());
        let cache = device.open(&mm).unwrap();
        let buffer = vec![1_u8; 80 * page_size()];
        drop(cache.get(range(&buffer, 0, 8)).unwrap());
        let leased = cache.get(range(&buffer, 20, 7)).unwrap();
        let fits = cache.get(range(&buffer, 40, 4)).unwrap();
        let stats = cache.stats();
        let refused = cache.get(range(&buffer, 60, 8));
        leased.is_current()
            && (
                stats.evicted,
                stats.failed,
                device.registrar().locked_pages(),
            ) == (1, 1, 11)
            && matches!(refused, Err(Error::LimitReached { .. }))
            && fits.is_current()
    }));
}
