//! A verbs device that only registers memory, for libfabric's verbs provider.
//!
//! libfabric does not export its registration cache; only its providers for network cards use it.
//! The verbs provider is one of them, and calls `libibverbs` and `librdmacm` by name. The functions
//! here interpose those libraries. They show one device, in which a registration is a slot of the
//! [`Ring`]. They answer every query that the provider makes before it opens a domain, and make no
//! connections.
//!
//! The layouts are those of `infiniband/verbs.h`, which have never changed since their publication.
//!
//! # Safety
//! libfabric passes objects that these functions have returned, or room for the result that the
//! header defines. Returned objects are never freed, except regions.
#![allow(
    unsafe_code,
    reason = "functions of libibverbs for libfabric; see the Safety section"
)]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;

use super::ring::Ring;

/// The ring behind the device. Without a ring there is no device.
static RING: OnceLock<&'static Ring> = OnceLock::new();

/// Shows the device from now on.
pub(super) fn show(ring: &'static Ring) {
    let _ = RING.set(ring);
}

/// The name of the device.
const NAME: &[u8] = b"mmun0";

#[repr(C)]
struct Device {
    ops: [usize; 2],
    /// A channel adapter.
    node: c_int,
    /// InfiniBand.
    transport: c_int,
    name: [u8; 64],
    dev_name: [u8; 64],
    paths: [[u8; 256]; 2],
}

/// A context, and every object that begins with a context: libfabric reads no other field.
#[repr(C)]
struct Object {
    first: *const c_void,
    rest: [usize; 127],
}

/// A pointer that is only read.
struct Constant<T>(T);

// SAFETY: no code of this file writes the value. The library gets mutable pointers but writes to
// none of these fields; a write would fault, because the memory is read-only.
unsafe impl<T> Sync for Constant<T> {}

static DEVICE: Device = Device {
    ops: [0; 2],
    node: 1,
    transport: 0,
    name: name(),
    dev_name: name(),
    paths: [[0; 256]; 2],
};
static DEVICES: Constant<[*const Device; 2]> = Constant([&raw const DEVICE, std::ptr::null()]);
static CONTEXT: Constant<Object> = Constant(Object {
    first: (&raw const DEVICE).cast(),
    rest: [0; 127],
});
static CONTEXTS: Constant<[*const Object; 2]> = Constant([&raw const CONTEXT.0, std::ptr::null()]);
/// A protection domain, a completion queue, a queue pair.
static OBJECT: Constant<Object> = Constant(Object {
    first: (&raw const CONTEXT.0).cast(),
    rest: [0; 127],
});

const fn name() -> [u8; 64] {
    let mut name = [0; 64];
    let mut at = 0;
    while at < NAME.len() {
        name[at] = NAME[at];
        at += 1;
    }
    name
}

/// `struct ibv_device_attr`.
#[repr(C)]
struct DeviceAttr {
    firmware: [u8; 64],
    guids: [u64; 2],
    max_mr_size: u64,
    page_size_cap: u64,
    vendor: [u32; 3],
    /// From `max_qp` to `max_srq_sge`.
    limits: [c_int; 29],
    max_pkeys: u16,
    ack_delay: u8,
    ports: u8,
}

/// The beginning of `struct ibv_port_attr`, which is what `ibv_query_port` fills in.
#[repr(C)]
struct PortAttr {
    state: c_int,
    mtus: [c_int; 2],
    gids: c_int,
    capabilities: u32,
    max_message: u32,
    counters: [u32; 2],
    pkeys: u16,
    lids: [u16; 2],
    lmc: u8,
    lanes: u8,
    service: u8,
    timeout: u8,
    init: u8,
    width: u8,
    speed: u8,
    physical: u8,
    link: u8,
}

/// `struct ibv_mr`.
#[repr(C)]
struct Mr {
    context: *const Object,
    pd: *mut c_void,
    address: *mut c_void,
    len: usize,
    handle: u32,
    lkey: u32,
    rkey: u32,
}

/// The maximum size of inline data.
const INLINE: u32 = 64;

/// Sets this thread's `errno`.
fn fail(number: c_int) {
    // SAFETY: the function has no precondition.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the pointer is to this thread's own `errno`.
    unsafe { place.write(number) };
}

