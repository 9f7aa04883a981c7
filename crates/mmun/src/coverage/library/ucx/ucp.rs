//! The registration cache of UCP, from UCX 1.14 on, with an io_uring as the device.
//!
//! The cache is reached through UCP's public interface: `ucp_mem_map` of a context whose only
//! transport is `self`. This transport caches registrations, and needs no network card. `libucp`
//! registers memory by `uct_md_mem_reg_v2`, which `libuct` exports. This file defines that function
//! and its counterparts as well, so they are found first, and a registration becomes a slot of the
//! [`Ring`].
//!
//! `ucp_mem_map` does not tell which registration it has found. The cache holds at most one
//! registration of an address, which is the last one made: UCX drops the older ones before.
//!
//! # Safety
//! The functions and layouts are those of `ucp/api/ucp.h` and `uct/api/v2/uct_v2.h`. They are the
//! same from UCX 1.14 to 1.22. The context is never destroyed.
#![allow(
    unsafe_code,
    reason = "calls libucp, and functions of libuct for it; see the Safety section"
)]

use std::ffi::{CStr, c_char, c_uint, c_void};
use std::ptr::{null, null_mut, with_exposed_provenance_mut, without_provenance_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::super::cache;
use super::super::loader::{load, symbol};
use super::super::ring::Ring;
use crate::coverage::operation::Unavailable;

const OK: i8 = 0;
const IO_ERROR: i8 = -3;

/// `UCP_PARAM_FIELD_FEATURES`.
const FIELD_FEATURES: u64 = 1;
/// `UCP_FEATURE_RMA`.
const FEATURE_RMA: u64 = 1 << 1;
/// `UCP_MEM_MAP_PARAM_FIELD_ADDRESS` and `UCP_MEM_MAP_PARAM_FIELD_LENGTH`.
const FIELD_RANGE: u64 = 0b11;

/// The beginning of `ucp_params_t`; UCX reads only the fields of the mask.
#[repr(C)]
struct Params {
    fields: u64,
    features: u64,
    spare: [u64; 30],
}

/// `ucp_mem_map_params_t`.
#[repr(C)]
struct MapParams {
    fields: u64,
    address: *mut c_void,
    len: usize,
    spare: [u64; 29],
}

/// The beginning of `uct_md_mem_dereg_params_t`.
#[repr(C)]
struct DeregParams {
    fields: u64,
    flags: c_uint,
    memory: *mut c_void,
}

type ReadConfig = unsafe extern "C" fn(*const c_char, *const c_char, *mut *mut c_void) -> i8;
type ModifyConfig = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char) -> i8;
type Init =
    unsafe extern "C" fn(c_uint, c_uint, *const Params, *const c_void, *mut *mut c_void) -> i8;
type Map = unsafe extern "C" fn(*mut c_void, *const MapParams, *mut *mut c_void) -> i8;
type Unmap = unsafe extern "C" fn(*mut c_void, *mut c_void) -> i8;

/// The ring behind `uct_md_mem_reg_v2`.
static RING: OnceLock<&'static Ring> = OnceLock::new();
/// The slot of the last registration.
static LAST: AtomicU32 = AtomicU32::new(u32::MAX);

/// The cache of a context.
pub(super) struct Cache {
    context: *mut c_void,
    map: Map,
    unmap: Unmap,
}

/// Registers a range; `libucp` calls this for a miss.
///
/// # Safety
/// As for the function of `libuct`.
#[unsafe(no_mangle)]
unsafe extern "C" fn uct_md_mem_reg_v2(
    _: *mut c_void,
    address: *mut c_void,
    len: usize,
    _: *const c_void,
    memory: *mut *mut c_void,
) -> i8 {
    let Some(slot) = RING
        .get()
        .and_then(|ring| ring.register(address.addr(), len).ok())
    else {
        return IO_ERROR;
    };
    LAST.store(slot, Relaxed);
    // SAFETY: `libucp` passes room for the handle. A handle is not null, hence the 1.
    unsafe { memory.write(without_provenance_mut(slot as usize + 1)) };
    OK
}

