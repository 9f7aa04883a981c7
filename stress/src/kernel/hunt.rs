//! A hunt for stale reads under the kernel source.
//!
//! Each page contains a version, its stamp, and readers cache the stamps. A changing thread
//! replaces a page in three steps: it makes the change, stores in `over` the version whose change
//! is over, and stamps the new page with that version. A reader loads `over`, settles the source,
//! reads its cache, and then checks that the source has counted no change meanwhile. If the source
//! has counted no change and the entry is older than `over`, the read was stale. One reader uses a
//! watch for each page instead.

use super::pages;
use mmu_notifier::{InvalidateRange, Notifier, Registration, Va, VaRange};
use mmu_source::Watch;
use mmu_source::kernel::{Armed, Kernel};
use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{ptr, thread};

const PAGES: usize = 16;
const THREADS: usize = 2;

/// The step that is omitted on purpose, so that the hunt must find a stale read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// No step.
    None,
    /// Readers use an entry without checking with the source that it is current.
    NoLook,
    /// Readers do not wait for changes under way before they fill.
    NoWait,
}

/// The counters of the hunt.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) hits: AtomicU64,
    pub(crate) fills: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) changes: AtomicU64,
    pub(crate) stale: AtomicU64,
}

/// The cache, and the subscriber that empties it.
#[derive(Debug)]
struct Cache {
    base: u64,
    entries: Mutex<[Option<u64>; PAGES]>,
}

impl Notifier for Cache {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        let mut entries = self.entries.lock().expect("no panic");
        for (number, entry) in entries.iter_mut().enumerate() {
            if range
                .range()
                .contains(Va::new(self.base + (number * pages::size()) as u64))
            {
                *entry = None;
            }
        }
    }
}

struct World {
    base: usize,
    files: Vec<OwnedFd>,
    /// For each page, the latest version whose change is over. Entries with older versions are
    /// stale.
    over: [AtomicU64; PAGES],
    stop: AtomicBool,
    tally: Tally,
}

/// Hunts for the given time. `random` makes a generator for each thread. Each changing thread first
/// calls `enter` with its index, and keeps the result until the thread ends.
pub(crate) fn hunt<R: FnMut(usize) -> usize + Send, G>(
    kernel: &Arc<Kernel>,
    length: Duration,
    mutant: Mutant,
    mut random: impl FnMut() -> R,
    enter: impl Fn(usize) -> G + Sync,
) -> Tally {
    let world = World::new();
    let cache = Cache {
        base: world.base as u64,
        entries: Mutex::new([None; PAGES]),
    };
    let cache = Registration::new(&mmu_source::current(), cache).expect("outside of brackets");
    thread::scope(|scope| {
        for half in 0..THREADS {
            let (world, enter, mut random) = (&world, &enter, random());
            scope.spawn(move || {
                let _guard = enter(half);
                world.change(half, &mut random);
            });
        }
        for _ in 0..THREADS {
            let (world, cache, mut random) = (&world, &*cache, random());
            scope.spawn(move || world.read(kernel, cache, mutant, &mut random));
        }
        let (world, mut random) = (&world, random());
        scope.spawn(move || world.watch(kernel, mutant, &mut random));
        let end = Instant::now() + length;
        while Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
        world.stop.store(true, Ordering::Relaxed);
    });
    assert!(cache.unregister().is_ok(), "outside of brackets");
    pages::unmap(world.base, PAGES);
    world.tally
}

impl World {
    /// Pages with even indices are private memory. Each page with an odd index maps a file of its
    /// own.
    fn new() -> Self {
        let base = pages::map(PAGES);
        let file = || {
            // SAFETY: the call takes a C string and an integer, and returns a new descriptor.
            let file = unsafe { libc::memfd_create(c"hunt".as_ptr(), libc::MFD_CLOEXEC) };
            assert!(file >= 0);
            // SAFETY: the descriptor is new and has no other owner.
            unsafe { OwnedFd::from_raw_fd(file) }
        };
        let world = Self {
            base,
            files: (0..PAGES).map(|_| file()).collect(),
            over: [const { AtomicU64::new(0) }; PAGES],
            stop: AtomicBool::new(false),
            tally: Tally::default(),
        };
        for page in 0..PAGES {
            if page % 2 == 1 {
                world.resize(page, pages::size());
                world.map_file(page);
            }
            world.write(page, 1);
        }
        world
    }

