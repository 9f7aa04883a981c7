//! Reads and writes through leases while their memory changes. A run takes at least
//! `REGCACHE_RDMA_SECONDS`. It then continues until it has compared enough transfers, because it
//! may get little processor time.

use crate::endpoint::{Endpoint, Place, connected};
use crate::memory::{Lab, PAGE, Source, advise, map, map_file, map_over, peek, poke, range};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

/// A run that takes longer counts as a hang.
const PATIENCE: Duration = Duration::from_secs(200);
/// How many transfers a run must have compared before it may end.
const ENOUGH: u64 = 50;
/// The number of threads that make transfers.
const TRANSFERS: usize = 2;
/// The number of threads that change memory.
const CHANGERS: usize = 2;
const BUFFERS: usize = 16;
/// The pages of a buffer. All transferring threads read the first page, and each of them writes to
/// a page of its own.
const PAGES: usize = 1 + TRANSFERS;

/// Memory that changes. Its first byte is computed from its stamp, which is odd during a change.
struct Buffer {
    address: usize,
    file: Option<File>,
    stamp: AtomicU64,
}

fn byte(stamp: u64) -> u8 {
    (stamp / 2 % 251) as u8
}

impl Buffer {
    fn new(number: usize) -> Self {
        let file = (number % 2 == 1)
            .then(|| File::from(memfd_create("torture", MemfdFlags::CLOEXEC).unwrap()));
        let address = match &file {
            Some(file) => {
                ftruncate(file, (PAGES * PAGE) as u64).unwrap();
                map_file(file, PAGES)
            }
            None => map(PAGES),
        };
        Self {
            address,
            file,
            stamp: AtomicU64::new(0),
        }
    }

    /// Changes the buffer. Only one thread changes each buffer.
    fn change(&self, round: u64) {
        let stamp = self.stamp.fetch_add(1, SeqCst) + 2;
        match &self.file {
            Some(file) => {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file, how, 0, (PAGES * PAGE) as u64).unwrap();
            }
            None if round % 2 == 0 => map_over(self.address, PAGES),
            None => advise(self.address, PAGES, libc::MADV_DONTNEED),
        }
        poke(self.address, byte(stamp));
        self.stamp.store(stamp, SeqCst);
    }
}

/// The threads' counters, and the flag that stops them.
#[derive(Debug, Default)]
struct Totals {
    /// Transfers that were begun.
    tried: AtomicU64,
    /// Transfers whose buffer did not change meanwhile.
    compared: AtomicU64,
    /// Transfers that returned another byte than the buffer had.
    stale: AtomicU64,
    over: AtomicBool,
}

impl Totals {
    /// Waits until the transferring threads have begun some more transfers. A wait of a fixed time
    /// could be too short: if every transfer took longer, no transfer would have a buffer that does
    /// not change meanwhile.
    fn rest(&self) {
        let until = self.tried.load(SeqCst) + 4 * TRANSFERS as u64;
        while self.tried.load(SeqCst) < until && !self.over.load(SeqCst) {
            // Polls, so that the transferring threads need not wake this one.
            thread::park_timeout(Duration::from_millis(1));
        }
    }
}

/// Ends the run when its thread ends, also by a panic.
struct EndsAll<'a>(&'a AtomicBool);

impl Drop for EndsAll<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Reads from and writes to random buffers. A result counts only if the buffer did not change
/// between the look-up and the check.
fn transfer(lab: &Lab, end: &mut Endpoint, number: usize, buffers: &[Buffer], totals: &Totals) {
    let _end = EndsAll(&totals.over);
    let local = map(1);
    let own = lab.cache.get(range(local, 1)).unwrap();
    let place = Place {
        address: local as u64,
        key: own.handle().lkey(),
    };
    let mut random = 0x9e37_79b9_u64 + number as u64;
    while !totals.over.load(SeqCst) {
        totals.tried.fetch_add(1, SeqCst);
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let buffer = &buffers[(random >> 33) as usize % buffers.len()];
        let before = buffer.stamp.load(SeqCst);
        let Ok(lease) = lab.cache.get(range(buffer.address, PAGES)) else {
            continue;
        };
        let key = lease.handle().rkey();
        let is_read = random >> 62 & 1 == 0;
        let (found, wanted) = if is_read {
            let from = Place {
                address: buffer.address as u64,
                key,
            };
            // SAFETY: this thread owns the local page, and waits in `read` for the transfer.
            #[expect(unsafe_code, reason = "the device writes to memory")]
            unsafe { end.read(place, from, 1) }.unwrap();
            (peek(local), byte(before))
        } else {
            let mine = buffer.address + (1 + number) * PAGE;
            let value = (random >> 40) as u8 | 1;
            poke(local, value);
            // SAFETY: this thread owns the local page and this page of the buffer, and waits in
            // `write` for the transfer.
            #[expect(unsafe_code, reason = "the device writes to memory")]
            unsafe {
                end.write(
                    place,
                    Place {
                        address: mine as u64,
                        key,
                    },
                    1,
                )
            }
            .unwrap();
            (peek(mine), value)
        };
        let is_current = lease.is_current();
        if before % 2 == 0 && buffer.stamp.load(SeqCst) == before && is_current {
            totals.compared.fetch_add(1, SeqCst);
            totals.stale.fetch_add(u64::from(found != wanted), SeqCst);
        }
    }
}

/// Runs the threads for at least `time`, and until `is_enough` returns true.
fn torture(
    source: Source,
    time: Duration,
    is_enough: impl Fn(&Totals) -> bool + Sync,
) -> Option<Totals> {
    let lab = Lab::new(source)?;
    let buffers: Vec<Buffer> = (0..BUFFERS).map(Buffer::new).collect();
    let totals = Totals::default();
    let begin = Instant::now();
    thread::scope(|scope| {
        let (lab, buffers, totals, is_enough) = (&lab, &buffers, &totals, &is_enough);
        for number in 0..TRANSFERS {
            let (mut end, peer) = connected(&lab.context, lab.device.registrar().domain()).unwrap();
            scope.spawn(move || {
                transfer(lab, &mut end, number, buffers, totals);
                drop(peer);
            });
        }
        for number in 0..CHANGERS {
            scope.spawn(move || {
                let _end = EndsAll(&totals.over);
                for round in 0.. {
                    let took = begin.elapsed();
                    let is_over = took > time && is_enough(totals) || took > PATIENCE;
                    if is_over || totals.over.load(SeqCst) {
                        break;
                    }
                    buffers
                        .iter()
                        .skip(number)
                        .step_by(CHANGERS)
                        .for_each(|buffer| buffer.change(round));
                    totals.rest();
                }
            });
        }
    });
    println!(
        "{source:?}: {totals:?} in {:?}; {}",
        begin.elapsed(),
        lab.cache.stats()
    );
    Some(totals)
}

#[test]
fn under_torture_no_byte_is_stale_and_without_a_source_some_are() {
    let seconds = std::env::var("REGCACHE_RDMA_SECONDS")
        .ok()
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(3);
    let found = |totals: &Totals| totals.stale.load(SeqCst) > 0;
    let Some(control) = torture(Source::Nothing, Duration::ZERO, found) else {
        return;
    };
    assert!(found(&control), "{control:?}");
    let time = Duration::from_secs(seconds);
    let enough = |totals: &Totals| totals.compared.load(SeqCst) >= ENOUGH;
    let Some(totals) = torture(Source::Kernel, time, enough) else {
        return;
    };
    assert!(!found(&totals) && enough(&totals), "{totals:?}");
}
