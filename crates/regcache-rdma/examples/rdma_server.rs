//! Lets `rdma_client` read ordinary buffers by RDMA, and prints how often the cache found a
//! registration.
//!
//! ```sh
//! cargo run --features verbs --example rdma_server &
//! cargo run --features verbs --example rdma_client
//! ```
#![expect(
    unsafe_code,
    reason = "the device reads memory; each block says why it may"
)]

mod endpoint;

use endpoint::{Address, Endpoint, Failure, open};
use mmu_source::hook::Hook;
use regcache::{Device, Options};
use regcache_rdma::{Access, Rdma};
use std::io::{Read, Write};
use std::net::TcpListener;

const BUFFERS: usize = 8;
const LENGTH: usize = 256 << 10;

fn main() -> Result<(), Failure> {
    let address = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:18515".into());
    let context = open()?;
    let domain = context.alloc_pd()?;
    let mut end = Endpoint::new(&context, &domain)?;
    // SAFETY: peers may only read. The only client gets a key with the answer to each request, and
    // does not use the key after it has confirmed the transfer.
    let rdma = unsafe { Rdma::new(domain, Access::LocalWrite | Access::RemoteRead) }?;
    let _hook = Hook::install()?;
    let device = Device::new(rdma, Options::new());
    let cache = device.open(&mmu_source::current())?;

    let listener = TcpListener::bind(&address)?;
    println!("server: listens at {}", listener.local_addr()?);
    let (mut stream, _) = listener.accept()?;
    let (mine, mut theirs) = (end.address(), [0; 20]);
    stream.write_all(&[&mine.number.to_ne_bytes()[..], &mine.gid].concat())?;
    stream.read_exact(&mut theirs)?;
    end.connect(Address {
        number: u32::from_ne_bytes(theirs[..4].try_into()?),
        gid: theirs[4..].try_into()?,
    })?;
    stream.write_all(b"!")?;

    let mut buffers: Vec<Vec<u8>> = (0..BUFFERS)
        .map(|number| vec![number as u8; LENGTH])
        .collect();
    let mut request = [0; 4];
    let mut served = 0_usize;
    while stream.read_exact(&mut request).is_ok() {
        let number = u32::from_ne_bytes(request) as usize % BUFFERS;
        // At every tenth request, replace the buffer by a new buffer, which often gets the same
        // address.
        if served % 10 == 9 {
            buffers[number] = Vec::new();
            buffers[number] = vec![served as u8; LENGTH];
        }
        let buffer = &buffers[number];
        // The lease lasts until the client has confirmed that its transfer is complete.
        let lease = cache.get_for(buffer)?;
        let place = (buffer.as_ptr().expose_provenance() as u64).to_ne_bytes();
        let parts = [
            &place[..],
            &lease.handle().rkey().to_ne_bytes(),
            &(LENGTH as u32).to_ne_bytes(),
            &[buffer[0]],
        ];
        stream.write_all(&parts.concat())?;
        stream.read_exact(&mut [0])?;
        served += 1;
    }
    let stats = cache.stats();
    println!("server: {served} requests");
    println!("| hits | misses | invalidated |\n| --- | --- | --- |");
    println!(
        "| {} | {} | {} |",
        stats.hits, stats.misses, stats.invalidated
    );
    Ok(())
}
