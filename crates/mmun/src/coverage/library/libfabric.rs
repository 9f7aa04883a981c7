//! libfabric's registration cache, which its providers for network cards use. The cache is reached
//! through libfabric's public interface: a domain of the verbs provider, over a device of our own
//! ([`verbs`]).
//!
//! # Safety
//! Objects begin with the fields that the public headers `rdma/fabric.h` and `rdma/fi_domain.h`
//! define. These fields are the same in all versions from 1.13 on, the first that can import a
//! monitor. Only registrations are ever closed.
#![expect(unsafe_code, reason = "calls libfabric; see the Safety section")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{null, null_mut, with_exposed_provenance_mut};

use super::cache;
use super::loader::{load, symbol};
use super::ring::Ring;
use super::verbs;
use crate::coverage::operation::Unavailable;

/// The version of the interface: 1.13.
const VERSION: u32 = 1 << 16 | 13;
const EP_DGRAM: c_int = 2;
/// `FI_MR_LOCAL`, `FI_MR_VIRT_ADDR`, `FI_MR_ALLOCATED`, `FI_MR_PROV_KEY`.
const MR_MODE: c_int = 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6;
/// Send and receive.
const ACCESS: u64 = 1 << 11 | 1 << 10;

/// `struct fi_info`.
#[repr(C)]
struct Info {
    next: *mut Info,
    caps: u64,
    mode: u64,
    address_format: u32,
    source_len: usize,
    destination_len: usize,
    addresses: [*mut c_void; 3],
    tx: *mut c_void,
    rx: *mut c_void,
    /// Begins with the type of an endpoint.
    endpoint: *mut c_int,
    domain: *mut DomainAttr,
    fabric: *mut FabricAttr,
}

/// The beginning of `struct fi_domain_attr`.
#[repr(C)]
struct DomainAttr {
    domain: *mut c_void,
    name: *mut c_char,
    models: [c_int; 5],
    mr_mode: c_int,
}

/// The beginning of `struct fi_fabric_attr`.
#[repr(C)]
struct FabricAttr {
    fabric: *mut c_void,
    name: *mut c_char,
    provider: *mut c_char,
}

#[repr(C)]
struct Fid {
    class: usize,
    context: *mut c_void,
    ops: *const FidOps,
}

#[repr(C)]
struct FidOps {
    size: usize,
    close: unsafe extern "C" fn(*mut Fid) -> c_int,
}

#[repr(C)]
struct Fabric {
    fid: Fid,
    ops: *const FabricOps,
}

type OpenDomain =
    unsafe extern "C" fn(*mut Fabric, *mut Info, *mut *mut Domain, *mut c_void) -> c_int;

#[repr(C)]
struct FabricOps {
    size: usize,
    domain: OpenDomain,
}

#[repr(C)]
struct Domain {
    fid: Fid,
    ops: *const c_void,
    mr: *const MrOps,
}

type Register = unsafe extern "C" fn(
    *mut Domain,
    *const c_void,
    usize,
    u64,
    u64,
    u64,
    u64,
    *mut *mut Mr,
    *mut c_void,
) -> c_int;

#[repr(C)]
struct MrOps {
    size: usize,
    register: Register,
}

#[repr(C)]
struct Mr {
    fid: Fid,
    descriptor: *mut c_void,
    key: u64,
}

type GetInfo = unsafe extern "C" fn(
    u32,
    *const c_char,
    *const c_char,
    u64,
    *const Info,
    *mut *mut Info,
) -> c_int;
type OpenFabric = unsafe extern "C" fn(*mut FabricAttr, *mut *mut Fabric, *mut c_void) -> c_int;
type DuplicateInfo = unsafe extern "C" fn(*const Info) -> *mut Info;

/// The cache of a domain.
pub(super) struct Cache {
    domain: *mut Domain,
    register: Register,
}

/// The request to the provider: a domain for datagrams, which needs no address.
fn hints(duplicate: DuplicateInfo) -> Result<*mut Info, Unavailable> {
    // SAFETY: with a null pointer `fi_dupinfo` reads nothing and returns an empty `fi_info`.
    let hints = unsafe { duplicate(null()) };
    if hints.is_null() {
        return Err("fi_dupinfo: out of memory".into());
    }
    // SAFETY: the pointer is not null, `fi_dupinfo` has initialised the object behind it, and no
    // other code has the pointer.
    let parts = unsafe { &mut *hints };
    parts.mode = u64::MAX;
    // SAFETY: `fi_dupinfo` has allocated the endpoint's attributes, which begin with the type.
    unsafe { parts.endpoint.write(EP_DGRAM) };
    // SAFETY: `fi_dupinfo` has allocated the domain's attributes.
    unsafe { (*parts.domain).mr_mode = MR_MODE };
    // SAFETY: `strdup` reads a live string. libfabric frees the copy.
    let provider = unsafe { libc::strdup(c"verbs".as_ptr()) };
    // SAFETY: `fi_dupinfo` has allocated the fabric's attributes.
    unsafe { (*parts.fabric).provider = provider };
    Ok(hints)
}

