//! Which regions should a full cache evict? Hit ratios of eviction policies over synthetic traces.
//!
//! `cargo run --release -p bench --bin regcache-policy`
#![allow(missing_docs, missing_debug_implementations, reason = "a bench")]

use lru::LruCache;
use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;

const REQUESTS: usize = 1_000_000;
const BUFFERS: u32 = 20_000;

/// A cache with an eviction policy. `request` returns whether the buffer was in the cache. If it
/// was not, `request` inserts it, and evicts another buffer if the cache is full.
trait Policy {
    fn request(&mut self, buffer: u32) -> bool;
}

struct Lru(LruCache<u32, ()>);

impl Policy for Lru {
    fn request(&mut self, buffer: u32) -> bool {
        let hit = self.0.get(&buffer).is_some();
        if !hit {
            self.0.put(buffer, ());
        }
        hit
    }
}

struct Fifo {
    queue: VecDeque<u32>,
    there: HashSet<u32>,
    size: usize,
}

impl Policy for Fifo {
    fn request(&mut self, buffer: u32) -> bool {
        if self.there.contains(&buffer) {
            return true;
        }
        if self.queue.len() == self.size
            && let Some(oldest) = self.queue.pop_front()
        {
            self.there.remove(&oldest);
        }
        self.queue.push_back(buffer);
        self.there.insert(buffer);
        false
    }
}

/// Second chance: if the oldest buffer was used, it goes back to the end of the queue instead of
/// being evicted.
struct Clock {
    queue: VecDeque<u32>,
    used: HashMap<u32, bool>,
    size: usize,
}

impl Policy for Clock {
    fn request(&mut self, buffer: u32) -> bool {
        if let Some(used) = self.used.get_mut(&buffer) {
            *used = true;
            return true;
        }
        while self.queue.len() == self.size {
            let oldest = self.queue.pop_front().expect("it is full");
            if self.used.get_mut(&oldest).is_some_and(std::mem::take) {
                self.queue.push_back(oldest);
            } else {
                self.used.remove(&oldest);
            }
        }
        self.queue.push_back(buffer);
        self.used.insert(buffer, false);
        false
    }
}

/// SIEVE: a used buffer stays at its place, and the hand moves towards newer buffers.
struct Sieve {
    /// The buffers, oldest first.
    queue: Vec<u32>,
    used: HashMap<u32, bool>,
    hand: usize,
    size: usize,
}

impl Policy for Sieve {
    fn request(&mut self, buffer: u32) -> bool {
        if let Some(used) = self.used.get_mut(&buffer) {
            *used = true;
            return true;
        }
        while self.queue.len() == self.size {
            self.hand %= self.queue.len();
            let oldest = self.queue[self.hand];
            if self.used.get_mut(&oldest).is_some_and(std::mem::take) {
                self.hand += 1;
            } else {
                self.used.remove(&oldest);
                self.queue.remove(self.hand);
            }
        }
        self.queue.push(buffer);
        self.used.insert(buffer, false);
        false
    }
}

/// S3-FIFO: a small queue for new buffers, a main queue for buffers that were hit at least twice
/// while they were in the small queue, and a list of buffers that were evicted from the small
/// queue. If a buffer of that list is requested, it goes into the main queue.
struct S3Fifo {
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    ghosts: VecDeque<u32>,
    ghost: HashSet<u32>,
    uses: HashMap<u32, u8>,
    size: usize,
}

impl S3Fifo {
    fn evict(&mut self) {
        while self.small.len() >= (self.size / 10).max(1)
            && let Some(buffer) = self.small.pop_front()
        {
            if self.uses[&buffer] > 1 {
                self.main.push_back(buffer);
                self.uses.insert(buffer, 0);
                continue;
            }
            self.uses.remove(&buffer);
            self.ghosts.push_back(buffer);
            self.ghost.insert(buffer);
            if self.ghosts.len() > self.size
                && let Some(forgotten) = self.ghosts.pop_front()
            {
                self.ghost.remove(&forgotten);
            }
            return;
        }
        while let Some(buffer) = self.main.pop_front() {
            let uses = self.uses.get_mut(&buffer).expect("it is there");
            if *uses == 0 {
                self.uses.remove(&buffer);
                return;
            }
            *uses -= 1;
            self.main.push_back(buffer);
        }
    }
}

