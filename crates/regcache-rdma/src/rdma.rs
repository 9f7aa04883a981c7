//! The registrar.
//!
//! # Safety
//! The kernel checks each range that is registered and pins its pages: a region can never lead to
//! memory that was freed. What the device does to the pages is the duty of [`Rdma::new`]'s caller.
#![expect(
    unsafe_code,
    reason = "memory is registered by address; see the Safety section"
)]

use crate::error::Error;
use crate::odp::OnDemand;
use mmu_notifier::{PAGE_SIZE, VaRange};
use regcache::{Cause, Registrar};
use sideway::ibverbs::memory_region::{MemoryRegion, RegisterMemoryRegionErrorKind};
use sideway::ibverbs::protection_domain::ProtectionDomain;
use std::io;
use std::sync::Arc;

/// What a device may do with registered memory: the flags of `ibv_reg_mr`.
///
/// Part of a cache's identity, because a region is found by its range alone: memory that needs
/// other flags needs another [`Device`](regcache::Device).
pub use sideway::ibverbs::AccessFlags as Access;

/// What a lease's handle is: a registered region, with its keys beside it.
///
/// The keys stand in the handle itself: a hit that reads them follows no pointer to sideway's
/// region and from there to that of verbs.
#[derive(Debug)]
pub struct Region {
    lkey: u32,
    rkey: u32,
    region: Arc<MemoryRegion>,
}

impl Region {
    /// Returns the key for work requests of this process.
    #[must_use]
    #[inline]
    pub fn lkey(&self) -> u32 {
        self.lkey
    }

    /// Returns the key for work requests of a peer.
    #[must_use]
    #[inline]
    pub fn rkey(&self) -> u32 {
        self.rkey
    }

    /// Returns sideway's region. A clone of the `Arc` keeps it registered beyond the lease, and
    /// beyond its memory: use it within the lease.
    #[must_use]
    pub fn region(&self) -> &Arc<MemoryRegion> {
        &self.region
    }
}

/// Registers memory as RDMA memory regions of one protection domain, all with the same access.
///
/// The handle of a region is a [`Region`], whose keys go into work requests.
#[derive(Debug)]
pub struct Rdma {
    domain: Arc<ProtectionDomain>,
    access: Access,
}

impl Rdma {
    /// A registrar for the queue pairs of `domain`.
    ///
    /// # Safety
    /// The device reads and writes the memory of leased regions behind the compiler's back. Who
    /// uses a key of a lease, in this process or at a peer that was told the `rkey`, must do so
    /// only while the lease lasts, and only on bytes that nothing in this process reads or writes
    /// at the same time. A transfer into the memory needs bytes that may be written: not those
    /// behind a shared reference.
    ///
    /// # Errors
    /// [`Error::Access`] if `access` asks for remote writes or atomics without
    /// [`Access::LocalWrite`], which verbs demand. [`Error::OnDemand`] if it asks for on-demand
    /// paging and the device has none.
    ///
    /// # Source
    /// `ibv_reg_mr(3)`.
    pub unsafe fn new(domain: Arc<ProtectionDomain>, access: Access) -> Result<Self, Error> {
        let remote = Access::RemoteWrite | Access::RemoteAtomic;
        if access.intersects(remote) && !access.contains(Access::LocalWrite) {
            return Err(Error::Access);
        }
        if access.contains(Access::OnDemand) && OnDemand::of_domain(&domain)?.is_none() {
            return Err(Error::OnDemand);
        }
        Ok(Self { domain, access })
    }

    /// The protection domain of the regions.
    #[must_use]
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    /// What the device may do with the memory.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }
}

impl Registrar for Rdma {
    type Handle = Region;
    type Error = Error;

    fn register(&self, range: VaRange) -> Result<Region, Error> {
        let start = usize::try_from(range.start().get()).expect("addresses have 64 bits");
        // A length cannot count all addresses; the kernel refuses one less, too.
        let length =
            usize::try_from(range.pages().saturating_mul(PAGE_SIZE)).expect("a length has 64 bits");
        // SAFETY: memory that is valid for the device: the kernel refuses what is not mapped, or
        // not for writing if the device is to write, and pins the rest. The accesses are the duty
        // of `new`'s caller.
        let registered = unsafe { self.domain.reg_mr(start, length, self.access) };
        let region = registered.map_err(|error| match error.0 {
            RegisterMemoryRegionErrorKind::Ibverbs(source) => Error::Register { source },
            other => Error::Register {
                source: io::Error::other(other),
            },
        })?;
        Ok(Region {
            lkey: region.lkey(),
            rkey: region.rkey(),
            region,
        })
    }

    fn deregister(&self, region: Region) {
        drop(region);
    }

    fn cause(&self, error: &Error) -> Cause {
        let Error::Register { source } = error else {
            return Cause::Other;
        };
        match source.raw_os_error() {
            // ENOMEM, EAGAIN: locked memory, or regions of the device.
            Some(12 | 11) => Cause::Limit,
            // EFAULT.
            Some(14) => Cause::NotMapped,
            _ => Cause::Other,
        }
    }
}
