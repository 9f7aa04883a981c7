//! What do a hit, a miss and an invalidation of the registration cache cost, compared with the
//! usual implementations?
//!
//! `cargo run --release -p bench --bin regcache [ROUNDS [PART]]`, where PART is `hit`, `threads`,
//! `kernel`, `miss` or `invalidate`.
#![allow(missing_docs, missing_debug_implementations, reason = "a bench")]

use lru::LruCache;
use mmu_notifier::{Event, MmWithUser, Va, VaRange};
use mmu_source::kernel::Kernel;
use regcache::{Counting, Device, Options, RegCache};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, RwLock};
use std::time::Instant;

const TIMES: usize = 1 << 20;

/// Returns the region with this number. Each region has one page, and between two regions there is
/// a page that is in no region, so that no regions are merged.
fn region(number: u32) -> VaRange {
    VaRange::covering(Va::new(0x7f00_0000_0000 + u64::from(number) * 0x2000), 1).expect("a page")
}

/// Returns the order of the requests: random, but the same for every cache.
fn order(regions: u32, seed: u64) -> Vec<u32> {
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        ((random >> 32) as u32) % regions
    };
    (0..TIMES).map(next).collect()
}

/// A cache that contains all requested regions.
trait Peer: Sync {
    fn hit(&self, range: VaRange);
}

struct Ours {
    cache: RegCache<Counting>,
    mm: MmWithUser,
}

impl Ours {
    fn new(regions: u32) -> Self {
        Self::with(regions, Options::new(), MmWithUser::new(), 1024)
    }

    /// Makes a cache with `regions` regions and room for `more`.
    fn with(regions: u32, options: Options, mm: MmWithUser, more: u32) -> Self {
        let device = Device::new(Counting::default(), options.max_regions(regions + more));
        let cache = device.open(&mm).expect("outside of brackets");
        (0..regions).for_each(|number| drop(cache.get(region(number)).expect("a free place")));
        Self { cache, mm }
    }
}

impl Peer for Ours {
    #[inline]
    fn hit(&self, range: VaRange) {
        drop(black_box(self.cache.get(range).expect("it is there")));
    }
}

/// A tree keyed by the first address. The value is the last address and a counted registration.
struct Tree(RwLock<BTreeMap<u64, (u64, Arc<u64>)>>);

impl Tree {
    fn new(regions: u32) -> Self {
        let entry = |number| {
            let range = region(number);
            (
                range.start().get(),
                (range.last().get(), Arc::new(u64::from(number))),
            )
        };
        Self(RwLock::new((0..regions).map(entry).collect()))
    }
}

impl Peer for Tree {
    fn hit(&self, range: VaRange) {
        let tree = self.0.read().expect("no panic");
        let (_, (last, registration)) = tree
            .range(..=range.start().get())
            .next_back()
            .expect("it is there");
        assert!(*last >= range.last().get());
        let lease = Arc::clone(registration);
        drop(tree);
        drop(black_box(lease));
    }
}

/// A map keyed by the first address. It finds only requests for exactly that address, while a
/// registration cache must find any range inside a region.
struct Lru(Mutex<LruCache<u64, (u64, Arc<u64>)>>);

impl Lru {
    fn new(room: u32, regions: u32) -> Self {
        let mut lru = LruCache::new(NonZeroUsize::new(room as usize).expect("not zero"));
        for number in 0..regions {
            let range = region(number);
            lru.put(
                range.start().get(),
                (range.last().get(), Arc::new(u64::from(number))),
            );
        }
        Self(Mutex::new(lru))
    }
}

impl Peer for Lru {
    fn hit(&self, range: VaRange) {
        let mut lru = self.0.lock().expect("no panic");
        let (last, registration) = lru.get(&range.start().get()).expect("it is there");
        assert!(*last >= range.last().get());
        let lease = Arc::clone(registration);
        drop(lru);
        drop(black_box(lease));
    }
}

/// The registration cache of UCX, if Debian's libucx-dev is installed.
#[cfg(has_ucx)]
struct Ucx(std::ptr::NonNull<std::ffi::c_void>);

#[cfg(has_ucx)]
mod ucx {
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        pub(super) fn rcache_new() -> *mut c_void;
        pub(super) fn rcache_hit(rcache: *mut c_void, address: *mut c_void, length: usize)
        -> c_int;
        pub(super) fn rcache_free(rcache: *mut c_void);
    }
}

// SAFETY: The cache's functions may be called on several threads, because the cache has a lock.
#[cfg(has_ucx)]
unsafe impl Sync for Ucx {}

