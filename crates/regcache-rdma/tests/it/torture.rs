//! Reads and writes through leases while the memory changes under them. `REGCACHE_RDMA_SECONDS`
//! says for how long.

use crate::endpoint::{Endpoint, Place, connected};
use crate::memory::{Lab, PAGE, Source, advise, map, map_file, map_over, peek, poke, range};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

/// How many threads transfer, and how many change memory.
const TRANSFERS: usize = 2;
const CHANGERS: usize = 2;
const BUFFERS: usize = 16;
/// The first page is read; each transferring thread writes to one of its own.
const PAGES: usize = 1 + TRANSFERS;

/// Memory that changes. Its first byte follows from its stamp, which is odd during a change.
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

    /// One thread changes a buffer.
    fn change(&self, round: u64) {
        let stamp = self.stamp.fetch_add(1, SeqCst) + 2;
        match &self.file {
            Some(file) => {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file, how, 0, (PAGES * PAGE) as u64).unwrap();
            }
            None if round.is_multiple_of(2) => map_over(self.address, PAGES),
            None => advise(self.address, PAGES, libc::MADV_DONTNEED),
        }
        poke(self.address, byte(stamp));
        self.stamp.store(stamp, SeqCst);
    }
}

/// What the threads saw.
#[derive(Debug, Default)]
struct Totals {
    compared: u64,
    stale: u64,
}

/// Reads from and writes to random buffers. A result counts if the buffer stayed the same from
/// before the look-up until after it was looked at.
fn transfer(
    lab: &Lab,
    end: &mut Endpoint,
    number: usize,
    buffers: &[Buffer],
    over: &AtomicBool,
) -> Totals {
    let mut totals = Totals::default();
    let local = map(1);
    let own = lab.cache.get(range(local, 1)).unwrap();
    let place = Place {
        address: local as u64,
        key: own.handle().lkey(),
    };
    let mut random = 0x9e37_79b9_u64 + number as u64;
    while !over.load(SeqCst) {
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
            // SAFETY: the local page is this thread's.
            #[expect(unsafe_code, reason = "the device writes to memory")]
            unsafe { end.read(place, from, 1) }.unwrap();
            (peek(local), byte(before))
        } else {
            let mine = buffer.address + (1 + number) * PAGE;
            let value = (random >> 40) as u8 | 1;
            poke(local, value);
            // SAFETY: this page of the buffer is this thread's.
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
        if before.is_multiple_of(2) && buffer.stamp.load(SeqCst) == before && is_current {
            totals.compared += 1;
            totals.stale += u64::from(found != wanted);
        }
    }
    totals
}

fn torture(source: Source, time: Duration) -> Option<Totals> {
    let lab = Lab::new(source)?;
    let buffers: Vec<Buffer> = (0..BUFFERS).map(Buffer::new).collect();
    let over = AtomicBool::new(false);
    let totals = thread::scope(|scope| {
        let transfers: Vec<_> = (0..TRANSFERS)
            .map(|number| {
                let (mut end, peer) =
                    connected(&lab.context, lab.device.registrar().domain()).unwrap();
                let (lab, buffers, over) = (&lab, &buffers, &over);
                scope.spawn(move || {
                    let totals = transfer(lab, &mut end, number, buffers, over);
                    drop(peer);
                    totals
                })
            })
            .collect();
        for number in 0..CHANGERS {
            let (buffers, over) = (&buffers, &over);
            scope.spawn(move || {
                let begin = Instant::now();
                for round in 0.. {
                    if begin.elapsed() > time {
                        over.store(true, SeqCst);
                        break;
                    }
                    buffers
                        .iter()
                        .skip(number)
                        .step_by(CHANGERS)
                        .for_each(|buffer| buffer.change(round));
                    // Between rounds the buffers rest, so that some are hit: as long as a few
                    // transfers take.
                    thread::park_timeout(Duration::from_millis(5));
                }
            });
        }
        transfers
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .fold(Totals::default(), |sum, one| Totals {
                compared: sum.compared + one.compared,
                stale: sum.stale + one.stale,
            })
    });
    println!("{source:?}: {totals:?}; {}", lab.cache.stats());
    Some(totals)
}

#[test]
fn under_torture_no_byte_is_stale_and_without_a_source_some_are() {
    let seconds = std::env::var("REGCACHE_RDMA_SECONDS")
        .ok()
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(3);
    let Some(control) = torture(Source::Nothing, Duration::from_secs(2)) else {
        return;
    };
    assert!(control.stale > 0, "{control:?}");
    let Some(totals) = torture(Source::Kernel, Duration::from_secs(seconds)) else {
        return;
    };
    assert!(totals.stale == 0 && totals.compared > 0, "{totals:?}");
}
