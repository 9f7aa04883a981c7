//! Reads ordinary buffers by RDMA, and compares every byte. Another thread frees each buffer, and
//! the next buffer gets the same address.
//!
//! Both queue pairs belong to this process, so it reads memory that it has registered itself.
//!
//! ```sh
//! cargo run --features verbs --example rdma_read
//! ```
#![expect(
    unsafe_code,
    reason = "the device reads and writes memory; each block says why it may"
)]

mod endpoint;

use endpoint::{Failure, Place, connected, open};
use mmu_source::hook::Hook;
use mmu_source::kernel::Kernel;
use regcache::{Device, Options};
use regcache_rdma::{Access, Rdma};
use std::thread;

const ROUNDS: usize = 200;
const LENGTH: usize = 64 << 10;

fn main() -> Result<(), Failure> {
    let context = open()?;
    let domain = context.alloc_pd()?;
    let (mut reader, _peer) = connected(&context, &domain)?;
    // SAFETY: only the reader below uses keys, each during its lease, and it waits for its
    // transfers.
    let rdma = unsafe { Rdma::new(domain, Access::LocalWrite | Access::RemoteRead) }?;
    // The kernel source sees every change. If it does not work here, the hook sees the `munmap`
    // that `free` calls.
    let (options, _hook) = match Kernel::start() {
        Ok(kernel) => (Options::new().kernel(kernel), None),
        Err(why) => {
            println!("without the kernel source ({why}), with hooks");
            (Options::new(), Some(Hook::install()?))
        }
    };
    let device = Device::new(rdma, options);
    let cache = device.open(&mmu_source::current())?;
    let mut sink = vec![0_u8; LENGTH];
    let mut wrong = 0;
    for round in 0..ROUNDS {
        // The buffer is so large that `malloc` maps it and `free` unmaps it. So the next buffer
        // gets the same address.
        let buffer = vec![round as u8; 4 << 20];
        let from = cache.get_for(&buffer[..LENGTH])?;
        let to = cache.get_for(&sink)?;
        let (from_place, to_place) = (
            Place {
                address: buffer.as_ptr().expose_provenance() as u64,
                key: from.handle().rkey(),
            },
            Place {
                address: sink.as_mut_ptr().expose_provenance() as u64,
                key: to.handle().lkey(),
            },
        );
        // SAFETY: this thread owns both buffers, and waits in `read` for the transfer.
        unsafe { reader.read(to_place, from_place, LENGTH as u32) }?;
        drop((from, to));
        wrong += sink.iter().filter(|byte| **byte != round as u8).count();
        thread::spawn(move || drop(buffer))
            .join()
            .map_err(|_| "the other thread panicked")?;
    }
    println!(
        "{ROUNDS} buffers read, {wrong} bytes wrong; {}",
        cache.stats()
    );
    if wrong == 0 {
        Ok(())
    } else {
        Err("stale bytes were read".into())
    }
}
