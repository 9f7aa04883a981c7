//! The registration cache that UCX's InfiniBand transports use, with an io_uring as the device.
//!
//! `libucs` exports the cache. The interface is not public, and has changed several times. The
//! layouts here are those of 1.12 and 1.13, and of 1.22 and later; other versions are refused.
//!
//! # Safety
//! Each function is called with its type in the loaded version. The cache and its context are never
//! destroyed.
#![expect(unsafe_code, reason = "calls libucs; see the Safety section")]

use std::ffi::{c_int, c_void};
use std::ptr::{null_mut, with_exposed_provenance_mut};

use super::cache;
use super::loader::{load, symbol};
use super::ring::Ring;
use crate::coverage::operation::Unavailable;

const VM_UNMAPPED: c_int = 1 << 17;
/// A region: its range, the cache's own fields, and our fields. In every version the cache's part
/// is smaller than here.
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
type Merge = extern "C" fn(*mut Ring, *mut c_void, *mut c_void, *mut Region);
type Dump = extern "C" fn(*mut Ring, *mut c_void, *mut Region, *mut u8, usize);

#[repr(C)]
struct Ops13 {
    reg: MemReg,
    dereg: MemDereg,
    dump: Dump,
}

#[repr(C)]
struct Ops22 {
    reg: MemReg,
    dereg: MemDereg,
    merge: Merge,
    dump: Dump,
}

/// The last fields of both layouts.
#[repr(C)]
struct Rest {
    events: c_int,
    priority: c_int,
    ops: *const c_void,
    context: *mut Ring,
    flags: c_int,
    max_regions: usize,
    max_size: usize,
    max_unreleased: usize,
    /// Room for the fields of newer versions.
    spare: [usize; 8],
}

#[repr(C)]
struct Params13 {
    region: usize,
    alignment: usize,
    max_alignment: usize,
    rest: Rest,
}

#[repr(C)]
struct Params22 {
    region: usize,
    rest: Rest,
}

static OPS13: Ops13 = Ops13 { reg, dereg, dump };
static OPS22: Ops22 = Ops22 {
    reg,
    dereg,
    merge,
    dump,
};

type Create = unsafe extern "C" fn(*const c_void, *const u8, *mut c_void, *mut *mut c_void) -> i8;
type Get13 = unsafe extern "C" fn(
    *mut c_void,
    *mut c_void,
    usize,
    c_int,
    *mut c_void,
    *mut *mut c_void,
) -> i8;
type Get22 = unsafe extern "C" fn(
    *mut c_void,
    *mut c_void,
    usize,
    usize,
    c_int,
    *mut c_void,
    *mut *mut c_void,
) -> i8;
type Put = unsafe extern "C" fn(*mut c_void, *mut c_void);

#[derive(Clone, Copy)]
enum Get {
    Of13(Get13),
    Of22(Get22),
}

/// A cache.
pub(crate) struct Cache {
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

extern "C" fn merge(_: *mut Ring, _: *mut c_void, _: *mut c_void, _: *mut Region) {}

extern "C" fn dump(_: *mut Ring, _: *mut c_void, _: *mut Region, buffer: *mut u8, len: usize) {
    if len != 0 {
        // SAFETY: UCX passes a buffer of `len` bytes, and `len` is not 0.
        unsafe { buffer.write(0) };
    }
}

/// The version of the UCX that the loader finds.
pub(crate) fn version() -> Result<(u32, u32), Unavailable> {
    let get = symbol(load(c"libucp.so.0")?, c"ucp_get_version")?;
    // SAFETY: this is the function's type in `ucp/api/ucp.h`.
    let get = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut u32, *mut u32, *mut u32)>(get)
    };
    let [mut major, mut minor, mut release] = [0; 3];
    // SAFETY: each of the three pointers has room for an integer.
    unsafe { get(&raw mut major, &raw mut minor, &raw mut release) };
    Ok((major, minor))
}

impl Cache {
    /// A new cache whose regions are slots of `ring`.
    pub(crate) fn open(ring: &'static Ring) -> Result<Cache, Unavailable> {
        let (major, minor) = version()?;
        let ucs = load(c"libucs.so.0")?;
        // SAFETY: this is the function's type in the versions that are accepted below.
        let create = unsafe {
            std::mem::transmute::<*mut c_void, Create>(symbol(ucs, c"ucs_rcache_create")?)
        };
        // SAFETY: this is the function's type in the same versions.
        let put = unsafe {
            std::mem::transmute::<*mut c_void, Put>(symbol(ucs, c"ucs_rcache_region_put")?)
        };
        let rest = |ops: *const c_void| Rest {
            events: VM_UNMAPPED,
            priority: 1000,
            ops,
            context: (&raw const *ring).cast_mut(),
            flags: 0,
            max_regions: usize::MAX,
            max_size: usize::MAX,
            max_unreleased: usize::MAX,
            spare: [0; 8],
        };
        let mut cache = null_mut();
        let (get, status) = match (major, minor) {
            (1, 12 | 13) => {
                // UCX's transports call the function by name, so the drop-in may interpose it.
                let get = symbol(libc::RTLD_DEFAULT, c"ucs_rcache_get")?;
                // SAFETY: this is the function's type in these versions.
                let get = Get::Of13(unsafe { std::mem::transmute::<*mut c_void, Get13>(get) });
                let rest = rest((&raw const OPS13).cast());
                let params = Params13 {
                    region: size_of::<Region>(),
                    alignment: 16,
                    max_alignment: 4096,
                    rest,
                };
                // SAFETY: `params` has the layout of these versions, and `cache` has room for the
                // answer.
                let status = unsafe {
                    create(
                        (&raw const params).cast(),
                        c"mmun".as_ptr().cast(),
                        null_mut(),
                        &raw mut cache,
                    )
                };
                (get, status)
            }
            (1, 22..) => {
                // The look-up is compiled into UCX's transports, so no library can interpose it.
                let get = symbol(ucs, c"ucs_rcache_get")?;
                // SAFETY: this is the function's type in these versions.
                let get = Get::Of22(unsafe { std::mem::transmute::<*mut c_void, Get22>(get) });
                let params = Params22 {
                    region: size_of::<Region>(),
                    rest: rest((&raw const OPS22).cast()),
                };
                // SAFETY: `params` has the layout of these versions, and `cache` has room for the
                // answer.
                let status = unsafe {
                    create(
                        (&raw const params).cast(),
                        c"mmun".as_ptr().cast(),
                        null_mut(),
                        &raw mut cache,
                    )
                };
                (get, status)
            }
            _ => {
                return Err(Unavailable(format!(
                    "UCX {major}.{minor}: the layout of its cache is known for 1.12, 1.13 and from 1.22 on"
                )));
            }
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
        let status = match self.get {
            // SAFETY: the cache lives, and there is room for the answer.
            Get::Of13(get) => unsafe {
                get(self.cache, at, len, protection, null_mut(), &raw mut region)
            },
            // SAFETY: as for `Of13`.
            Get::Of22(get) => unsafe {
                get(
                    self.cache,
                    at,
                    len,
                    16,
                    protection,
                    null_mut(),
                    &raw mut region,
                )
            },
        };
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