impl Policy for S3Fifo {
    fn request(&mut self, buffer: u32) -> bool {
        if let Some(uses) = self.uses.get_mut(&buffer) {
            *uses = (*uses + 1).min(3);
            return true;
        }
        while self.small.len() + self.main.len() >= self.size {
            self.evict();
        }
        if self.ghost.remove(&buffer) {
            self.ghosts.retain(|ghost| *ghost != buffer);
            self.main.push_back(buffer);
        } else {
            self.small.push_back(buffer);
        }
        self.uses.insert(buffer, 0);
        false
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn unit(&mut self) -> f64 {
        self.next() as f64 / (1_u64 << 53) as f64
    }
}

/// Returns a generator of buffers by Zipf's law with this exponent.
fn zipf(exponent: f64) -> impl FnMut() -> u32 {
    let mut sum = 0.0;
    let weights = (1..=BUFFERS).map(|rank| f64::from(rank).powf(-exponent));
    let mut sums = Vec::new();
    for weight in weights {
        sum += weight;
        sums.push(sum);
    }
    let mut random = Random(88_172_645_463_325_252);
    move || {
        let at = random.unit() * sum;
        // Hash the rank, so that a buffer's rank does not correlate with the buffer's number.
        (sums.partition_point(|limit| *limit < at) as u32).wrapping_mul(2_654_435_761) % BUFFERS
    }
}

/// The traces, each with a description.
fn traces() -> Vec<(&'static str, Vec<u32>)> {
    let mut popular = zipf(1.0);
    let mut flat = zipf(0.7);
    let (mut scan, mut at) = (0_u32, 0);
    // Of every 20,000 requests, 5,000 are for buffers that are used only once.
    let mut with_scans = |popular: &mut dyn FnMut() -> u32| {
        at += 1;
        if at % 20_000 < 5000 {
            scan += 1;
            BUFFERS + scan
        } else {
            popular()
        }
    };
    let scanned = (0..REQUESTS).map(|_| with_scans(&mut popular)).collect();
    let mut moving = zipf(1.0);
    // The favourites change slowly.
    let drifting = (0..REQUESTS)
        .map(|request| (moving() + (request / 50_000) as u32 * 97) % BUFFERS)
        .collect();
    vec![
        (
            "zipf 1.0: some buffers are favourites",
            (0..REQUESTS).map(|_| popular()).collect(),
        ),
        (
            "zipf 0.7: hardly any favourites",
            (0..REQUESTS).map(|_| flat()).collect(),
        ),
        ("zipf 1.0 and scans", scanned),
        ("zipf 1.0, the favourites change", drifting),
        (
            "a ring of 2,500 buffers, round and round",
            (0..REQUESTS as u32).map(|request| request % 2500).collect(),
        ),
    ]
}

fn policies(size: usize) -> Vec<(&'static str, Box<dyn Policy>)> {
    let (queue, used) = (VecDeque::new, HashMap::new);
    vec![
        (
            "FIFO",
            Box::new(Fifo {
                queue: queue(),
                there: HashSet::new(),
                size,
            }),
        ),
        (
            "LRU",
            Box::new(Lru(LruCache::new(
                NonZeroUsize::new(size).expect("not zero"),
            ))),
        ),
        (
            "CLOCK",
            Box::new(Clock {
                queue: queue(),
                used: used(),
                size,
            }),
        ),
        (
            "SIEVE",
            Box::new(Sieve {
                queue: Vec::new(),
                used: used(),
                hand: 0,
                size,
            }),
        ),
        (
            "S3-FIFO",
            Box::new(S3Fifo {
                small: queue(),
                main: queue(),
                ghosts: queue(),
                ghost: HashSet::new(),
                uses: HashMap::new(),
                size,
            }),
        ),
    ]
}

fn main() {
    println!("misses per 100 requests, {REQUESTS} requests over {BUFFERS} buffers");
    for size in [200, 2000] {
        print!("\n{:<44}", format!("room for {size}"));
        policies(size)
            .iter()
            .for_each(|(name, _)| print!("{name:>9}"));
        println!();
        for (name, trace) in traces() {
            print!("{name:<44}");
            for (_, mut policy) in policies(size) {
                let misses = trace
                    .iter()
                    .filter(|buffer| !policy.request(**buffer))
                    .count();
                print!("{:>9.1}", misses as f64 * 100.0 / REQUESTS as f64);
            }
            println!();
        }
    }
}
