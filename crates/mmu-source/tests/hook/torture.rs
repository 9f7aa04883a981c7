//! Detects stale reads. Callbacks alone keep a cache of page contents correct, while other threads
//! change the mappings by `munmap`, `mmap`, `mremap`, `madvise`, `shmat` and `shmdt`.
//!
//! The content of a region identifies the memory that is mapped there: a page of a file, a private
//! copy of such a page, or a segment. Each page and segment has its own stamp, and no thread writes
//! to a mapped region.

use crate::child::alone;
use crate::pages::{FLAGS, PROTECTION, at, byte, discard, page_size, unmap};
use mmu_notifier::{InvalidateRange, Notifier, Registration};
use mmu_source::hook::Hook;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, hint, ptr, thread};

const REGIONS: usize = 16;
const FILE_PAGES: usize = 256;
const THREADS: usize = 2;

/// The cache entry of a region.
#[derive(Debug, Default)]
struct Entry {
    /// Whether `content` may be used.
    valid: bool,
    content: u64,
    /// The number of open invalidations. `sequence` counts all invalidations so far.
    open: u32,
    sequence: u64,
}

/// The cache. Each entry has a spin lock, because a callback may not wait for a thread that
/// allocates.
#[derive(Debug)]
struct Cache {
    base: usize,
    entries: [(AtomicBool, std::cell::UnsafeCell<Entry>); REGIONS],
}

// SAFETY: an entry is accessed only in `with`, under its lock.
unsafe impl Sync for Cache {}
// SAFETY: the cache holds no data that is bound to a thread.
unsafe impl Send for Cache {}

impl Cache {
    fn with<R>(&self, region: usize, f: impl FnOnce(&mut Entry) -> R) -> R {
        let (lock, entry) = &self.entries[region];
        while lock
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            hint::spin_loop();
            thread::yield_now();
        }
        // SAFETY: the lock was taken above, and every access to an entry is under its lock.
        let result = f(unsafe { &mut *entry.get() });
        lock.store(false, Ordering::Release);
        result
    }

    fn for_each(&self, range: &InvalidateRange<'_>, mut f: impl FnMut(&mut Entry)) {
        for region in 0..REGIONS {
            let address = mmu_notifier::Va::new((self.base + region * page_size()) as u64);
            if range.range().contains(address) {
                self.with(region, &mut f);
            }
        }
    }
}

impl Notifier for Cache {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        self.for_each(range, |entry| {
            entry.valid = false;
            entry.open += 1;
            entry.sequence += 1;
        });
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        self.for_each(range, |entry| entry.open -= 1);
    }
}

struct World {
    base: usize,
    file: i32,
    segments: [i32; 2],
    /// A thread holds the lock of a region while it changes the region, or while it compares the
    /// cached content with the memory.
    regions: [Mutex<()>; REGIONS],
    stale: AtomicUsize,
    hits: AtomicUsize,
    stop: AtomicBool,
}