fn answered(call: &str, status: c_int) -> Result<(), Unavailable> {
    if status == 0 {
        return Ok(());
    }
    let reason = std::io::Error::from_raw_os_error(-status);
    Err(Unavailable(format!("libfabric's {call}: {reason}")))
}

impl Cache {
    /// A new cache whose registrations are slots of `ring`.
    pub(super) fn open(ring: &'static Ring) -> Result<Cache, Unavailable> {
        verbs::show(ring);
        for (name, value) in ENVIRONMENT {
            // SAFETY: live strings. No thread reads the environment meanwhile: this is a child of
            // `coverage`, and the thread that an operation may have started waits.
            unsafe { libc::setenv(name.as_ptr(), value.as_ptr(), 1) };
        }
        let own = load(c"libfabric.so.1")?;
        // Search the global scope, because the drop-in may interpose these functions.
        let any = libc::RTLD_DEFAULT;
        // SAFETY: this is the function's type in `rdma/fabric.h`.
        let get_info =
            unsafe { std::mem::transmute::<*mut c_void, GetInfo>(symbol(any, c"fi_getinfo")?) };
        // SAFETY: this is the function's type in `rdma/fabric.h`.
        let open =
            unsafe { std::mem::transmute::<*mut c_void, OpenFabric>(symbol(any, c"fi_fabric")?) };
        // SAFETY: this is the function's type in `rdma/fabric.h`.
        let duplicate = unsafe {
            std::mem::transmute::<*mut c_void, DuplicateInfo>(symbol(own, c"fi_dupinfo")?)
        };
        let hints = hints(duplicate)?;
        let mut info: *mut Info = null_mut();
        // SAFETY: the hints are live, and `info` has room for the answer.
        let status = unsafe { get_info(VERSION, null(), null(), 0, hints, &raw mut info) };
        answered("verbs provider", status)?;
        let mut fabric: *mut Fabric = null_mut();
        // SAFETY: `fi_getinfo` has succeeded, so `info` points to an initialised `fi_info`.
        let attributes = unsafe { (*info).fabric };
        // SAFETY: `attributes` belong to the live `info`, and `fabric` has room for the answer.
        let status = unsafe { open(attributes, &raw mut fabric, null_mut()) };
        answered("fi_fabric", status)?;
        // SAFETY: `fi_fabric` has succeeded, so `fabric` is open.
        let operations = unsafe { (*fabric).ops };
        // SAFETY: an open fabric has a table of operations.
        let domain_of = unsafe { (*operations).domain };
        let mut domain: *mut Domain = null_mut();
        // SAFETY: `fabric` is open, `info` describes it, and `domain` has room for the answer.
        let status = unsafe { domain_of(fabric, info, &raw mut domain, null_mut()) };
        answered("fi_domain", status)?;
        // SAFETY: `fi_domain` has succeeded, so `domain` is open.
        let registrations = unsafe { (*domain).mr };
        // SAFETY: an open domain has a table of operations for registrations.
        let register = unsafe { (*registrations).register };
        Ok(Cache { domain, register })
    }
}

/// The provider must not start its name server, and no other provider is needed.
const ENVIRONMENT: [(&CStr, &CStr); 2] = [
    (c"FI_VERBS_DGRAM_USE_NAME_SERVER", c"0"),
    (c"FI_PROVIDER", c"verbs"),
];

impl cache::Cache for Cache {
    fn get(&self, address: usize, len: usize) -> Option<(u32, *mut c_void)> {
        let mut mr: *mut Mr = null_mut();
        // SAFETY: the domain stays open, and `mr` has room for the answer. If the kernel cannot pin
        // the range, the device refuses it.
        let status = unsafe {
            (self.register)(
                self.domain,
                with_exposed_provenance_mut::<c_void>(address),
                len,
                ACCESS,
                0,
                0,
                0,
                &raw mut mr,
                null_mut(),
            )
        };
        if status != 0 || mr.is_null() {
            return None;
        }
        // SAFETY: the registration is open. The provider's keys are those of our device.
        let slot = unsafe { (*mr).key };
        Some((u32::try_from(slot).ok()?, mr.cast()))
    }

    fn put(&self, registration: *mut c_void) {
        let fid = registration.cast::<Fid>();
        // SAFETY: `registration` is an open registration of `get`, which begins with a `fid`.
        let operations = unsafe { (*fid).ops };
        // SAFETY: an open object has a table of operations.
        let close = unsafe { (*operations).close };
        // SAFETY: the registration is open, and the caller puts it once.
        unsafe { close(fid) };
    }
}
