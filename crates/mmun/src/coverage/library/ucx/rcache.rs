//! The registration cache of UCX 1.12 and 1.13, which their InfiniBand transports use, with an
//! io_uring as the device. `libucs` exports the cache; the interface is not public.
//!
//! # Safety
//! Each function is called with its type in these versions. The cache and its context are never
//! destroyed.
#![expect(unsafe_code, reason = "calls libucs; see the Safety section")]

use std::ffi::{c_int, c_void};
use std::ptr::{null_mut, with_exposed_provenance_mut};

use super::super::cache;
use super::super::loader::{load, symbol};
use super::super::ring::Ring;
use crate::coverage::operation::Unavailable;

const VM_UNMAPPED: c_int = 1 << 17;
/// A region: its range, the cache's own fields, and our field. The cache's part is smaller than
/// here.
#[repr(C)]
struct Region {
    start: usize,
    end: usize,
    own: [usize; 60],
    slot: u32,
}

const OK: i8 = 0;
const IO_ERROR: i8 = -3;

type MemReg = extern "C" fn(*mut Ring, *mut c_void, *mut c_void, *mut Region, u16) -> i8;
type MemDereg = extern "C" fn(*mut Ring, *mut c_void, *mut Region);
type Dump = extern "C" fn(*mut Ring, *mut c_void, *mut Region, *mut u8, usize);

#[repr(C)]
struct Ops {
    reg: MemReg,
    dereg: MemDereg,
    dump: Dump,
}

/// `ucs_rcache_params_t`.
#[repr(C)]
struct Params {
    region: usize,
    alignment: usize,
    max_alignment: usize,
    events: c_int,
    priority: c_int,
    ops: *const c_void,
    context: *mut Ring,
    flags: c_int,
    max_regions: usize,
    max_size: usize,
    max_unreleased: usize,
}

static OPS: Ops = Ops { reg, dereg, dump };

type Create = unsafe extern "C" fn(*const c_void, *const u8, *mut c_void, *mut *mut c_void) -> i8;
type Get = unsafe extern "C" fn(
    *mut c_void,
    *mut c_void,
    usize,
    c_int,
    *mut c_void,
    *mut *mut c_void,
) -> i8;
type Put = unsafe extern "C" fn(*mut c_void, *mut c_void);

/// A cache.
pub(super) struct Cache {
    cache: *mut c_void,
    get: Get,
    put: Put,
}

extern "C" fn reg(
    ring: *mut Ring,
    _: *mut c_void,
    _: *mut c_void,
    region: *mut Region,
    _: u16,
) -> i8 {
    // SAFETY: UCX passes a live region, which begins with its start and its end in every version.
    let start = unsafe { (*region).start };
    // SAFETY: as for the start.
    let end = unsafe { (*region).end };
    // SAFETY: `ring` is the context that `open` gave to UCX. The ring lives as long as the process,
    // and all references to it are shared.
    match unsafe { &*ring }.register(start, end - start) {
        Ok(slot) => {
            // SAFETY: `open` told UCX the size of a `Region`, so the region has the field.
            unsafe { (*region).slot = slot };
            OK
        }
        Err(_) => IO_ERROR,
    }
}

extern "C" fn dereg(ring: *mut Ring, _: *mut c_void, region: *mut Region) {
    // SAFETY: UCX passes a live region that `reg` has registered, so the slot is written.
    let slot = unsafe { (*region).slot };
    // SAFETY: `ring` is the context of `open`, as in `reg`. If this fails, the kernel releases the
    // pages when the ring is closed.
    let _ = unsafe { &*ring }.deregister(slot);
}

extern "C" fn dump(_: *mut Ring, _: *mut c_void, _: *mut Region, buffer: *mut u8, len: usize) {
    if len != 0 {
        // SAFETY: UCX passes a buffer of `len` bytes, and `len` is not 0.
        unsafe { buffer.write(0) };
    }
}

impl Cache {
    /// A new cache whose regions are slots of `ring`.
    pub(super) fn open(ring: &'static Ring) -> Result<Cache, Unavailable> {
        let ucs = load(c"libucs.so.0")?;
        // SAFETY: this is the function's type in these versions.
        let create = unsafe {
            std::mem::transmute::<*mut c_void, Create>(symbol(ucs, c"ucs_rcache_create")?)
        };
        // SAFETY: this is the function's type in these versions.
        let put = unsafe {
            std::mem::transmute::<*mut c_void, Put>(symbol(ucs, c"ucs_rcache_region_put")?)
        };
        // UCX's transports call the function by name, so the drop-in may interpose it.
        let get = symbol(libc::RTLD_DEFAULT, c"ucs_rcache_get")?;
        // SAFETY: this is the function's type in these versions.
        let get = unsafe { std::mem::transmute::<*mut c_void, Get>(get) };
        let params = Params {
            region: size_of::<Region>(),
            alignment: 16,
            max_alignment: 4096,
            events: VM_UNMAPPED,
            priority: 1000,
            ops: (&raw const OPS).cast(),
            context: (&raw const *ring).cast_mut(),
            flags: 0,
            max_regions: usize::MAX,
            max_size: usize::MAX,
            max_unreleased: usize::MAX,
        };
        let mut cache = null_mut();
        // SAFETY: `params` has the layout of these versions, and `cache` has room for the answer.
        let status = unsafe {
            create(
                (&raw const params).cast(),
                c"mmun".as_ptr().cast(),
                null_mut(),
                &raw mut cache,
            )
        };
        if status != OK || cache.is_null() {
            return Err(Unavailable(format!("ucs_rcache_create answered {status}")));
        }
        Ok(Cache { cache, get, put })
    }
}

impl cache::Cache for Cache {
    fn get(&self, address: usize, len: usize) -> Option<(u32, *mut c_void)> {
        let mut region = null_mut();
        let at = with_exposed_provenance_mut(address);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the cache lives, and there is room for the answer.
        let status =
            unsafe { (self.get)(self.cache, at, len, protection, null_mut(), &raw mut region) };
        if status != OK || region.is_null() {
            return None;
        }
        // SAFETY: the region is live, and `reg` has written the slot of every region that a look-up
        // returns.
        let slot = unsafe { (*region.cast::<Region>()).slot };
        Some((slot, region))
    }

    fn put(&self, registration: *mut c_void) {
        // SAFETY: `registration` is a region of `get`, and the caller puts it once.
        unsafe { (self.put)(self.cache, registration) };
    }
}
