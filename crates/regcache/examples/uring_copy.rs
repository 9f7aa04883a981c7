//! Copies a file with fixed-buffer I/O, through buffers that another thread keeps remapping.
//!
//! `cargo run --release -p regcache --example uring_copy [FROM TO]`
//!
//! A buffer is leased for one read and one write. Then the buffer goes to the other thread, which
//! may replace its memory, and comes back. If a look-up found a registration of the old memory, the
//! data would end up in the old pages, and the checksums would differ.

use io_uring::{IoUring, opcode, squeue, types};
use mmu_notifier::lockdep::CheckedAlloc;
use mmu_source::hook::Hook;
use mmu_source::kernel::Kernel;
use regcache::{Device, Options, OwnedLease, RegCache, Uring};
use std::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::{env, process, ptr, thread};

/// Ends the program if a callback uses the heap, which a callback must not do: see `Notifier`.
#[global_allocator]
static ALLOC: CheckedAlloc = CheckedAlloc::new();

const BUFFERS: usize = 8;
const LEN: usize = 64 << 10;

/// Memory that this value owns.
struct Buffer(*mut u8);

// SAFETY: the memory is accessed only through this value, so at any time only by its owner's
// thread.
unsafe impl Send for Buffer {}

/// Maps new memory, at `place` if that is not null.
fn map(place: *mut u8) -> io::Result<*mut u8> {
    let fixed = if place.is_null() { 0 } else { libc::MAP_FIXED };
    let (access, kind) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed,
    );
    // SAFETY: either the kernel chooses an address where nothing is mapped, or `place` is a buffer
    // that the caller owns, which no code has a reference to.
    let place = unsafe { libc::mmap(place.cast(), LEN, access, kind, -1, 0) };
    if place == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(place.cast())
    }
}

/// A request that uses a buffer.
struct Request {
    buffer: Buffer,
    /// Keeps the buffer registered until the request has completed.
    lease: OwnedLease<Uring>,
    offset: u64,
    len: u32,
    step: Step,
}

#[derive(PartialEq)]
enum Step {
    Read,
    Write,
}

impl Request {
    fn entry(&self, from: &File, to: &File) -> squeue::Entry {
        let slot = self.lease.buf_index();
        match self.step {
            Step::Read => {
                opcode::ReadFixed::new(types::Fd(from.as_raw_fd()), self.buffer.0, LEN as u32, slot)
                    .offset(self.offset)
                    .build()
            }
            Step::Write => {
                opcode::WriteFixed::new(types::Fd(to.as_raw_fd()), self.buffer.0, self.len, slot)
                    .offset(self.offset)
                    .build()
            }
        }
    }
}

/// Copies `from` to `to` with buffers from `free`. Each buffer goes to `used` after one chunk.
fn copy(
    ring: &mut IoUring,
    cache: &RegCache<Uring>,
    (from, to): (&File, &File),
    (free, used): (&Receiver<Buffer>, &Sender<Buffer>),
) -> Result<u64, Box<dyn Error>> {
    let len = from.metadata()?.len();
    let mut requests: [Option<Request>; BUFFERS] = Default::default();
    let (mut next, mut copied) = (0, 0);
    while copied < len {
        for (number, place) in requests.iter_mut().enumerate() {
            if place.is_some() || next >= len {
                continue;
            }
            let buffer = free.recv()?;
            // SAFETY: the buffer owns the memory, which is mapped, and no other code uses it.
            let memory = unsafe { std::slice::from_raw_parts(buffer.0, LEN) };
            let range = mmu_notifier::VaRange::covering(
                mmu_notifier::Va::new(memory.as_ptr().addr() as u64),
                LEN as u64,
            )?;
            let request = Request {
                buffer,
                lease: cache.get_owned(range)?,
                offset: next,
                len: 0,
                step: Step::Read,
            };
            next += LEN as u64;
            let entry = request.entry(from, to).user_data(number as u64);
            // SAFETY: the memory must stay mapped until the completion. No code unmaps a buffer.
            unsafe { ring.submission().push(&entry)? };
            *place = Some(request);
        }
        ring.submit_and_wait(1)?;
        let completions: Vec<_> = ring
            .completion()
            .map(|entry| (entry.user_data() as usize, entry.result()))
            .collect();
        for (number, result) in completions {
            let mut request = requests[number].take().ok_or("a completion for nothing")?;
            if result <= 0 {
                return Err(io::Error::from_raw_os_error(-result).into());
            }
            if request.step == Step::Read {
                (request.step, request.len) = (Step::Write, result as u32);
                let entry = request.entry(from, to).user_data(number as u64);
                // SAFETY: as above.
                unsafe { ring.submission().push(&entry)? };
                requests[number] = Some(request);
            } else {
                copied += result as u64;
                let Request { buffer, lease, .. } = request;
                drop(lease);
                used.send(buffer)?;
            }
        }
    }
    Ok(copied)
}

