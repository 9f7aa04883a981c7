//! Models of the races of a lease against an invalidation or eviction of its region. Run by
//! `RUSTFLAGS="--cfg mmun_loom" cargo test --release --test loom`.
#![cfg(mmun_loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use mmu_notifier::{Event, MmWithUser, VaRange};
use regcache::{Device, Merge, Options, RegCache, Registrar};
use std::convert::Infallible;

/// Memory that changes once, and a device that reads it when a region is registered.
#[derive(Default)]
struct Memory {
    contents: AtomicUsize,
    /// The number of registrations so far.
    registered: AtomicUsize,
    /// How often each registration was undone.
    undone: [AtomicUsize; 4],
    in_callbacks: bool,
}

/// The handle of a registration.
struct Registered {
    key: usize,
    contents: usize,
    /// Read under leases, and written at the deregistration. A model fails if a read and the write
    /// are not ordered.
    touched: UnsafeCell<()>,
}

// SAFETY: every access under a lease happens before the deregistration. The models check this.
unsafe impl Sync for Registered {}

struct Dma(Arc<Memory>);

impl Registrar for Dma {
    type Handle = Registered;
    type Error = Infallible;

    fn register(&self, _range: VaRange) -> Result<Registered, Infallible> {
        let key = self.0.registered.fetch_add(1, Ordering::Relaxed);
        Ok(Registered {
            key,
            contents: self.0.contents.load(Ordering::Relaxed),
            touched: UnsafeCell::new(()),
        })
    }

    fn deregister(&self, handle: Registered) {
        handle.touched.with_mut(|_| ());
        assert_eq!(
            self.0.undone[handle.key].fetch_add(1, Ordering::Relaxed),
            0,
            "deregistered twice"
        );
    }

    fn deregisters_in_callbacks(&self) -> bool {
        self.0.in_callbacks
    }
}

impl Memory {
    fn is_registered(&self, handle: &Registered) -> bool {
        handle.touched.with(|_| ());
        self.undone[handle.key].load(Ordering::Relaxed) == 0
    }

    fn undone(&self) -> usize {
        self.undone
            .iter()
            .map(|undone| undone.load(Ordering::Relaxed))
            .sum()
    }
}

struct World {
    mm: MmWithUser,
    memory: Arc<Memory>,
    cache: RegCache<Dma>,
}

/// Runs [`World::change`] on another thread.
fn spawn_change(world: &Arc<World>) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || world.change())
}

impl World {
    fn new(in_callbacks: bool, regions: u32) -> Arc<Self> {
        let memory = Arc::new(Memory {
            in_callbacks,
            ..Memory::default()
        });
        let options = Options::new()
            .max_regions(regions)
            .merge(Merge::Overlapping);
        let device = Device::new(Dma(Arc::clone(&memory)), options);
        let mm = MmWithUser::new();
        let cache = device.open(&mm).unwrap();
        Arc::new(Self { mm, memory, cache })
    }

    /// Changes the memory, as `munmap` and `mmap` do.
    fn change(&self) {
        let bracket = self.mm.invalidate(page(1), Event::Unmap);
        self.memory.contents.store(1, Ordering::Release);
        drop(bracket);
    }

    /// Uses a lease. The caller knows that the content was already `known` when the lease began.
    fn transfer(&self, known: usize) {
        let lease = self.cache.get(page(1)).unwrap();
        assert!(
            self.memory.is_registered(lease.handle()),
            "leased, and not registered"
        );
        assert!(lease.handle().contents >= known, "stale");
        thread::yield_now();
        assert!(
            self.memory.is_registered(lease.handle()),
            "deregistered under a lease"
        );
    }
}

/// Frees the cache. Models have no reclaimer thread.
fn end(world: Arc<World>) {
    let Ok(World { mm, memory, cache }) = Arc::try_unwrap(world) else {
        panic!("the other thread was joined")
    };
    drop(cache);
    mm.run_deferred();
    assert_eq!(
        memory.undone(),
        memory.registered.load(Ordering::Relaxed),
        "all is deregistered at the end"
    );
    assert_eq!(mm.callback_panics(), 0);
}

fn page(number: u64) -> VaRange {
    VaRange::covering(mmu_notifier::Va::new(number << 12), 1).unwrap()
}

fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(builder.preemption_bound.unwrap_or(2));
    builder.max_branches = 20_000;
    builder.check(f);
}

#[test]
fn a_hit_racing_an_invalidation() {
    model(|| {
        let world = World::new(true, 2);
        drop(world.cache.get(page(1)).unwrap());
        let changer = spawn_change(&world);
        world.transfer(world.memory.contents.load(Ordering::Acquire));
        changer.join().unwrap();
        world.transfer(1);
        end(world);
    });
}

