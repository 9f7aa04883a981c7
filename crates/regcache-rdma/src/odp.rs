//! On-demand paging: the device itself faults pages in. The kernel's own MMU notifiers tell the
//! device's driver when a page is unmapped.
//!
//! # Safety
//! Every query uses the context that the device's protection domain keeps open.
#![expect(
    unsafe_code,
    reason = "sideway does not report on-demand paging; see the Safety section"
)]

use crate::error::Error;
use rdma_mummy_sys::{ibv_device_attr_ex, ibv_query_device_ex};
use sideway::ibverbs::device_context::DeviceContext;
use sideway::ibverbs::protection_domain::ProtectionDomain;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::null;

/// The operations that a device with on-demand paging can do on memory that is not pinned.
///
/// Such a device needs no cache to stay correct: register with
/// [`Access::OnDemand`](crate::Access::OnDemand), and the kernel itself invalidates the device's
/// translations. The price is a page fault of the device at the first use of each page. The
/// software device rxe has on-demand paging since Linux 6.18; mlx5 has it in hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct OnDemand {
    /// Whether a whole address space can be one region.
    pub implicit: bool,
    /// Reliable connections: whether `SEND` may use such memory.
    pub send: bool,
    /// Reliable connections: whether `WRITE` may use such memory.
    pub write: bool,
    /// Reliable connections: whether `READ` may use such memory.
    pub read: bool,
}

impl OnDemand {
    /// Queries a device. Returns `None` if it has no on-demand paging.
    ///
    /// # Errors
    /// [`Error::Query`].
    ///
    /// # Source
    /// `ibv_query_device_ex(3)`.
    pub fn of(context: &DeviceContext) -> Result<Option<Self>, Error> {
        // SAFETY: the context is open as long as the reference to its owner lives.
        let context = unsafe { context.context() };
        // SAFETY: as above.
        unsafe { query(context.as_ptr()) }
    }

    pub(crate) fn of_domain(domain: &ProtectionDomain) -> Result<Option<Self>, Error> {
        // SAFETY: the domain is live as long as the reference to its owner lives.
        let domain = unsafe { domain.pd() };
        // SAFETY: a live domain points to the context that it belongs to, and keeps that open.
        let context = unsafe { domain.as_ref() }.context;
        // SAFETY: as above.
        unsafe { query(context) }
    }
}

/// # Safety
/// The context must be open.
unsafe fn query(context: *mut rdma_mummy_sys::ibv_context) -> Result<Option<OnDemand>, Error> {
    // The bits of `enum ibv_odp_general_caps` and `enum ibv_odp_transport_cap_bits`.
    const SUPPORT: u64 = 1;
    const IMPLICIT: u64 = 2;
    let mut attributes = MaybeUninit::<ibv_device_attr_ex>::zeroed();
    // SAFETY: an open context, no input, and room for the answer.
    let failed = unsafe { ibv_query_device_ex(context, null(), attributes.as_mut_ptr()) };
    if failed != 0 {
        return Err(Error::Query {
            source: io::Error::from_raw_os_error(failed),
        });
    }
    // SAFETY: zeros are a value of it, and the call has filled it in.
    let paging = unsafe { attributes.assume_init() }.odp_caps;
    let reliable = paging.per_transport_caps.rc_odp_caps;
    Ok((paging.general_caps & SUPPORT != 0).then_some(OnDemand {
        implicit: paging.general_caps & IMPLICIT != 0,
        send: reliable & 1 != 0,
        write: reliable & 4 != 0,
        read: reliable & 8 != 0,
    }))
}