    fn address(&self, page: usize) -> *mut c_void {
        pages::at(self.base + page * pages::size())
    }

    fn range(&self, page: usize) -> VaRange {
        VaRange::covering(
            Va::new((self.base + page * pages::size()) as u64),
            pages::size() as u64,
        )
        .expect("a page")
    }

    fn map_file(&self, page: usize) {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_FIXED,
        );
        // SAFETY: the call replaces a page of this program, to which no reference points. Only
        // system calls read the page, and only this thread writes to it.
        let at = unsafe {
            libc::mmap(
                self.address(page),
                pages::size(),
                protection,
                flags,
                self.files[page].as_raw_fd(),
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
    }

    fn resize(&self, page: usize, bytes: usize) {
        // SAFETY: the call takes integers.
        let result = unsafe { libc::ftruncate(self.files[page].as_raw_fd(), bytes as libc::off_t) };
        assert_eq!(result, 0);
    }

    fn write(&self, page: usize, version: u64) {
        // SAFETY: the page is mapped, and only this thread changes it. Readers copy it with a
        // system call.
        unsafe { self.address(page).cast::<u64>().write_volatile(version) }
    }

    /// Reads the stamp of a page with a system call, which translates the address through the page
    /// tables. Returns `None` if the page is not mapped or has no stamp yet.
    fn translate(&self, page: usize) -> Option<u64> {
        let mut version = 0_u64;
        let local = libc::iovec {
            iov_base: ptr::from_mut(&mut version).cast(),
            iov_len: 8,
        };
        let remote = libc::iovec {
            iov_base: self.address(page),
            iov_len: 8,
        };
        // SAFETY: the call writes eight bytes to `version`, a local variable. The kernel checks the
        // address that it reads.
        let got =
            unsafe { libc::process_vm_readv(std::process::id() as i32, &local, 1, &remote, 1, 0) };
        (got == 8 && version != 0).then_some(version)
    }

    fn change(&self, half: usize, random: &mut impl FnMut(usize) -> usize) {
        let mut versions = [1_u64; PAGES];
        while !self.stop.load(Ordering::Relaxed) {
            let page = random(PAGES / THREADS) * THREADS + half;
            if random(200) == 0 {
                fork_and_end();
            }
            if half == 0 {
                self.change_private(page, random)
            } else {
                self.change_file(page, random)
            }
            versions[page] += 1;
            // ORDER: Release: publishes that the change is over. The reader's load is Acquire, so
            // the reader settles the source after the change.
            self.over[page].store(versions[page], Ordering::Release);
            self.write(page, versions[page]);
            self.tally.changes.fetch_add(1, Ordering::Relaxed);
            // Alternate bursts of changes with pauses, in which readers fill and use their caches.
            if random(4) != 0 {
                let enough = self.tally.hits.load(Ordering::Relaxed) + random(400) as u64;
                let end = Instant::now() + Duration::from_millis(100);
                while self.tally.hits.load(Ordering::Relaxed) < enough && Instant::now() < end {
                    thread::yield_now();
                }
            }
        }
    }

    fn change_private(&self, page: usize, random: &mut impl FnMut(usize) -> usize) {
        let (address, size) = (self.address(page), pages::size());
        match random(3) {
            0 => {
                // SAFETY: the page belongs to this program, and no reference points to it.
                let result = unsafe { libc::madvise(address, size, libc::MADV_DONTNEED) };
                assert_eq!(result, 0);
            }
            1 => pages::map_over(address.addr(), 1),
            _ => {
                let other = pages::at(pages::map(1));
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                // SAFETY: the call moves the new page over a page of this program, and no reference
                // points to either.
                let moved = unsafe { libc::mremap(other, size, size, flags, address) };
                assert_eq!(moved, address);
            }
        }
    }

    fn change_file(&self, page: usize, random: &mut impl FnMut(usize) -> usize) {
        match random(4) {
            0 => {
                // SAFETY: the page belongs to this program, and no reference points to it.
                let result =
                    unsafe { libc::madvise(self.address(page), pages::size(), libc::MADV_REMOVE) };
                assert_eq!(result, 0);
            }
            1 => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: the call takes integers.
                let result = unsafe {
                    libc::fallocate(
                        self.files[page].as_raw_fd(),
                        mode,
                        0,
                        pages::size() as libc::off_t,
                    )
                };
                assert_eq!(result, 0);
            }
            2 => {
                self.resize(page, 0);
                self.resize(page, pages::size());
            }
            _ => {
                self.resize(page, 0);
                self.map_file(page);
                self.resize(page, pages::size());
            }
        }
    }

