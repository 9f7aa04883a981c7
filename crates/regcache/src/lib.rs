//! A registration cache that cannot serve a stale buffer.
//!
//! Memory has to be registered with a device before the device may use it (RDMA, GPU, io_uring
//! fixed buffers, VFIO). Registering is slow, so programs cache registrations. A registration must
//! not outlive its memory: if a buffer is unmapped and another one is mapped at the same address,
//! the old registration still leads to the old pages. This cache is a subscriber of
//! [`mmu_notifier`]: a look-up finds no region whose memory had begun to change before the look-up,
//! if a [source](#sources) has seen the change. Only [`Options::kernel`] misses none, and a cache
//! without any source never learns of a change.
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
//! * The region that [`get`](RegCache::get) returns is registered until the [`Lease`] ends, and
//!   covers the requested range.
//! * Once a source has reported a change to the cache, look-ups no longer find regions of the
//!   changed memory. `mmu_source::hook`, and a bracket that the program itself opens, report a
//!   change before the memory changes. Then a region without a lease is also deregistered before
//!   the change, if [`Registrar::deregisters_in_callbacks`] returns true.
//! * With [`Options::kernel`], a look-up first asks the kernel source for unreported changes. That
//!   source misses nothing: it has counted every change that began before `get` was called.
//! * If an invalidation overlaps a registration in progress, no look-up ever finds that
//!   registration.
//! * A lease does not prevent the memory from being unmapped. The lease keeps the *registration*,
//!   and [`Lease::is_current`] says whether the registration still matches the memory.
//!
//! # How a hit works
//! The address space is divided into aligned pieces, the *granules*. A region has an entry in a
//! hash table for each granule that it touches, at most nine. A look-up reads the entry of the
//! requested range's first address. Tables and regions are freed only with the cache, so a look-up
//! needs no lock and no read section. To lease the region, the thread writes the region's number
//! into a slot of its own, and then checks whether the region is live.
//! An invalidation or eviction marks the region dead, makes one `membarrier` call, and then scans
//! the slots of all threads. If the slot is written before that call, the scan finds the lease; if
//! the call comes first, the thread finds the region dead. So a hit and the end of its lease write
//! to no cache line that other threads write to.
//!
//! A miss, an eviction and an invalidation take one lock. Under that lock the cache neither
//! allocates nor frees, and calls no foreign code. So an invalidation may happen in the middle of
//! `free`. (If a signal stops a thread while it holds the lock, as some garbage collectors do,
//! invalidations wait for that thread.)
//!
//! A full cache evicts by SIEVE: a *hand* moves along the list of regions, and spares a region that
//! was used since the hand last passed it. Only the first hit of a region after that pass writes
//! the mark of the use, which is in shared memory. `bench/README.md` compares SIEVE with LRU and
//! S3-FIFO.
//!
//! # Sources
//! | source | how | what it misses |
//! | --- | --- | --- |
//! | `mmu_source::hook` | install the hook | truncated and punched files, copy on write (`fork`), other processes, raw system calls |
//! | `mmu_source::kernel` | [`Options::kernel`] | nothing |
//! | own brackets | [`Mm::invalidate`](mmu_notifier::Mm::invalidate) | changes without a bracket |
//!
//! The first two sources report on [`mmu_source::current`], so open the cache for that address
//! space. The hook sees only changes that go through libc. With the kernel source, each miss arms
//! its range, which takes a few microseconds if memory has changed since the last miss. Own
//! brackets are those that the program itself opens.
//!
//! `mmu_source::uffd` is not offered for caches. With userfaultfd, `munmap` waits until its event
//! has been *read*, not until it has been handled. Between the two, `munmap` may return and the
//! addresses may be mapped again, while a look-up still finds the old region. So a bracket that
//! this source opens on [`current`](mmu_source::current) may come too late. To be sound, the
//! source would have to count an event before reading it, and each look-up would have to compare
//! that count with the handled events, as [`Options::kernel`] does. Even then the source would miss
//! truncation, copy on write after a fork, and other processes, which the kernel source sees.
//!
//! # Forks
//! In the parent, [`Options::kernel`] sees a fork as a change of all private writable memory, which
//! becomes copy on write. Regions of such memory leave the look-up, even leased ones, and the next
//! `get` of each registers it again.
//!
//! In the child, `get` returns [`Error::Forked`] and every other call on the inherited cache has no
//! effect, because the registrations belong to the parent. The child can make a device of its own
//! and open a cache. The child cannot use the parent's device: the parent's registrar may have been
//! in the middle of a call, and a fork does not copy a ring or a device table.
//!
//! # Features
//! `hook` and `kernel` re-export `mmu_source` with the source of that name. `kernel` also adds
//! `Options::kernel`. `uring` adds the registrar `Uring`. These three are on by default. `vfio`,
//! off by default, adds the registrar `Vfio`, for devices that the program drives itself.
//!
//! # Environment
//! If `REGCACHE_NO_MEMBARRIER` is set when the first cache is opened, caches do without
//! `membarrier`, as they do if the kernel refuses it. Leases are then counted in their regions, in
//! shared memory.
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

/// The crate `mmu-source`, with the sources that this crate's features select.
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