/// Replaces the memory of every third buffer that arrives.
fn remap(used: &Receiver<Buffer>, free: &Sender<Buffer>) -> io::Result<u64> {
    let mut count = 0;
    for (number, Buffer(place)) in used.iter().enumerate() {
        if number % 3 != 0 {
            let _ = free.send(Buffer(place));
            continue;
        }
        // The memory goes away, but the addresses stay reserved until `map` below, so that no other
        // mapping gets them.
        // SAFETY: this thread owns the buffer and its memory now.
        unsafe {
            libc::mmap(
                place.cast(),
                LEN,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        let _ = free.send(Buffer(map(place)?));
        count += 1;
    }
    Ok(count)
}

/// FNV-1a.
fn checksum(path: &PathBuf) -> io::Result<u64> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    }))
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args_os().skip(1).map(PathBuf::from);
    let from = arguments.next().map_or_else(env::current_exe, Ok)?;
    let to = arguments
        .next()
        .unwrap_or_else(|| env::temp_dir().join(format!("uring_copy.{}", process::id())));
    copy_file(&from, &to)
}

fn copy_file(from: &PathBuf, to: &PathBuf) -> Result<(), Box<dyn Error>> {
    // One source is enough here: the hook, or the kernel source if the hook cannot be installed.
    // Only libc calls of this process remap the buffers.
    let hook = Hook::install();
    let mut options = Options::new().max_regions(BUFFERS as u32 * 2);
    if let Err(error) = &hook {
        println!("{error}: asking the kernel");
        options = options.kernel(Kernel::start()?);
    }
    let mut ring = IoUring::new(2 * BUFFERS as u32)?;
    let device = Device::new(Uring::new(&ring, BUFFERS as u16 * 2)?, options);
    let cache = device.open(&mmu_source::current())?;

    let (to_free, free) = mpsc::channel();
    let (to_used, used) = mpsc::channel();
    for _ in 0..BUFFERS {
        to_free.send(Buffer(map(ptr::null_mut())?))?;
    }
    let remapper = thread::spawn(move || remap(&used, &to_free));
    let (source, target) = (File::open(from)?, File::create(to)?);
    let copied = copy(&mut ring, &cache, (&source, &target), (&free, &to_used))?;
    drop(to_used);
    let remapped = remapper.join().map_err(|_| "the other thread panicked")??;

    println!(
        "{copied} bytes copied, {remapped} buffers remapped; {}",
        cache.stats()
    );
    if checksum(from)? != checksum(to)? {
        return Err("the copy differs".into());
    }
    println!("the checksums agree");
    Ok(())
}

#[cfg(test)]
#[test]
fn it_copies() {
    if let Err(error) = IoUring::new(2) {
        println!("SKIP it_copies: io_uring: {error}");
        return;
    }
    let to = env::temp_dir().join(format!("uring_copy.{}", process::id()));
    let copied = copy_file(&env::current_exe().expect("this program has a name"), &to);
    let removed = std::fs::remove_file(to);
    copied
        .and(removed.map_err(Into::into))
        .expect("the example succeeds");
}
