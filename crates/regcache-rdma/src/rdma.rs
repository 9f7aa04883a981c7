//! The registrar of RDMA memory regions.
//!
//! # Safety
//! The kernel checks each range that is registered and pins its pages, so a region never leads to
//! freed memory. The caller of [`Rdma::new`] is responsible for the device's accesses to the pages.
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

/// The accesses that a device may make to registered memory: the flags of `ibv_reg_mr`.
///
/// A cache finds a region by its range alone, so all its regions have the same flags. Memory that
/// needs other flags needs another [`Device`](regcache::Device).
pub use sideway::ibverbs::AccessFlags as Access;

/// The handle of a lease: a registered region and its keys.
///
/// The handle itself holds the keys. So a hit that reads them need not follow two pointers, to
/// sideway's region and from there to the region of verbs.
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

    /// Returns sideway's region. A clone of the `Arc` keeps the region registered after the lease
    /// has ended, even if the memory is unmapped. So drop every clone before the lease ends.
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
    /// Makes a registrar for the queue pairs of `domain`.
    ///
    /// # Safety
    /// The device reads and writes the memory of leased regions without the compiler's knowledge.
    /// This process, and every peer that gets an `rkey`, must use a lease's key only during the
    /// lease, and only for bytes that no code of this process reads or writes at the same time. A
    /// transfer into memory must not write bytes behind a shared reference.
    ///
    /// # Errors
    /// [`Error::Access`] if `access` has remote writes or atomics without [`Access::LocalWrite`],
    /// because verbs refuse that. [`Error::OnDemand`] if `access` has on-demand paging and the
    /// device does not. [`Error::Query`] if the device cannot be queried for on-demand paging.
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

    /// Returns the protection domain of the regions.
    #[must_use]
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    /// Returns the accesses that the device may make to the memory.
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
        // The length of the whole address space does not fit in 64 bits, so it saturates. The
        // kernel refuses the saturated length.
        let length =
            usize::try_from(range.pages().saturating_mul(PAGE_SIZE)).expect("a length has 64 bits");
        // SAFETY: the memory must be valid for the device. The kernel refuses pages that are not
        // mapped, or not writable if the device may write, and pins all others. The caller of `new`
        // promises how the device accesses the memory.
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
            // ENOMEM, EAGAIN: the limit of locked memory, or of the device's regions.
            Some(12 | 11) => Cause::Limit,
            // EFAULT: not all of the range is mapped.
            Some(14) => Cause::NotMapped,
            _ => Cause::Other,
        }
    }
}