impl World {
    fn new() -> Self {
        // SAFETY: makes a file in memory.
        let file = unsafe { libc::memfd_create(c"stamps".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(file >= 0);
        for page in 0..FILE_PAGES {
            let content = vec![stamp(page); page_size() / 8];
            // SAFETY: writes the page's content from a local array.
            let written = unsafe {
                libc::pwrite(
                    file,
                    content.as_ptr().cast(),
                    page_size(),
                    (page * page_size()) as i64,
                )
            };
            assert_eq!(written, page_size() as isize);
        }
        let segments = [1, 2].map(|number| {
            // SAFETY: makes a segment.
            let id =
                unsafe { libc::shmget(libc::IPC_PRIVATE, page_size(), libc::IPC_CREAT | 0o600) };
            // SAFETY: attaches the segment at an address that the kernel chooses.
            let place = unsafe { libc::shmat(id, ptr::null(), 0) };
            assert_ne!(place, libc::MAP_FAILED);
            // SAFETY: the segment has the size of a page. It stays attached, so it survives its
            // removal below.
            unsafe { place.cast::<u64>().write(stamp(FILE_PAGES + number)) };
            id
        });
        // SAFETY: a new mapping.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                (REGIONS + THREADS) * page_size(),
                libc::PROT_READ,
                FLAGS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        let regions = [const { Mutex::new(()) }; REGIONS];
        let base = base.expose_provenance();
        let world = Self {
            base,
            file,
            segments,
            regions,
            stale: AtomicUsize::new(0),
            hits: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        };
        (0..REGIONS)
            .for_each(|region| world.show(base + region * page_size(), region, libc::MAP_FIXED));
        world
    }

    /// Maps a page of the file.
    fn show(&self, address: usize, page: usize, flags: i32) {
        let offset = (page * page_size()) as i64;
        // SAFETY: a region of this test whose lock is held, or an address where nothing is mapped.
        let shown = unsafe {
            libc::mmap(
                at(address),
                page_size(),
                libc::PROT_READ,
                libc::MAP_SHARED | flags,
                self.file,
                offset,
            )
        };
        assert_eq!(shown, at(address), "{}", std::io::Error::last_os_error());
    }

    /// Maps a private page of the file at an address reserved for this thread, with a content of
    /// its own. No thread lets the kernel choose an address, because the kernel could choose a
    /// region that another thread has just unmapped.
    fn private(&self, number: usize, page: usize) -> usize {
        let (place, offset) = (
            at(self.base + (REGIONS + number) * page_size()),
            (page * page_size()) as i64,
        );
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
        // SAFETY: the address is reserved for this thread.
        let copy = unsafe { libc::mmap(place, page_size(), PROTECTION, flags, self.file, offset) };
        assert_eq!(copy, place);
        // SAFETY: writes to the page that was just mapped, which makes it a private copy.
        unsafe { copy.cast::<u64>().write(stamp(2 * FILE_PAGES + page)) };
        copy.addr()
    }

    /// Changes a region by one of the calls that the hook claims to see.
    fn change(&self, number: usize, region: usize, random: &mut Random) {
        let _own = self.regions[region]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let address = self.base + region * page_size();
        let page = random.below(FILE_PAGES);
        match random.below(8) {
            0 => {
                unmap(address, 1);
                self.show(address, page, libc::MAP_FIXED_NOREPLACE);
            }
            1 => {
                assert_eq!(
                    // SAFETY: a region of this test whose lock is held.
                    unsafe { libc::syscall(libc::SYS_munmap, address, page_size()) },
                    0
                );
                self.show(address, page, libc::MAP_FIXED_NOREPLACE);
            }
            2 => self.show(address, page, libc::MAP_FIXED),
            3 => move_over(self.private(number, page), address),
            4 => {
                // The private copy is discarded, so the region shows the file again.
                move_over(self.private(number, page), address);
                thread::yield_now();
                discard(address, 1);
            }
            5 => {
                // Move the region away and map another page there.
                let place = self.private(number, page);
                move_over(address, place);
                self.show(address, random.below(FILE_PAGES), libc::MAP_FIXED_NOREPLACE);
                unmap(place, 1);
            }
            6 => self.attach(random.below(2), address),
            _ => {
                self.attach(random.below(2), address);
                thread::yield_now();
                // SAFETY: a region of this test whose lock is held.
                assert_eq!(unsafe { libc::shmdt(at(address)) }, 0);
                self.show(address, page, libc::MAP_FIXED_NOREPLACE);
            }
        }
    }

    /// Attaches a segment at a region.
    fn attach(&self, segment: usize, address: usize) {
        let flags = libc::SHM_REMAP | libc::SHM_RDONLY;
        // SAFETY: a region of this test whose lock is held.
        let attached = unsafe { libc::shmat(self.segments[segment], at(address), flags) };
        assert_eq!(attached, at(address), "{}", std::io::Error::last_os_error());
    }

    /// Fills the cache without a lock on the region, as a client does.
    fn fill(&self, cache: &Cache, region: usize) {
        let Some(sequence) =
            cache.with(region, |entry| (entry.open == 0).then_some(entry.sequence))
        else {
            return;
        };
        let mut content = 0_u64;
        let local = libc::iovec {
            iov_base: ptr::from_mut(&mut content).cast(),
            iov_len: 8,
        };
        let remote = libc::iovec {
            iov_base: at(self.base + region * page_size()),
            iov_len: 8,
        };
        // SAFETY: the call copies eight bytes to a local, or fails if nothing is mapped.
        let read =
            unsafe { libc::process_vm_readv(std::process::id() as i32, &local, 1, &remote, 1, 0) };
        if read == 8 {
            cache.with(region, |entry| {
                if entry.open == 0 && entry.sequence == sequence {
                    (entry.valid, entry.content) = (true, content);
                }
            });
        }
    }

    /// Compares the cached content with the memory.
    fn compare(&self, cache: &Cache, region: usize) {
        let _own = self.regions[region]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(cached) = cache.with(region, |entry| entry.valid.then_some(entry.content)) else {
            return;
        };
        // SAFETY: a region is always mapped while its lock is free.
        let now: u64 = unsafe {
            ptr::read_volatile(ptr::with_exposed_provenance(
                self.base + region * page_size(),
            ))
        };
        self.hits.fetch_add(1, Ordering::Relaxed);
        if now != cached {
            self.stale.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Runs threads that change regions, and the same number of threads that use the cache.
    fn run(&self, cache: &Cache, seed: u64, time: Duration) {
        let deadline = Instant::now() + time;
        thread::scope(|scope| {
            for number in 0..THREADS {
                scope.spawn(move || {
                    let mut random = Random(seed + number as u64);
                    while Instant::now() < deadline && !self.stop.load(Ordering::Relaxed) {
                        self.change(number, random.below(REGIONS), &mut random);
                    }
                });
                scope.spawn(move || {
                    let mut random = Random(seed + 100 + number as u64);
                    while Instant::now() < deadline && !self.stop.load(Ordering::Relaxed) {
                        self.fill(cache, random.below(REGIONS));
                        self.compare(cache, random.below(REGIONS));
                    }
                });
            }
        });
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for id in self.segments {
            // SAFETY: marks a segment of this test for removal.
            unsafe { libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()) };
        }
    }
}

/// Moves a page over another page.
fn move_over(from: usize, to: usize) {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: one address is a region of this test whose lock is held, and the other is reserved
    // for this thread.
    let moved = unsafe { libc::mremap(at(from), page_size(), page_size(), flags, at(to)) };
    assert_eq!(moved, at(to), "{}", std::io::Error::last_os_error());
}

fn stamp(page: usize) -> u64 {
    0x5741_4d50_0000_0000 | page as u64
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

fn cache(world: &World) -> Registration<Cache> {
    let entries = [const { (AtomicBool::new(false), std::cell::UnsafeCell::new(EMPTY)) }; REGIONS];
    let cache = Cache {
        base: world.base,
        entries,
    };
    Registration::new(&mmu_source::current(), cache).expect("registers")
}

const EMPTY: Entry = Entry {
    valid: false,
    content: 0,
    open: 0,
    sequence: 0,
};

/// Reads the duration in seconds, or the seed, from an environment variable.
fn setting(name: &str) -> Option<u64> {
    env::var(name).ok().map(|value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value} is a number"))
    })
}

#[test]
fn no_stale_hit() {
    alone("torture::no_stale_hit", || {
        let seconds = setting("MMUN_TORTURE_SECONDS").unwrap_or(5);
        let clock = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("it is later than 1970");
        let seed = setting("MMUN_TORTURE_SEED").unwrap_or(clock.as_nanos() as u64 | 1);
        println!("MMUN_TORTURE_SEED={seed}");
        let world = World::new();
        let cache = cache(&world);
        let hook = Hook::install().expect("the hook works on this machine");
        world.run(&cache, seed, Duration::from_secs(seconds));
        drop(hook);
        let (hits, stale) = (
            world.hits.load(Ordering::Relaxed),
            world.stale.load(Ordering::Relaxed),
        );
        println!("{hits} hits, {stale} stale");
        assert!(
            stale == 0 && hits > 1000,
            "{stale} of {hits} hits were stale with MMUN_TORTURE_SEED={seed}"
        );
    });
}

/// Checks the detector itself: without a hook, stale hits appear at once.
#[test]
fn the_detector_detects() {
    alone("torture::the_detector_detects", || {
        let world = World::new();
        let cache = cache(&world);
        let mut random = Random(1);
        let seen = AtomicU64::new(0);
        for region in 0..REGIONS {
            world.fill(&cache, region);
            let before = byte(world.base + region * page_size());
            while byte(world.base + region * page_size()) == before {
                world.change(0, region, &mut random);
            }
            world.compare(&cache, region);
            seen.fetch_add(1, Ordering::Relaxed);
        }
        assert_eq!(world.stale.load(Ordering::Relaxed), REGIONS, "{seen:?}");
    });
}
