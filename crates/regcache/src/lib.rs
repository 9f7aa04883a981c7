//! A registration cache that cannot serve a stale buffer.
//!
//! Memory has to be registered with a device before the device may use it (RDMA, GPU, io_uring
//! fixed buffers, VFIO), which is slow, so everyone caches registrations. A registration must not
//! outlive its memory: when a buffer is unmapped and something else mapped in its place, the old
//! registration still leads to the old pages. This cache is a subscriber of [`mmu_notifier`]: what
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
//!
//! # What is promised
//! * What [`get`](RegCache::get) returns is registered until the [`Lease`] ends, and covers what
//!   was asked for.
//! * A region is not found any more once a change of its memory has been told, and it has been told
//!   before the memory changes if the source is one that calls back first (`mmu_source::hook`, or a
//!   bracket of one's own). It is deregistered before the change, too, if it is not leased and
//!   [`Registrar::deregisters_in_callbacks`].
//! * With [`Options::kernel`], a look-up asks the kernel source first, which misses nothing: a
//!   change that had begun before `get` was called is known to it.
//! * A registration that an invalidation meets half-way is never entered in the table.
//! * A lease does not keep memory from being unmapped. It keeps the *registration*, and
//!   [`Lease::is_current`] says whether that still stands for the memory.
//!
//! # How a hit works
//! A region is entered in a hash table under the few granules of the address space that it touches;
//! a look-up reads the entry of its first address. Tables and regions are freed with the cache and
//! not before, so it needs no lock and no read section to look at them. To lease what it found, the
//! thread writes the region's number into a slot of its own, and then looks whether the region is
//! live. An invalidation or eviction marks the region dead, makes one `membarrier` call, and then
//! scans the slots of all threads. If the slot is written before that call, the scan finds the
//! lease; if the call comes first, the thread finds the region dead. So a hit and its end write to
//! no cache line that other threads write to.
//!
//! Everything else, a miss, an eviction, an invalidation, is done under one lock, under which
//! nothing allocates, frees or calls out. That is why an invalidation may come in the middle of
//! `free`. (A thread that is stopped by a signal while it holds the lock, as some garbage
//! collectors do, holds up invalidations.)
//!
//! Full caches evict by SIEVE: a region that was used since the hand last passed is spared. A hit
//! notes its use by a write only if no hit has done so since. `bench/README.md` has it beside LRU
//! and S3-FIFO.
//!
//! # Sources
//! | source | how | what it misses |
//! | --- | --- | --- |
//! | `mmu_source::hook` | install it, open the cache for [`mmu_source::current`] | changes that libc does not make: truncation, other processes, raw system calls |
//! | `mmu_source::kernel` | [`Options::kernel`] | nothing; each miss arms the range, some hundred microseconds if anything has changed since the last |
//! | the program's own brackets | [`Mm::invalidate`](mmu_notifier::Mm::invalidate) | changes without a bracket |
//!
//! `mmu_source::uffd` is not offered for caches. With userfaultfd, `munmap` waits until its event
//! has been *read*, not until it has been dealt with: between the two it returns, the memory is
//! used anew, and a look-up would still find the old region. A bracket on
//! [`current`](mmu_source::current) that only this source makes is therefore too late. To be sound,
//! the source would have to count an event before it reads it, and each look-up to compare that
//! with what was told, as [`Options::kernel`] does; even then truncation, copy on write after a
//! fork and other processes would be missed, which the kernel source sees.
//!
//! # Forks
//! In the parent, [`Options::kernel`] sees a fork as a change of all private writable memory, which
//! becomes copy on write: such regions leave the look-up, leased ones too, and the next `get` of
//! each registers anew.
//!
//! In the child, `get` returns [`Error::Forked`], and nothing else of the inherited cache does
//! anything: the registrations are the parent's. The child can make a device of its own and open a
//! cache; the parent's device opens none there, as its registrar may have been in the middle of
//! something, and a ring or a table is not copied by a fork.
//!
//! # Features
//! `hook` and `kernel` re-export `mmu_source` with the source of that name, `kernel` adds
//! `Options::kernel`, `uring` the registrar `Uring`. These are on by default. `vfio`, which is not,
//! adds the registrar `Vfio`, for devices that the program drives itself.
//!
//! # Environment
//! `REGCACHE_NO_MEMBARRIER`, if set when the first cache is opened, makes it do without
//! `membarrier`, as it does where the kernel refuses it: leases are then counted in their regions,
//! in shared memory.
#![deny(unsafe_code)]

mod cache;
mod counting;
mod device;
mod error;
#[cfg_attr(not(feature = "kernel"), path = "always_fresh.rs")]
mod freshness;
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
#[cfg(feature = "uring")]
#[expect(unsafe_code, reason = "system calls that take pointers")]
mod uring;
#[cfg(feature = "vfio")]
#[expect(unsafe_code, reason = "system calls that take pointers")]
mod vfio;
mod walk;

/// The crate of the sources, with those that this crate's features name.
#[cfg(any(feature = "hook", feature = "kernel"))]
pub use mmu_source;

pub use counting::Counting;
pub use device::{Device, OwnedLease, RegCache};
pub use error::Error;
pub use lease::Lease;
pub use mlock::Mlock;
pub use options::{Merge, Options};
pub use registrar::{Cause, Registrar};
pub use stats::Stats;
#[cfg(feature = "uring")]
pub use uring::{FixedBuffer, Uring};
#[cfg(feature = "vfio")]
pub use vfio::{DmaAccess, DmaMapping, Vfio};

/// The README's examples must run.
#[cfg(all(doctest, feature = "hook", feature = "uring"))]
#[doc = include_str!("../README.md")]
struct Readme;