#[unsafe(no_mangle)]
extern "C" fn ibv_get_device_list(count: *mut c_int) -> *const *const Device {
    if RING.get().is_none() {
        fail(libc::ENOSYS);
        return std::ptr::null();
    }
    if !count.is_null() {
        // SAFETY: the pointer is not null, so it has room for the answer (see # Safety).
        unsafe { count.write(1) };
    }
    DEVICES.0.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ibv_free_device_list(_: *const *const Device) {}

#[unsafe(no_mangle)]
extern "C" fn ibv_get_device_name(_: *const Device) -> *const c_char {
    DEVICE.name.as_ptr().cast()
}

#[unsafe(no_mangle)]
extern "C" fn ibv_open_device(_: *const Device) -> *const Object {
    &raw const CONTEXT.0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_close_device(_: *const Object) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn rdma_get_devices(count: *mut c_int) -> *const *const Object {
    if ibv_get_device_list(count).is_null() {
        return std::ptr::null();
    }
    CONTEXTS.0.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn rdma_free_devices(_: *const *const Object) {}

/// Fails: the device has no addresses and makes no connections.
#[unsafe(no_mangle)]
extern "C" fn rdma_create_id(_: *mut c_void, _: *mut c_void, _: *mut c_void, _: c_int) -> c_int {
    fail(libc::ENODEV);
    -1
}

#[unsafe(no_mangle)]
extern "C" fn ibv_query_device(_: *const Object, attr: *mut DeviceAttr) -> c_int {
    const CAPABILITIES: usize = 2;
    const MAX_SGE: usize = 3;
    const MAX_SRQ_SGE: usize = 28;
    let mut limits = [256; 29];
    limits[CAPABILITIES] = 0;
    (limits[MAX_SGE], limits[MAX_SRQ_SGE]) = (4, 4);
    let answer = DeviceAttr {
        firmware: [0; 64],
        guids: [1; 2],
        max_mr_size: 1 << 40,
        page_size_cap: 4096,
        vendor: [0; 3],
        limits,
        max_pkeys: 1,
        ack_delay: 0,
        ports: 1,
    };
    // SAFETY: `attr` has room for the answer (see # Safety).
    unsafe { attr.write(answer) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_query_port(_: *const Object, _: u8, attr: *mut PortAttr) -> c_int {
    let answer = PortAttr {
        state: 4,     // Active.
        mtus: [5, 5], // 4,096 bytes.
        gids: 0,
        capabilities: 0,
        max_message: 1 << 30,
        counters: [0; 2],
        pkeys: 1,
        lids: [1; 2],
        lmc: 0,
        lanes: 1,
        service: 0,
        timeout: 0,
        init: 0,
        width: 2,
        speed: 4,
        physical: 5,
        link: 1, // InfiniBand.
    };
    // SAFETY: `attr` has room for the answer (see # Safety).
    unsafe { attr.write(answer) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_query_gid(_: *const Object, _: u8, _: c_int, gid: *mut [u8; 16]) -> c_int {
    let mut answer = [0; 16];
    (answer[0], answer[1], answer[15]) = (0xfe, 0x80, 1);
    // SAFETY: `gid` has room for the answer (see # Safety).
    unsafe { gid.write(answer) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_query_pkey(_: *const Object, _: u8, _: c_int, pkey: *mut u16) -> c_int {
    // SAFETY: `pkey` has room for the answer (see # Safety).
    unsafe { pkey.write(0xffff) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_alloc_pd(_: *const Object) -> *const Object {
    &raw const OBJECT.0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_dealloc_pd(_: *const Object) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_create_cq(
    _: *const Object,
    _: c_int,
    _: *mut c_void,
    _: *mut c_void,
    _: c_int,
) -> *const Object {
    &raw const OBJECT.0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_destroy_cq(_: *const Object) -> c_int {
    0
}

/// Reads the first 13 words of the attributes; the last of these words is `max_inline_data`.
#[unsafe(no_mangle)]
extern "C" fn ibv_create_qp(_: *const Object, attr: *const [u32; 13]) -> *const Object {
    // SAFETY: libfabric passes live attributes, which are longer than 13 words.
    let inline = unsafe { (*attr)[12] };
    if inline > INLINE {
        return std::ptr::null();
    }
    &raw const OBJECT.0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_destroy_qp(_: *const Object) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_reg_mr(pd: *mut c_void, address: *mut c_void, len: usize, _: c_int) -> *mut Mr {
    let registered = match RING.get() {
        Some(ring) => ring.register(address.addr(), len),
        None => Err(std::io::Error::from_raw_os_error(libc::ENODEV)),
    };
    match registered {
        Ok(slot) => Box::into_raw(Box::new(Mr {
            context: &raw const CONTEXT.0,
            pd,
            address,
            len,
            handle: slot,
            lkey: slot,
            rkey: slot,
        })),
        Err(error) => {
            let number = error.raw_os_error().unwrap_or(libc::ENOMEM);
            fail(number);
            null_mut()
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn ibv_reg_mr_iova2(
    pd: *mut c_void,
    address: *mut c_void,
    len: usize,
    _: u64,
    access: c_uint,
) -> *mut Mr {
    ibv_reg_mr(pd, address, len, access as c_int)
}

#[unsafe(no_mangle)]
extern "C" fn ibv_dereg_mr(mr: *mut Mr) -> c_int {
    // SAFETY: `mr` is from `ibv_reg_mr`, and libfabric deregisters it once.
    let mr = unsafe { Box::from_raw(mr) };
    if let Some(ring) = RING.get() {
        // The kernel releases the pages in any case when the ring is closed.
        let _ = ring.deregister(mr.handle);
    }
    0
}

/// Says that the device is not an EFA device of Amazon.
#[unsafe(no_mangle)]
extern "C" fn efadv_query_device(_: *const Object, _: *mut c_void, _: u32) -> c_int {
    libc::EOPNOTSUPP
}
