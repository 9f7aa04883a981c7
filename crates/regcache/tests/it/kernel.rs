//! A cache with a kernel source in rehearsal: the test injects the events that the kernel would
//! report.

use crate::support::{Book, pages};
use mmu_notifier::{InvalidateRange, Notifier, Registration, Va, VaRange};
use mmu_source::kernel::Kernel;
use regcache::{Device, Error, Options, RegCache};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use testkit::{Cap, require};

/// All sources of these tests invalidate the one address space of this process, and a lost event
/// invalidates all of it, including other tests' regions. So the tests take turns.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn opened(ring: usize) -> (Arc<Kernel>, Device<Book>, RegCache<Book>) {
    let kernel = Kernel::rehearse(ring).unwrap();
    let device = Device::new(Book::default(), Options::new().kernel(Arc::clone(&kernel)));
    let cache = device.open(&mmu_source::current()).unwrap();
    (kernel, device, cache)
}

fn change(kernel: &Kernel, range: VaRange) {
    kernel
        .inject(range.start().get(), range.last().get() + 1)
        .unwrap();
}

#[test]
fn a_hit_is_not_served_after_the_kernel_has_begun_to_change_the_memory() {
    if !require(Cap::Bpf) {
        return;
    }
    let _turn = alone();
    let (kernel, _device, cache) = opened(1 << 16);
    let (one, two) = (
        *cache.get(pages(10, 4)).unwrap().handle(),
        *cache.get(pages(1000, 4)).unwrap().handle(),
    );
    assert_eq!(*cache.get(pages(10, 4)).unwrap().handle(), one);
    change(&kernel, pages(11, 1));
    assert_ne!(*cache.get(pages(10, 4)).unwrap().handle(), one);
    assert_eq!(*cache.get(pages(1000, 4)).unwrap().handle(), two);
    assert_eq!(cache.stats().invalidated, 1);
}

#[test]
fn a_change_during_the_registration_is_noticed() {
    if !require(Cap::Bpf) {
        return;
    }
    let _turn = alone();
    let (kernel, device, cache) = opened(1 << 16);
    device
        .registrar()
        .during_next(move || change(&kernel, pages(11, 1)));
    let lease = cache.get(pages(10, 4)).unwrap();
    assert!(lease.is_current());
    assert_eq!((*lease.handle(), cache.stats().collisions), (2, 1));
}

struct Slow(Mutex<()>);

impl Notifier for Slow {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        if range.range() == pages(100, 1) {
            drop(self.0.lock());
        }
    }
}

#[test]
fn lost_events_drop_everything_and_are_counted() {
    if !require(Cap::Bpf) {
        return;
    }
    let _turn = alone();
    let ring = rustix::param::page_size(); // The smallest.
    let (kernel, device, cache) = opened(ring);
    for page in 0..8 {
        drop(cache.get(pages(100 * page, 1)).unwrap());
    }
    let lease = cache.get(pages(0, 1)).unwrap();
    // A subscriber blocks the thread that takes records out of the ring, so that a ring of one page
    // overflows.
    let slow = Registration::new(&mmu_source::current(), Slow(Mutex::new(()))).unwrap();
    let held = slow.0.lock().unwrap();
    for _ in 0..ring / 4 {
        change(&kernel, pages(100, 1));
    }
    assert_ne!(kernel.lost(), 0);
    drop(held);
    drop(cache.get(pages(5000, 1)).unwrap());
    let stats = cache.stats();
    assert!(
        !lease.is_current() && stats.lost == kernel.lost() && stats.live_regions == 1,
        "{stats}"
    );
    drop(lease);
    assert_eq!(device.registrar().ranges(), [pages(5000, 1)]);
    assert!(slow.unregister().is_ok());
}

#[test]
fn a_cache_of_a_parent_is_refused_in_its_child() {
    if !require(Cap::Bpf) {
        return;
    }
    let _turn = alone();
    let (_kernel, _device, cache) = opened(1 << 16);
    drop(cache.get(pages(10, 4)).unwrap());
    assert!(testkit::in_child(|| matches!(
        cache.get(pages(10, 4)),
        Err(Error::Forked)
    )));
}

/// Daemons close every descriptor when they start.
#[test]
fn a_program_that_closes_every_descriptor_is_served_nothing_stale() {
    if !require(Cap::Bpf) || !require(Cap::Kvm) {
        return;
    }
    let _turn = alone();
    assert!(testkit::in_child(|| {
        let device = Device::new(
            Book::default(),
            Options::new().kernel(Kernel::start().unwrap()),
        );
        let cache = device.open(&mmu_source::current()).unwrap();
        let (read_write, private) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
        );
        // SAFETY: the kernel chooses an address where nothing is mapped.
        let page = unsafe { libc::mmap(ptr::null_mut(), 4096, read_write, private, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        let range = VaRange::covering(Va::new(page.addr() as u64), 1).unwrap();
        assert_eq!(
            // SAFETY: the call takes integers. The child uses no descriptor afterwards, except
            // those of the source's own table.
            unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) },
            0
        );
        // The parent process changes memory at the same addresses. The source reports such changes
        // too, which causes needless misses, so retry.
        (0..100).any(|_| {
            let one = *cache.get(range).unwrap().handle();
            let is_hit = *cache.get(range).unwrap().handle() == one;
            // SAFETY: no reference points into the page mapped above.
            assert_eq!(unsafe { libc::madvise(page, 4096, libc::MADV_DONTNEED) }, 0);
            assert_ne!(
                *cache.get(range).unwrap().handle(),
                one,
                "the page is another one"
            );
            is_hit
        })
    }));
}

/// A callback that requests a range while another thread is registering it.
struct Asks {
    cache: RegCache<Book>,
    refused: AtomicU64,
}

impl Notifier for Asks {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        if range.range() == pages(7777, 1) {
            let asked = self.cache.get(pages(10, 4));
            let refused = matches!(
                asked,
                Err(Error::Source {
                    source: mmu_source::Error::InCallback { .. }
                })
            );
            self.refused
                .fetch_add(u64::from(refused), Ordering::Relaxed);
        }
    }
}

#[test]
fn a_miss_in_a_callback_of_the_source_is_refused_instead_of_waiting_for_itself() {
    if !require(Cap::Bpf) {
        return;
    }
    let _turn = alone();
    let (kernel, device, cache) = opened(1 << 16);
    let asks = Asks {
        cache: cache.try_clone().unwrap(),
        refused: AtomicU64::new(0),
    };
    let asks = Registration::new(&mmu_source::current(), asks).unwrap();
    let armed = kernel.arm(pages(7777, 1)).unwrap();
    let in_registrar = Arc::clone(&kernel);
    device.registrar().during_next(move || {
        // The source's own thread may run the callbacks of this change. The registering thread
        // waits for them when its registration ends.
        change(&in_registrar, pages(7777, 1));
    });
    drop(cache.get(pages(10, 4)).unwrap());
    assert_eq!(asks.refused.load(Ordering::Relaxed), 1);
    drop(armed);
    let _ = asks.unregister();
}

#[test]
fn a_cache_for_another_address_space_is_refused() {
    if !require(Cap::Bpf) {
        return;
    }
    let _turn = alone();
    let (_kernel, device, _cache) = opened(1 << 16);
    let refused = device.open(&mmu_notifier::MmWithUser::new());
    assert!(matches!(
        refused,
        Err(Error::Open {
            source: mmu_notifier::GetError::Alloc(_)
        })
    ));
}
