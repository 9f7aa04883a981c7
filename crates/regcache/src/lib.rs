//! A registration cache that cannot serve a stale buffer.
//!
//! Memory has to be registered with a device before the device may use it (RDMA, GPU, io_uring fixed buffers, VFIO), which is slow, so
//! everyone caches registrations. A registration must not outlive its memory: when a buffer is unmapped and something else
//! mapped in its place, the old registration still leads to the old pages. This cache is a subscriber of [`mmu_notifier`]: what
//! is about to change leaves the look-up first.
//!
//! ```
//! use mmu_notifier::{Event, MmWithUser, Va, VaRange};
//! use regcache::{Counting, Device, Options};
//!
//! let device = Device::new(Counting::default(), Options::new());
//! let mm = MmWithUser::new();
//! let cache = device.open(&mm)?;
//! let buffer = VaRange::covering(Va::new(0x7f00_0000_0000), 2 << 20)?;
//!
//! drop(cache.get(buffer)?); // A miss: registers it.
//! drop(cache.get(buffer)?); // A hit: some ten nanoseconds.
//!
//! mm.with_invalidation(buffer, Event::Unmap, |_| {
//!     // The region is out of the look-up and deregistered before the memory goes away.
//!     assert_eq!(cache.stats().regions, 0);
//! });
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(unsafe_code)]

mod cache;
mod counting;
mod error;
mod gate;
mod granule;
mod index;
mod lease;
mod miss;
#[expect(unsafe_code, reason = "`mlock` takes a pointer")]
mod mlock;
mod options;
#[expect(unsafe_code, reason = "memory that is read without a lock")]
mod raw;
mod registrar;
mod state;
mod stats;
mod sync;
#[expect(unsafe_code, reason = "system calls that take pointers")]
mod uring;
mod walk;

pub use cache::{Device, RegCache};
pub use counting::Counting;
pub use error::Error;
pub use lease::{Lease, OwnedLease};
pub use mlock::Mlock;
pub use options::{Merge, Options};
pub use registrar::{Cause, Registrar};
pub use stats::Stats;
pub use uring::{FixedBuffer, Uring};
