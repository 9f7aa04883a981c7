//! How much faster does a registration cache make io_uring reads? Compares reads into unregistered
//! buffers, reads with the cache, and reads with a registration for each read.
//!
//! `cargo run --release -p bench --bin regcache-uring [ROUNDS]`
#![allow(missing_docs, missing_debug_implementations, reason = "a bench")]

use io_uring::{IoUring, opcode, squeue, types};
use regcache::{Device, Options, RegCache, Uring};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

const BUFFERS: usize = 64;
const LARGEST: usize = 128 << 10;
const FILE: usize = 64 << 20;

/// Makes page-aligned buffers, as direct I/O requires.
fn buffers() -> Vec<&'static mut [u8]> {
    let memory = Vec::leak(vec![1_u8; (BUFFERS + 1) * LARGEST]);
    let offset = memory.as_ptr().addr().next_multiple_of(4096) - memory.as_ptr().addr();
    memory[offset..]
        .chunks_exact_mut(LARGEST)
        .take(BUFFERS)
        .collect()
}

/// Makes a file in memory. A read of it is a copy.
fn cached() -> File {
    // SAFETY: The name is a C string.
    let fd = unsafe { libc::memfd_create(c"bench".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: The descriptor is new and has no other owner.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(&vec![7; FILE]).expect("room in memory");
    file
}

/// Makes a file on a disk, for reads without the page cache. Such a read pins the buffer unless the
/// buffer is registered.
fn direct() -> std::io::Result<File> {
    let path = std::env::temp_dir().join(format!("regcache-uring.{}", std::process::id()));
    File::create(&path)?.write_all(&vec![7; FILE])?;
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path);
    std::fs::remove_file(&path)?;
    file
}

struct Bench {
    ring: IoUring,
    device: Device<Uring>,
    cache: RegCache<Uring>,
    buffers: Vec<&'static mut [u8]>,
}

#[derive(Clone, Copy)]
enum Way {
    Unregistered,
    Cache,
    EachTime,
}

impl Bench {
    fn read(&mut self, file: &File, way: Way, len: usize, at: usize) {
        let buffer = self.buffers[at % BUFFERS].as_mut_ptr();
        let (fd, offset) = (
            types::Fd(file.as_raw_fd()),
            (at * 7919 % (FILE / LARGEST) * LARGEST) as u64,
        );
        let lease;
        let entry = if let Way::Unregistered = way {
            opcode::Read::new(fd, buffer, len as u32)
                .offset(offset)
                .build()
        } else {
            let range = mmu_notifier::VaRange::covering(
                mmu_notifier::Va::new(buffer.addr() as u64),
                len as u64,
            );
            lease = self
                .cache
                .get(range.expect("not empty"))
                .expect("it can be registered");
            opcode::ReadFixed::new(fd, buffer, len as u32, lease.buf_index())
                .offset(offset)
                .build()
        };
        submit(&mut self.ring, &entry, len);
        if let Way::EachTime = way {
            self.cache.flush();
        }
    }

    /// Returns the microseconds for one read.
    fn reads(&mut self, file: &File, way: Way, len: usize, times: usize) -> f64 {
        (0..BUFFERS).for_each(|at| self.read(file, way, len, at));
        let start = Instant::now();
        (0..times).for_each(|at| self.read(file, way, len, at));
        let taken = start.elapsed().as_nanos() as f64 / times as f64 / 1000.0;
        self.cache.flush();
        taken
    }
}

fn submit(ring: &mut IoUring, entry: &squeue::Entry, len: usize) {
    // SAFETY: The buffer is leaked, and the caller holds its lease until this function returns,
    // after the request has completed.
    unsafe { ring.submission().push(entry) }.expect("one request at a time");
    ring.submit_and_wait(1).expect("io_uring works");
    assert_eq!(
        ring.completion().next().map(|entry| entry.result()),
        Some(len as i32)
    );
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let rounds: usize = std::env::args()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(5);
    let ring = IoUring::new(8).expect("io_uring works");
    let slots = BUFFERS as u16;
    let device = Device::new(
        Uring::new(&ring, slots).expect("no table yet"),
        Options::new().max_regions(slots.into()),
    );
    let cache = device
        .open(&mmu_source::current())
        .expect("outside of brackets");
    let mut bench = Bench {
        ring,
        device,
        cache,
        buffers: buffers(),
    };
    let mut files = vec![("page cache", cached(), 4000)];
    match direct() {
        Ok(file) => files.push(("direct", file, 500)),
        Err(error) => println!("no direct I/O here: {error}"),
    }
    println!(
        "{rounds} rounds, medians of microseconds for one read, one at a time, {BUFFERS} buffers in turn\n"
    );
    println!(
        "{:<28} {:>13} {:>9} {:>10} {:>22}",
        "", "unregistered", "cache", "each time", "cache / unregistered"
    );
    for (name, file, times) in &files {
        for len in [4096, LARGEST] {
            let mut columns: [Vec<f64>; 4] = Default::default();
            for _ in 0..rounds {
                let ways = [Way::Unregistered, Way::Cache, Way::EachTime];
                let taken = ways.map(|way| bench.reads(file, way, len, *times));
                columns
                    .iter_mut()
                    .zip(taken)
                    .for_each(|(column, taken)| column.push(taken));
                columns[3].push(taken[1] / taken[0]);
            }
            let [unregistered, cache, each, ratio] = columns.map(median);
            let what = format!("{name}, {} KiB", len >> 10);
            println!("{what:<28} {unregistered:>13.2} {cache:>9.2} {each:>10.2} {ratio:>22.2}");
        }
    }
    println!("\n{}", bench.cache.stats());
    drop(bench.cache);
    bench.device.synchronize().expect("outside of callbacks");
}
