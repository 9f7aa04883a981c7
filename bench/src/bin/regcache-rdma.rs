//! What does a hit cost whose handle is an RDMA memory region, compared with a hit whose handle is
//! an integer?
//!
//! `cargo run --release -p bench --bin regcache-rdma [ROUNDS]`. No device is needed: the registrar
//! makes handles with the layout of `regcache-rdma` (both keys, and a counted pointer to the
//! library's region), and each hit reads both keys. The last column is the additional cost if a hit
//! reads the keys from the library's own structure, behind two pointers.
#![allow(missing_docs, missing_debug_implementations, reason = "a bench")]

use mmu_notifier::{MmWithUser, Va, VaRange};
use regcache::{Counting, Device, Options, RegCache, Registrar};
use std::convert::Infallible;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

/// The layout of the registrar's handle: the keys, and the library's own structure behind pointers.
struct Region {
    keys: (u32, u32),
    #[expect(
        clippy::redundant_allocation,
        reason = "sideway's region points to that of verbs"
    )]
    of_verbs: Arc<Box<(u32, u32)>>,
}

struct Ready;

impl Registrar for Ready {
    type Handle = Region;
    type Error = Infallible;

    fn register(&self, range: VaRange) -> Result<Region, Infallible> {
        let key = (range.start().get() >> 12) as u32;
        let keys = (key, !key);
        Ok(Region {
            keys,
            of_verbs: Arc::new(Box::new(keys)),
        })
    }

    fn deregister(&self, _handle: Region) {}
}

fn range(number: u32) -> VaRange {
    VaRange::covering(Va::new(0x7f00_0000_0000 + u64::from(number) * 0x2000), 1).expect("a page")
}

fn cache<R: Registrar>(mm: &MmWithUser, registrar: R, regions: u32) -> RegCache<R> {
    let device = Device::new(registrar, Options::new().max_regions(2 * regions));
    let cache = device.open(mm).expect("outside of brackets");
    (0..regions).for_each(|number| drop(cache.get(range(number)).expect("a free place")));
    cache
}

/// Returns the nanoseconds for a hit, the use of its handle, and the drop of its lease.
fn hit<R: Registrar>(cache: &RegCache<R>, order: &[u32], using: impl Fn(&R::Handle)) -> f64 {
    let start = Instant::now();
    for number in order {
        let lease = cache.get(range(*number)).expect("it is there");
        using(lease.handle());
    }
    start.elapsed().as_nanos() as f64 / order.len() as f64
}

fn main() {
    let rounds = std::env::args()
        .nth(1)
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(2000);
    let mm = MmWithUser::new();
    println!(
        "| regions | number, ns | RDMA region, ns | difference, ns | keys behind pointers, ns |\n\
         | --- | --- | --- | --- | --- |"
    );
    for regions in [16_u32, 256, 4096] {
        let (plain, rdma) = (
            cache(&mm, Counting::default(), regions),
            cache(&mm, Ready, regions),
        );
        let order: Vec<u32> = (0..4096_u32)
            .map(|number| number.wrapping_mul(2_654_435_761) % regions)
            .collect();
        // The variants are interleaved, so that other programs disturb all of them equally.
        let mut pieces: Vec<[f64; 3]> = (0..rounds)
            .map(|_| {
                let plain = hit(&plain, &order, |handle| _ = black_box(*handle));
                let beside = hit(&rdma, &order, |handle| _ = black_box(handle.keys));
                let behind = hit(&rdma, &order, |handle| _ = black_box(**handle.of_verbs));
                [plain, beside, behind]
            })
            .collect();
        let mut median = |of: fn(&[f64; 3]) -> f64| {
            pieces.sort_by(|one, other| of(one).total_cmp(&of(other)));
            of(&pieces[pieces.len() / 2])
        };
        let (one, other, more, behind) = (
            median(|piece| piece[0]),
            median(|piece| piece[1]),
            median(|piece| piece[1] - piece[0]),
            median(|piece| piece[2] - piece[0]),
        );
        println!("| {regions} | {one:.1} | {other:.1} | {more:.1} | {behind:+.1} |");
    }
}
