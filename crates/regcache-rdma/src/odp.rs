//! On-demand paging: the device itself faults pages in. When a page is unmapped, the kernel's own
//! MMU notifiers call the device's driver.
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
    /// Queries a device. Returns `None` if the device has no on-demand paging.
    ///
    /// # Errors
    /// [`Error::Query`].
    ///
    /// # Source
    /// `ibv_query_device_ex(3)`.
    pub fn of(context: &DeviceContext) -> Result<Option<Self>, Error> {
        // SAFETY: the pointer must not outlive its owner. It is used only in this function, whose
        // caller keeps the reference `context`.
        let context = unsafe { context.context() };
        // SAFETY: the context is open as long as its owner, `context`, lives.
        unsafe { query(context.as_ptr()) }
    }

    pub(crate) fn of_domain(domain: &ProtectionDomain) -> Result<Option<Self>, Error> {
        // SAFETY: the pointer must not outlive its owner. It is used only in this function, whose
        // caller keeps the reference `domain`.
        let domain = unsafe { domain.pd() };
        // SAFETY: a reference needs a live domain, and the owner of the domain lives.
        let context = unsafe { domain.as_ref() }.context;
        // SAFETY: a live domain keeps its context open.
        unsafe { query(context) }
    }
}

/// Queries the device of a context.
///
/// # Safety
/// The context must be open.
unsafe fn query(context: *mut rdma_mummy_sys::ibv_context) -> Result<Option<OnDemand>, Error> {
    // The bits of `enum ibv_odp_general_caps` and `enum ibv_odp_transport_cap_bits`.
    const SUPPORT: u64 = 1;
    const IMPLICIT: u64 = 2;
    let mut attributes = MaybeUninit::<ibv_device_attr_ex>::zeroed();
    // SAFETY: the function needs an open context, which the caller promises, and room for the
    // answer. A null input is allowed.
    let failed = unsafe { ibv_query_device_ex(context, null(), attributes.as_mut_ptr()) };
    if failed != 0 {
        return Err(Error::Query {
            source: io::Error::from_raw_os_error(failed),
        });
    }
    // SAFETY: the value was zeroed, zeroes are a valid value of the struct, and the function has
    // filled the struct in.
    let paging = unsafe { attributes.assume_init() }.odp_caps;
    let reliable = paging.per_transport_caps.rc_odp_caps;
    Ok((paging.general_caps & SUPPORT != 0).then_some(OnDemand {
        implicit: paging.general_caps & IMPLICIT != 0,
        send: reliable & 1 != 0,
        write: reliable & 4 != 0,
        read: reliable & 8 != 0,
    }))
}
