//! Reads the buffers of `rdma_server` by RDMA into buffers of its own, and compares every byte.
#![expect(
    unsafe_code,
    reason = "the device writes memory; each block says why it may"
)]

mod endpoint;

use endpoint::{Address, Endpoint, Failure, Place, open};
use mmu_source::hook::Hook;
use regcache::{Device, Options};
use regcache_rdma::{Access, Rdma};
use std::io::{Read, Write};
use std::net::TcpStream;

const REQUESTS: u32 = 200;

fn main() -> Result<(), Failure> {
    let address = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:18515".into());
    let context = open()?;
    let domain = context.alloc_pd()?;
    let mut end = Endpoint::new(&context, &domain)?;
    // SAFETY: no other program learns a key, and this program uses each key only during its lease.
    let rdma = unsafe { Rdma::new(domain, Access::LocalWrite) }?;
    let _hook = Hook::install()?;
    let device = Device::new(rdma, Options::new());
    let cache = device.open(&mmu_source::current())?;

    let mut stream = TcpStream::connect(&address)?;
    let (mine, mut theirs) = (end.address(), [0; 20]);
    stream.write_all(&[&mine.number.to_ne_bytes()[..], &mine.gid].concat())?;
    stream.read_exact(&mut theirs)?;
    end.connect(Address {
        number: u32::from_ne_bytes(theirs[..4].try_into()?),
        gid: theirs[4..].try_into()?,
    })?;
    stream.read_exact(&mut [0])?;

    let mut wrong = 0;
    let mut buffer = Vec::new();
    for number in 0..REQUESTS {
        stream.write_all(&number.to_ne_bytes())?;
        let mut answer = [0; 17];
        stream.read_exact(&mut answer)?;
        let from = Place {
            address: u64::from_ne_bytes(answer[..8].try_into()?),
            key: u32::from_ne_bytes(answer[8..12].try_into()?),
        };
        let length = u32::from_ne_bytes(answer[12..16].try_into()?);
        // Every tenth request uses a new buffer, which often gets the address of the previous
        // buffer.
        if number % 10 == 0 {
            drop(std::mem::take(&mut buffer));
            buffer = vec![0; length as usize];
        }
        let lease = cache.get_for(&buffer)?;
        let to = Place {
            address: buffer.as_mut_ptr().expose_provenance() as u64,
            key: lease.handle().lkey(),
        };
        // SAFETY: this thread owns the buffer, and waits in `read` for the transfer.
        unsafe { end.read(to, from, length) }?;
        drop(lease);
        wrong += buffer.iter().filter(|byte| **byte != answer[16]).count();
        stream.write_all(b"!")?;
    }
    let stats = cache.stats();
    println!("client: {REQUESTS} requests, {wrong} bytes wrong");
    println!("| hits | misses | invalidated |\n| --- | --- | --- |");
    println!(
        "| {} | {} | {} |",
        stats.hits, stats.misses, stats.invalidated
    );
    if wrong == 0 {
        Ok(())
    } else {
        Err("stale bytes were read".into())
    }
}
