//! RDMA memory regions in a registration cache that cannot serve a stale one.
//!
//! A network card reads and writes registered memory by itself. `ibv_reg_mr` pins the pages, which
//! takes microseconds to milliseconds, so programs cache memory regions. The pin outlives the
//! mapping: after `munmap` the card still reaches the old pages, and after a new `mmap` at the same
//! address it still does. `Rdma` is a [`Registrar`](regcache::Registrar): with it, a
//! [`RegCache`](regcache::RegCache) hands out memory regions and drops them before or as soon as
//! their memory changes.
//!
//! The feature `verbs` has to be on. It is off by default because the build of its dependency
//! `sideway` needs cmake and libclang. `libibverbs` is loaded at run time: a program starts without
//! it and gets an error from the first call.
//!
#![cfg_attr(feature = "verbs", doc = "```no_run")]
#![cfg_attr(not(feature = "verbs"), doc = "```text")]
//! use mmu_source::hook::Hook;
//! use regcache::{Device, Options};
//! use regcache_rdma::{Access, Rdma};
//! use sideway::ibverbs::device::DeviceList;
//!
//! let context = DeviceList::new()?.get(0).ok_or("no RDMA device")?.open()?;
//! // Sound, because only this program is told a key, and it uses each during its lease only.
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
//! # What an invalidation means
//! * **For this process**: the region leaves the look-up before the memory changes (`hook`,
//!   brackets of one's own) or before the next look-up answers (`kernel`), so a new lease is never
//!   of stale memory.
//! * **For a lease that is held**: its region stays registered and leads to the old pages until the
//!   lease ends. Those pages are pinned: nothing is freed under the card.
//!   [`Lease::is_current`](regcache::Lease::is_current) says whether they are still the memory's.
//!   Ask it *after* a transfer that brought data in, before the data is trusted.
//! * **For a peer that holds the `rkey`**: once the region is deregistered, its requests fail with
//!   a remote access error. Until then they reach the old pages, which belong to this process's
//!   past. A region without leases is deregistered by the next miss,
//!   [`reap`](regcache::RegCache::reap), [`flush`](regcache::RegCache::flush) or end of a lease. So
//!   hand an `rkey` out together with a lease that lasts as long as the peer may use it, and ask
//!   `is_current` before the peer's answer is trusted.
//!
//! # What must be deregistered before its memory goes
//! Nothing: the kernel pins the pages and deregisters by handle, whatever is mapped at the address
//! by then. `ibv_dereg_mr` allocates, frees and locks, so it never runs in a callback, which can
//! come in the middle of `free`
//! ([`Registrar::deregisters_in_callbacks`](regcache::Registrar::deregisters_in_callbacks) is
//! false).
//!
//! The exception is rdma-core's own fork support (`ibv_fork_init`, `RDMAV_FORK_SAFE`) on kernels
//! before 5.12. There `ibv_reg_mr` and `ibv_dereg_mr` call `madvise` with `MADV_DONTFORK` and
//! `MADV_DOFORK` for the *addresses* of a region, which after an unmap may belong to other memory.
//! Since Linux 5.12 the kernel copies pinned pages on fork, and rdma-core 35 or later makes neither
//! call. Do not switch the support on below that.
//!
//! # Forks
//! A child has no part in its parent's cache: [`regcache`](regcache#forks) says so with an error.
//! Copy on write after a fork gives the *parent* the pinned page or a copy. Kernels from 5.12 on
//! leave the pinned page with the parent; older ones may not, and only the `kernel` source sees
//! that.
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

/// The README's examples must run.
#[cfg(all(doctest, feature = "verbs"))]
#[doc = include_str!("../README.md")]
struct Readme;