#[cfg(has_ucx)]
impl Ucx {
    fn new(regions: u32) -> Option<Self> {
        // SAFETY: The call has no preconditions.
        let cache = Self(std::ptr::NonNull::new(unsafe { ucx::rcache_new() })?);
        (0..regions).for_each(|number| cache.hit(region(number)));
        Some(cache)
    }
}

#[cfg(has_ucx)]
impl Peer for Ucx {
    fn hit(&self, range: VaRange) {
        let address = std::ptr::without_provenance_mut(range.start().get() as usize);
        assert_eq!(
            // SAFETY: The cache lives until the drop of `self`. Its registrations access no memory,
            // so the address need not be mapped.
            unsafe { ucx::rcache_hit(self.0.as_ptr(), address, 4096) },
            1
        );
    }
}

#[cfg(has_ucx)]
impl Drop for Ucx {
    fn drop(&mut self) {
        // SAFETY: No code uses the cache any more.
        unsafe { ucx::rcache_free(self.0.as_ptr()) };
    }
}

/// Replaces the cache of UCX if libucx-dev is not installed.
#[cfg(not(has_ucx))]
struct Ucx;

#[cfg(not(has_ucx))]
impl Ucx {
    fn new(_regions: u32) -> Option<Self> {
        None
    }
}

#[cfg(not(has_ucx))]
impl Peer for Ucx {
    fn hit(&self, _range: VaRange) {}
}

/// Returns the nanoseconds for a hit and the drop of its lease in one thread: the median of short
/// batches, which excludes the time of other programs.
fn hit_alone<P: Peer>(peer: &P, order: &[u32]) -> f64 {
    let piece = |order: &[u32]| {
        let start = Instant::now();
        for number in order {
            peer.hit(region(*number));
        }
        start.elapsed().as_nanos() as f64 / order.len() as f64
    };
    median(order.chunks(1 << 12).map(piece).collect())
}