    fn read(
        &self,
        kernel: &Arc<Kernel>,
        cache: &Cache,
        mutant: Mutant,
        random: &mut impl FnMut(usize) -> usize,
    ) {
        let mut armed: Vec<Option<Armed>> = (0..PAGES).map(|_| None).collect();
        while !self.stop.load(Ordering::Relaxed) {
            let page = random(PAGES);
            if armed[page].is_none() {
                armed[page] = Some(kernel.arm(self.range(page)).expect("armed"));
            }
            for _ in 0..random(20) {
                // ORDER: Acquire: the change of this version is over, and all accesses below come
                // after that change.
                let over = self.over[page].load(Ordering::Acquire);
                let settled = (mutant != Mutant::NoLook).then(|| kernel.settle().expect("no fork"));
                let found = cache.entries.lock().expect("no panic")[page];
                match found {
                    Some(version) if settled.is_none_or(|settled| kernel.is_current(settled)) => {
                        self.tally.hits.fetch_add(1, Ordering::Relaxed);
                        if version < over {
                            self.tally.stale.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    Some(_) => {}
                    None => self.fill(
                        kernel,
                        armed[page].as_ref().expect("armed"),
                        cache,
                        mutant,
                        page,
                    ),
                }
            }
        }
    }

    fn fill(&self, kernel: &Kernel, armed: &Armed, cache: &Cache, mutant: Mutant, page: usize) {
        // The mutant `NoWait` uses this generation instead of the wait in `read_begin`.
        let generation = kernel.settle().expect("no fork");
        let seq =
            (mutant != Mutant::NoWait).then(|| armed.read_begin().expect("a virtual machine"));
        let Some(version) = self.translate(page) else {
            return;
        };
        let mut entries = cache.entries.lock().expect("no panic");
        entries[page] = Some(version);
        // An invalidation that starts after this point waits for the lock.
        if seq.map_or(!kernel.is_current(generation), |seq| armed.read_retry(seq)) {
            entries[page] = None;
            self.tally.retries.fetch_add(1, Ordering::Relaxed);
        } else {
            self.tally.fills.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Reads as [`read`](Self::read) does, but with a watch for each page instead of the source's
    /// generation.
    fn watch(&self, kernel: &Arc<Kernel>, mutant: Mutant, random: &mut impl FnMut(usize) -> usize) {
        let mut entries: [Option<(Watch, Option<u64>)>; PAGES] = [const { None }; PAGES];
        while !self.stop.load(Ordering::Relaxed) {
            let page = random(PAGES);
            let (watch, entry) = entries[page].get_or_insert_with(|| {
                let watch = kernel.watch(self.range(page));
                (watch.expect("a virtual machine"), None)
            });
            for _ in 0..random(20) {
                // ORDER: Acquire, as in `read`.
                let over = self.over[page].load(Ordering::Acquire);
                match *entry {
                    Some(version) if mutant == Mutant::NoLook || watch.is_valid() => {
                        self.tally.hits.fetch_add(1, Ordering::Relaxed);
                        if version < over {
                            self.tally.stale.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    _ => {
                        watch.renew().expect("a virtual machine");
                        *entry = self.translate(page);
                        self.tally.fills.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        }
    }
}

fn fork_and_end() {
    // SAFETY: the child only calls `_exit`, which is allowed in the child of a program with
    // threads.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: the call ends the child at once, which is always allowed.
        unsafe { libc::_exit(0) }
    }
    // SAFETY: the status pointer may be null.
    unsafe { libc::waitpid(child, ptr::null_mut(), 0) };
}