/// Like the model above, for a thread whose slots are all in use: its lease is counted in the
/// region.
#[test]
fn a_counted_hit_racing_an_invalidation() {
    model(|| {
        let world = World::new(true, 3);
        let others = [5, 5].map(|number| world.cache.get(page(number)).unwrap());
        drop(world.cache.get(page(1)).unwrap());
        let changer = spawn_change(&world);
        world.transfer(world.memory.contents.load(Ordering::Acquire));
        changer.join().unwrap();
        drop(others);
        end(world);
    });
}

#[test]
fn the_last_lease_deregisters() {
    model(|| {
        let world = World::new(true, 2);
        let lease = world.cache.get(page(1)).unwrap();
        let changer = spawn_change(&world);
        drop(lease);
        changer.join().unwrap();
        assert_eq!(world.memory.undone(), 1, "not deregistered");
        end(world);
    });
}

/// A lease ends on another thread, and its slot is reused at once. A thread that then invalidates
/// the first region must see the end of that lease, although the slot has a new value.
#[test]
fn a_slot_that_another_thread_has_freed() {
    model(|| {
        let world = World::new(true, 2);
        drop(world.cache.get(page(1)).unwrap());
        drop(world.cache.get(page(5)).unwrap());
        let other = thread::spawn({
            let world = Arc::clone(&world);
            let lease = world.cache.get_owned(page(1)).unwrap();
            move || {
                assert!(world.memory.is_registered(lease.get().handle()));
                drop(lease);
            }
        });
        let changer = spawn_change(&world);
        drop(world.cache.get(page(5)).unwrap());
        other.join().unwrap();
        changer.join().unwrap();
        end(world);
    });
}

#[test]
fn a_hit_racing_the_growth_of_the_table() {
    model(|| {
        let world = World::new(true, 3);
        let other = thread::spawn({
            let world = Arc::clone(&world);
            // One of the two requests makes the first table.
            move || drop(world.cache.get(page(5)).unwrap())
        });
        world.transfer(0);
        other.join().unwrap();
        end(world);
    });
}

#[test]
fn a_registration_racing_an_invalidation() {
    model(|| {
        let world = World::new(true, 2);
        let changer = spawn_change(&world);
        world.transfer(0);
        changer.join().unwrap();
        world.transfer(1);
        end(world);
    });
}

#[test]
fn a_hit_racing_the_reuse_of_its_place() {
    model(|| {
        let world = World::new(false, 1);
        drop(world.cache.get(page(1)).unwrap());
        let other = thread::spawn({
            let world = Arc::clone(&world);
            move || {
                // The cache has room for one region. So this request must evict the other region,
                // or fails if that region is leased.
                if let Ok(lease) = world.cache.get(page(5)) {
                    assert!(world.memory.is_registered(lease.handle()) && lease.range() == page(5));
                }
            }
        });
        if let Ok(lease) = world.cache.get(page(1)) {
            assert!(world.memory.is_registered(lease.handle()) && lease.range() == page(1));
        }
        other.join().unwrap();
        end(world);
    });
}

/// Each mutant of the cache, and the model that must detect it.
const MUTANTS: &[(&str, &str)] = &[
    ("no_fence_in_hit", "a_hit_racing_an_invalidation"),
    ("no_fence_in_harvest", "a_hit_racing_an_invalidation"),
    ("invalidate_nothing", "a_hit_racing_an_invalidation"),
    (
        "no_fence_when_counted",
        "a_counted_hit_racing_an_invalidation",
    ),
    ("no_fence_in_drop", "the_last_lease_deregisters"),
    (
        "publish_what_was_hit",
        "a_registration_racing_an_invalidation",
    ),
    (
        "forget_open_brackets",
        "a_registration_racing_an_invalidation",
    ),
    ("no_second_look", "a_hit_racing_the_reuse_of_its_place"),
    ("range_before_state", "a_hit_racing_the_reuse_of_its_place"),
    ("clear_relaxed", "a_hit_racing_an_invalidation"),
    ("each_relaxed", "a_hit_racing_an_invalidation"),
    ("publish_relaxed", "a_slot_that_another_thread_has_freed"),
    ("is_free_relaxed", "a_slot_that_another_thread_has_freed"),
    ("uncount_relaxed", "a_counted_hit_racing_an_invalidation"),
    ("count_read_relaxed", "a_counted_hit_racing_an_invalidation"),
    ("install_relaxed", "a_hit_racing_the_growth_of_the_table"),
];

#[test]
fn every_mutant_is_caught() {
    let this = std::env::current_exe().unwrap();
    for (mutant, model) in MUTANTS {
        let run = std::process::Command::new(&this)
            .env("MMUN_MUTANT", mutant)
            .args(["--exact", model])
            .output()
            .unwrap();
        let says = String::from_utf8_lossy(&run.stdout);
        assert!(
            !run.status.success(),
            "{model} passes although {mutant} breaks it"
        );
        assert!(!says.contains("0 tests"), "{model} is no model");
    }
}