/// Releases a registration, up to UCX 1.15.
#[unsafe(no_mangle)]
extern "C" fn uct_md_mem_dereg(_: *mut c_void, memory: *mut c_void) -> i8 {
    let slot = u32::try_from(memory.addr().wrapping_sub(1));
    if let (Some(ring), Ok(slot)) = (RING.get(), slot) {
        // If this fails, the kernel releases the pages when the ring is closed.
        let _ = ring.deregister(slot);
    }
    OK
}

/// Releases a registration, from UCX 1.16 on.
///
/// # Safety
/// As for the function of `libuct`.
#[unsafe(no_mangle)]
unsafe extern "C" fn uct_md_mem_dereg_v2(md: *mut c_void, params: *const DeregParams) -> i8 {
    // SAFETY: `libucp` passes live parameters, which begin with these fields.
    uct_md_mem_dereg(md, unsafe { (*params).memory })
}

fn answered(call: &str, status: i8) -> Result<(), Unavailable> {
    if status == OK {
        return Ok(());
    }
    Err(Unavailable(format!("UCX's {call} answered {status}")))
}

impl Cache {
    /// A new cache whose registrations are slots of `ring`.
    pub(super) fn open(ring: &'static Ring) -> Result<Cache, Unavailable> {
        let _ = RING.set(ring);
        let ucp = load(c"libucp.so.0")?;
        // SAFETY: this is the function's type in `ucp/api/ucp.h`.
        let read = unsafe {
            std::mem::transmute::<*mut c_void, ReadConfig>(symbol(ucp, c"ucp_config_read")?)
        };
        // SAFETY: this is the function's type in `ucp/api/ucp.h`.
        let modify = unsafe {
            std::mem::transmute::<*mut c_void, ModifyConfig>(symbol(ucp, c"ucp_config_modify")?)
        };
        // SAFETY: this is the function's type in `ucp/api/ucp.h`.
        let init =
            unsafe { std::mem::transmute::<*mut c_void, Init>(symbol(ucp, c"ucp_init_version")?) };
        // SAFETY: this is the function's type in `ucp/api/ucp.h`.
        let map = unsafe { std::mem::transmute::<*mut c_void, Map>(symbol(ucp, c"ucp_mem_map")?) };
        // SAFETY: this is the function's type in `ucp/api/ucp.h`.
        let unmap =
            unsafe { std::mem::transmute::<*mut c_void, Unmap>(symbol(ucp, c"ucp_mem_unmap")?) };
        let mut config = null_mut();
        // SAFETY: `config` has room for the answer; the other arguments may be null.
        let status = unsafe { read(null(), null(), &raw mut config) };
        answered("ucp_config_read", status)?;
        for (name, value) in CONFIG {
            // SAFETY: `ucp_config_read` has made the configuration, and the strings are live.
            let status = unsafe { modify(config, name.as_ptr(), value.as_ptr()) };
            answered("ucp_config_modify", status)?;
        }
        let params = Params {
            fields: FIELD_FEATURES,
            features: FEATURE_RMA,
            spare: [0; 30],
        };
        let mut context = null_mut();
        // SAFETY: the parameters and the configuration are live, and `context` has room for the
        // answer.
        let status = unsafe { init(1, 14, &raw const params, config, &raw mut context) };
        answered("ucp_init", status)?;
        let cache = Cache {
            context,
            map,
            unmap,
        };
        Ok(cache)
    }
}

/// The transport, and the cache, which UCX must not leave out.
const CONFIG: [(&CStr, &CStr); 2] = [(c"TLS", c"self"), (c"RCACHE_ENABLE", c"y")];

impl cache::Cache for Cache {
    fn get(&self, address: usize, len: usize) -> Option<(u32, *mut c_void)> {
        let params = MapParams {
            fields: FIELD_RANGE,
            address: with_exposed_provenance_mut(address),
            len,
            spare: [0; 29],
        };
        let mut memory = null_mut();
        // SAFETY: the context lives, and `memory` has room for the answer. If the kernel cannot pin
        // the range, the device refuses it.
        let status = unsafe { (self.map)(self.context, &raw const params, &raw mut memory) };
        let slot = LAST.load(Relaxed);
        (status == OK && slot != u32::MAX).then_some((slot, memory))
    }

    fn put(&self, registration: *mut c_void) {
        // SAFETY: `registration` is a handle of `get`, and the caller puts it once.
        let _: i8 = unsafe { (self.unmap)(self.context, registration) };
    }
}
