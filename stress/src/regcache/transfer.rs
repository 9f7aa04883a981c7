//! Transfers through leases, and their comparison with the pattern.

use super::pool::{Buffer, Pool, memory_file};
use super::{Counts, add};
use crate::random::Random;
use io_uring::{IoUring, opcode, squeue, types};
use mmu_source::kernel::Kernel;
use regcache::{Device, Merge, Options, RegCache, Uring};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A thread with a ring, a cache and a file of its own.
pub(super) struct Worker {
    ring: IoUring,
    _device: Device<Uring>,
    pub(super) cache: RegCache<Uring>,
    file: File,
}

impl Worker {
    pub(super) fn new(
        merge: Merge,
        kernel: Option<Arc<Kernel>>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let ring = IoUring::new(4)?;
        // The table has few slots, so that regions are evicted, too.
        let mut options = Options::new().merge(merge).max_regions(24);
        if let Some(kernel) = kernel {
            options = options.kernel(kernel);
        }
        let device = Device::new(Uring::new(&ring, 24)?, options);
        let cache = device.open(&mmu_source::current())?;
        Ok(Self {
            ring,
            _device: device,
            cache,
            file: memory_file()?.into(),
        })
    }

    pub(super) fn run(
        &mut self,
        pool: &Pool,
        counts: &Counts,
        stop: &AtomicBool,
        mut random: Random,
    ) {
        while !stop.load(Ordering::Relaxed) {
            if random.one_in(4) {
                self.read(pool.some(&mut random), counts);
            } else {
                self.write(pool.some(&mut random), counts, &mut random);
            }
        }
    }

    /// Makes one request, waits for it, and returns its result.
    fn transfer(&mut self, entry: &squeue::Entry) -> i32 {
        // SAFETY: The memory must be valid until the request has completed. The caller keeps the
        // lease until this function returns. If another thread unmaps the memory meanwhile, its
        // pages stay pinned.
        unsafe { self.ring.submission().push(entry) }.expect("one request at a time");
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => panic!("io_uring_enter: {error}"),
            }
        }
        self.ring
            .completion()
            .next()
            .expect("it has completed")
            .result()
    }

    /// Writes a part of a buffer to the file, while other threads may change it.
    fn write(&mut self, buffer: &Buffer, counts: &Counts, random: &mut Random) {
        let from = random.below(buffer.len / 8) * 8;
        let len = (1 + random.below((buffer.len - from) / 8)) * 8;
        let version = buffer.version();
        let result = {
            let cache = self.cache.try_clone().expect("few handles");
            let Ok(lease) = cache.get(buffer.part(from, len)) else {
                return add(&counts.refused);
            };
            let (fd, slot) = (types::Fd(self.file.as_raw_fd()), lease.buf_index());
            let write =
                opcode::WriteFixed::new(fd, buffer.start.wrapping_add(from), len as u32, slot)
                    .offset(0);
            self.transfer(&write.build())
        };
        if buffer.version() != version || version % 2 == 1 {
            return add(&counts.overtaken);
        }
        let (mut found, mut expected) = (vec![0; len], vec![0; len]);
        buffer.contents(version, from, &mut expected);
        if result != len as i32 {
            println!(
                "write of {len} bytes at {:?}: {result}",
                buffer.part(from, len)
            );
            return add(&counts.errors);
        }
        self.file
            .read_exact_at(&mut found, 0)
            .expect("it was written");
        if found != expected {
            println!(
                "stale: wrote something else than version {version} at {}",
                buffer.part(from, len)
            );
            add(&counts.stale);
        }
        add(&counts.written);
    }

    /// Reads the next version of a buffer from the file.
    fn read(&mut self, buffer: &Buffer, counts: &Counts) {
        let _changing = buffer.changing.lock().expect("no panic");
        let mut expected = vec![0; buffer.len];
        let version = buffer.begin();
        buffer.contents(version, 0, &mut expected);
        self.file
            .write_all_at(&expected, 0)
            .expect("room for a buffer");
        let cache = self.cache.try_clone().expect("few handles");
        if let Ok(lease) = cache.get(buffer.range()) {
            let (fd, slot) = (types::Fd(self.file.as_raw_fd()), lease.buf_index());
            let read = opcode::ReadFixed::new(fd, buffer.start, buffer.len as u32, slot).offset(0);
            let result = self.transfer(&read.build());
            if result != buffer.len as i32 {
                println!(
                    "read of {} bytes at {}: {result}",
                    buffer.len,
                    buffer.range()
                );
                add(&counts.errors);
            }
            // SAFETY: The buffer is mapped, and no other thread changes it, because this thread
            // holds `changing`.
            let found = unsafe { std::slice::from_raw_parts(buffer.start, buffer.len) };
            if found != expected {
                println!(
                    "stale: version {version} did not arrive at {}",
                    buffer.range()
                );
                add(&counts.stale);
                buffer.fill(version);
            }
            add(&counts.read);
        } else {
            add(&counts.refused);
            buffer.fill(version);
        }
        buffer.end();
    }
}