/// Returns the nanoseconds for a hit and the drop of its lease, in the slowest of several threads.
/// Each thread has requests of its own.
fn hit<P: Peer>(peer: &P, orders: &[Vec<u32>]) -> f64 {
    let line = Barrier::new(orders.len());
    let run = |order: &[u32]| {
        line.wait();
        let start = Instant::now();
        for number in order {
            peer.hit(region(*number));
        }
        start.elapsed().as_nanos() as f64 / order.len() as f64
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = orders
            .iter()
            .map(|order| scope.spawn(|| run(order)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a bench thread"))
            .fold(0.0, f64::max)
    })
}

const MISSES: u32 = 10_000;

/// Returns the nanoseconds for one of the misses that fill an empty cache: the median of short
/// batches.
fn miss<T>(empty: impl Fn() -> T, fill: impl Fn(&T, VaRange)) -> f64 {
    const PIECE: u32 = 250;
    let mut pieces = Vec::new();
    for _ in 0..10 {
        let cache = empty();
        for piece in 0..MISSES / PIECE {
            let start = Instant::now();
            (piece * PIECE..(piece + 1) * PIECE).for_each(|number| fill(&cache, region(number)));
            pieces.push(start.elapsed().as_nanos() as f64 / f64::from(PIECE));
        }
    }
    median(pieces)
}

impl Tree {
    fn miss(&self, range: VaRange, registration: Arc<u64>) {
        let tree = self.0.read().expect("no panic");
        let before = tree.range(..=range.start().get()).next_back();
        assert!(before.is_none_or(|(_, (last, _))| *last < range.last().get()));
        drop(tree);
        let lease = Arc::clone(&registration);
        self.0
            .write()
            .expect("no panic")
            .insert(range.start().get(), (range.last().get(), registration));
        drop(black_box(lease));
    }
}

impl Lru {
    fn miss(&self, range: VaRange, registration: Arc<u64>) {
        assert!(
            self.0
                .lock()
                .expect("no panic")
                .get(&range.start().get())
                .is_none()
        );
        let lease = Arc::clone(&registration);
        let evicted = self
            .0
            .lock()
            .expect("no panic")
            .push(range.start().get(), (range.last().get(), registration));
        drop((evicted, black_box(lease)));
    }
}

/// Measures a miss of each cache. In the cache of UCX, a registration does nothing. In each other
/// cache, it only counts.
fn misses(rounds: usize) {
    let roomy = Ours::with(1, Options::new(), MmWithUser::new(), 2 * MISSES);
    let tight = Ours::new(1);
    let registered = AtomicU64::new(0);
    let register = || Arc::new(registered.fetch_add(1, Ordering::Relaxed));
    let ours = |ours: &Ours| miss(|| ours.cache.flush(), |_, range| ours.hit(range));
    let lru = |room: u32| {
        miss(
            || Lru::new(room, 0),
            |lru, range| lru.miss(range, register()),
        )
    };
    let mut columns: [Vec<f64>; 6] = Default::default();
    for _ in 0..rounds {
        let tree = miss(|| Tree::new(0), |tree, range| tree.miss(range, register()));
        let ucx = Ucx::new(0).map_or(f64::NAN, |_| {
            miss(
                || Ucx::new(0),
                |ucx, range| ucx.iter().for_each(|ucx| ucx.hit(range)),
            )
        });
        let row = [
            ours(&roomy),
            tree,
            lru(2 * MISSES),
            ucx,
            ours(&tight),
            lru(1025),
        ];
        columns
            .iter_mut()
            .zip(row)
            .for_each(|(column, ns)| column.push(ns));
    }
    let [ours, tree, lru, ucx, evicting, lru_evicting] = columns.map(median);
    let (to_tree, to_ucx) = (ours / tree, ours / ucx);
    let name = "miss, counting registrar";
    println!(
        "\n{name:<44} {ours:>8.1} {tree:>8.1} {lru:>8.1} {ucx:>8.1} {to_tree:>8.2} {to_ucx:>8.2}  250"
    );
    println!(
        "{:<44} {evicting:>8.1} {:>8} {lru_evicting:>8.1}",
        "  and another region is evicted", ""
    );
}

/// Returns the nanoseconds for the invalidation of one region. Registering the region again is not
/// timed.
fn invalidate(ours: &Ours, order: &[u32]) -> f64 {
    let mut taken = 0;
    let order = &order[..50_000];
    for some in order.chunks(50) {
        let start = Instant::now();
        for number in some {
            drop(ours.mm.invalidate(region(*number), Event::Unmap));
        }
        taken += start.elapsed().as_nanos();
        some.iter().for_each(|number| ours.hit(region(*number)));
    }
    taken as f64 / order.len() as f64
}

/// Measures hits of one thread in all caches.
fn hits(rounds: usize) {
    println!(
        "\n{:<44} {:>8} {:>8} {:>8} {:>8} {:>8} {:>14} {:>8}  bar",
        "hit + drop, 1 thread", "regcache", "RwLock", "LRU", "UCX", "/RwLock", "", "/UCX"
    );
    for (regions, bar) in [(1, "12"), (1_000, "18"), (10_000, "25"), (100_000, "100")] {
        let (ours, tree, lru) = (
            Ours::new(regions),
            Tree::new(regions),
            Lru::new(regions, regions),
        );
        let ucx = Ucx::new(regions);
        let order = order(regions, 1);
        let mut columns: [Vec<f64>; 6] = Default::default();
        for _ in 0..rounds {
            let ns = [
                hit_alone(&ours, &order),
                hit_alone(&tree, &order),
                hit_alone(&lru, &order),
            ];
            let ucx = ucx.as_ref().map_or(f64::NAN, |ucx| hit_alone(ucx, &order));
            let row = [ns[0], ns[1], ns[2], ucx, ns[0] / ns[1], ns[0] / ucx];
            columns
                .iter_mut()
                .zip(row)
                .for_each(|(column, value)| column.push(value));
        }
        let spread = spread(&columns[4]);
        let [ours, tree, lru, ucx, to_tree, to_ucx] = columns.map(median);
        let name = format!("{regions} regions");
        println!(
            "{name:<44} {ours:>8.1} {tree:>8.1} {lru:>8.1} {ucx:>8.1} {to_tree:>8.2} {spread:>14} {to_ucx:>8.2}  {bar}; 0.4 of RwLock"
        );
    }
}

/// The control: a "hit" that only computes in registers. It shows the maximum speed-up that two
/// threads reach on this machine.
struct Spin;

impl Peer for Spin {
    #[inline]
    fn hit(&self, range: VaRange) {
        let mut random = range.start().get();
        for _ in 0..8 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
        }
        black_box(random);
    }
}

