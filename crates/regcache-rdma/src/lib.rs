//! RDMA memory regions in a registration cache that never returns a stale region.
//!
//! A network card reads and writes registered memory by itself. `ibv_reg_mr` pins the pages, which
//! takes microseconds to milliseconds, so programs cache memory regions. The pin outlives the
//! mapping: the card reaches the old pages after `munmap`, and even after a new `mmap` at the same
//! address. `Rdma` is a [`Registrar`](regcache::Registrar): with it, a
//! [`RegCache`](regcache::RegCache) leases memory regions, and removes a region from the look-up
//! when its memory changes.
//!
//! Enable the feature `verbs`. It is off by default, because the build of its dependency `sideway`
//! needs cmake and libclang. `libibverbs` is loaded at run time: without it a program still starts,
//! and the first verbs function that it calls returns an error.
//!
#![cfg_attr(feature = "verbs", doc = "```no_run")]
#![cfg_attr(not(feature = "verbs"), doc = "```text")]
//! use mmu_source::hook::Hook;
//! use regcache::{Device, Options};
//! use regcache_rdma::{Access, Rdma};
//! use sideway::ibverbs::device::DeviceList;
//!
//! let context = DeviceList::new()?.get(0).ok_or("no RDMA device")?.open()?;
//! // Sound, because no other program learns a key, and this one uses each key only during its
//! // lease.
//! let rdma = unsafe { Rdma::new(context.alloc_pd()?, Access::LocalWrite | Access::RemoteRead)? };
//! let _hook = Hook::install()?;
//! let device = Device::new(rdma, Options::new());
//! let cache = device.open(&mmu_source::current())?;
//!
//! let buffer = vec![7_u8; 1 << 20];
//! let lease = cache.get_for(&buffer)?; // A miss: `ibv_reg_mr`.
//! let (local, remote) = (lease.handle().lkey(), lease.handle().rkey());
//! # let _ = (local, remote);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The effect of an invalidation
//! * **On a new lease**: the cache removes the region before the memory changes (`hook`, brackets
//!   that the program opens) or before the next look-up returns (`kernel`). So a new lease never
//!   has a stale region.
//! * **On a lease that is held**: its region stays registered and leads to the old pages until the
//!   lease ends. The pages stay pinned, so the kernel frees no page that the card uses.
//!   [`Lease::is_current`](regcache::Lease::is_current) says whether the program still has these
//!   pages at that address. Call it *after* a transfer into the memory, before you trust the data.
//! * **On a peer that holds the `rkey`**: once the region is deregistered, the peer's requests
//!   fail with a remote access error. Until then its requests reach the old pages. A region without
//!   leases is deregistered by the next miss, [`reap`](regcache::RegCache::reap),
//!   [`flush`](regcache::RegCache::flush) or end of a lease. So keep a lease as long as a peer may
//!   use its `rkey`, and call `is_current` before you trust the peer's answer.
//!
//! # When regions are deregistered
//! It is safe to deregister a region after its memory was unmapped, because the kernel pins the
//! pages, and a region is deregistered by its handle. `ibv_dereg_mr` allocates, frees and locks. So
//! the cache never calls it in a callback, which can run in the middle of `free`:
//! [`Registrar::deregisters_in_callbacks`](regcache::Registrar::deregisters_in_callbacks) is false.
//!
//! The exception is rdma-core's own fork support (`ibv_fork_init`, `RDMAV_FORK_SAFE`) on kernels
//! before 5.12. There `ibv_reg_mr` and `ibv_dereg_mr` call `madvise` with `MADV_DONTFORK` and
//! `MADV_DOFORK` for the *addresses* of a region, which after an unmap may belong to other memory.
//! Since Linux 5.12 the kernel copies pinned pages on fork, and rdma-core 35 or later makes neither
//! call. Do not enable fork support on older versions.
//!
//! # Forks
//! A child cannot use its parent's cache: [`regcache`](regcache#forks) returns an error in the
//! child. The first write to a page after a fork copies the page. Since Linux 5.12 the *parent*
//! keeps the pinned page. On older kernels the parent may get the copy, and only the `kernel`
//! source sees that change.
#![deny(unsafe_code)]

#[cfg(feature = "verbs")]
mod error;
#[cfg(feature = "verbs")]
mod odp;
#[cfg(feature = "verbs")]
mod rdma;

#[cfg(feature = "verbs")]
pub use error::Error;
#[cfg(feature = "verbs")]
pub use odp::OnDemand;
#[cfg(feature = "verbs")]
pub use rdma::{Access, Rdma, Region};

/// The README's example must compile.
#[cfg(all(doctest, feature = "verbs"))]
#[doc = include_str!("../README.md")]
struct Readme;