/// Compares two threads that use the same cache with one thread. Each round also runs two threads
/// that only compute, and two threads with a cache each.
fn threads(rounds: usize) {
    println!(
        "\n{:<44} {:>8} {:>8} {:>8} {:>8}  ns for one",
        "hit + drop, 2 threads", "regcache", "RwLock", "LRU", "UCX"
    );
    for (regions, bar) in [(1, ">= 1.0"), (10_000, ">= 1.7"), (100_000, "")] {
        let (ours, other, tree, lru) = (
            Ours::new(regions),
            Ours::new(regions),
            Tree::new(regions),
            Lru::new(regions, regions),
        );
        let ucx = Ucx::new(regions);
        let orders = [order(regions, 1), order(regions, 2)];
        let one = |peer: &Ours| hit(peer, &orders[..1]);
        let mut columns: [Vec<f64>; 8] = Default::default();
        for _ in 0..rounds {
            let peers = [
                hit(&tree, &orders),
                hit(&lru, &orders),
                ucx.as_ref().map_or(f64::NAN, |ucx| hit(ucx, &orders)),
            ];
            let (before, spin_before) = (one(&ours), hit(&Spin, &orders[..1]));
            let (both, spin_both) = (hit(&ours, &orders), hit(&Spin, &orders));
            let apart = std::thread::scope(|scope| {
                let threads = [&ours, &other].map(|cache| scope.spawn(move || one(cache)));
                threads
                    .map(|thread| thread.join().expect("a bench thread"))
                    .into_iter()
                    .fold(0.0, f64::max)
            });
            let (after, spin_after) = (one(&ours), hit(&Spin, &orders[..1]));
            let alone = f64::midpoint(before, after);
            let (scaling, control) = (
                2.0 * alone / both,
                2.0 * f64::midpoint(spin_before, spin_after) / spin_both,
            );
            let row = [
                both,
                peers[0],
                peers[1],
                peers[2],
                scaling,
                control,
                scaling / control,
                2.0 * alone / apart,
            ];
            columns
                .iter_mut()
                .zip(row)
                .for_each(|(column, value)| column.push(value));
        }
        let spreads = [4, 5, 6].map(|column| spread(&columns[column]));
        let [both, tree, lru, ucx, scaling, control, ratio, apart] = columns.map(median);
        println!(
            "{:<44} {both:>8.1} {tree:>8.1} {lru:>8.1} {ucx:>8.1}",
            format!("{regions} regions")
        );
        println!(
            "  of one thread's throughput                 {scaling:>8.2} {:>14}  {bar}",
            spreads[0]
        );
        println!("  with a cache each                          {apart:>8.2}");
        println!(
            "  control: two threads that only compute     {control:>8.2} {:>14}",
            spreads[1]
        );
        println!(
            "  of the control                             {ratio:>8.2} {:>14}",
            spreads[2]
        );
    }
}

/// Measures the additional cost of checking the kernel source's generation. A rehearsal of the
/// source suffices, because the kernel does no work in a hit.
fn kernel(rounds: usize) {
    const REGIONS: u32 = 1000;
    let kernel = match Kernel::rehearse(1 << 16) {
        Ok(kernel) => kernel,
        Err(error) => return println!("\nthe kernel source is left out: {error}"),
    };
    let (without, with) = (
        Ours::new(REGIONS),
        Ours::with(
            REGIONS,
            Options::new().kernel(kernel),
            mmu_source::current(),
            1024,
        ),
    );
    let order = order(REGIONS, 1);
    let mut columns: [Vec<f64>; 3] = Default::default();
    for _ in 0..2 * rounds {
        let (without, with) = (hit_alone(&without, &order), hit_alone(&with, &order));
        columns
            .iter_mut()
            .zip([without, with, with - without])
            .for_each(|(column, ns)| column.push(ns));
    }
    let [without, with, more] = columns.map(median);
    println!(
        "\n{:<44} {with:>8.1}  without {without:.1}, {more:.1} more  <= 2 more",
        "hit + drop, kernel source, 1000 regions"
    );
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Formats the minimum and the maximum.
fn spread(values: &[f64]) -> String {
    let (least, most) = values
        .iter()
        .fold((f64::MAX, f64::MIN), |(least, most), n| {
            (least.min(*n), most.max(*n))
        });
    format!("{least:.2}..{most:.2}")
}

fn main() {
    let rounds: usize = std::env::args()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(5);
    let part = std::env::args().nth(2);
    let wanted = |name| part.as_ref().is_none_or(|part| part == name);
    println!(
        "{rounds} rounds, medians of ns for one; ratios are medians of the rounds' ratios, with the least and the most"
    );
    if wanted("hit") {
        hits(rounds);
    }
    if wanted("threads") {
        threads(rounds);
    }
    if wanted("kernel") {
        kernel(rounds);
    }
    if wanted("miss") {
        misses(rounds);
    }
    if wanted("invalidate") {
        let ours = Ours::new(100_000);
        let order = order(100_000, 3);
        let invalidations = median((0..rounds).map(|_| invalidate(&ours, &order)).collect());
        println!(
            "\n{:<44} {invalidations:>8.1} {:>28}2000",
            "invalidation of 1 of 100,000", ""
        );
    }
}
