//! UCX's registration cache.
//!
//! | version | cache | look-up |
//! | --- | --- | --- |
//! | 1.12, 1.13 | the InfiniBand transports' ([`rcache`]) | `ucs_rcache_get`, which `libucs` exports |
//! | 1.14 and later | UCP's, for all transports ([`ucp`]) | compiled into `libucp` |
#![expect(unsafe_code, reason = "one function of libucp, and the environment")]

mod rcache;
mod ucp;

use std::ffi::c_void;

use super::cache::Cache;
use super::loader::{load, symbol};
use super::ring::Ring;
use crate::coverage::operation::Unavailable;

/// The newest version with which this file was tested.
const NEWEST: (u32, u32) = (1, 22);

/// A new cache whose registrations are slots of `ring`, and a note for the user if the version is
/// newer than the tested ones.
pub(super) fn open(ring: &'static Ring) -> Result<(Box<dyn Cache>, Option<String>), Unavailable> {
    // UCX reads its environment as it is loaded, and writes its log to standard output, where this
    // process's report goes.
    // SAFETY: live strings. No thread reads the environment meanwhile: this is a child of
    // `coverage`, and the thread that an operation may have started waits.
    unsafe { libc::setenv(c"UCX_LOG_LEVEL".as_ptr(), c"fatal".as_ptr(), 1) };
    let version = version()?;
    let (major, minor) = version;
    let cache: Box<dyn Cache> = match version {
        (1, 14..) | (2.., _) => Box::new(ucp::Cache::open(ring)?),
        (1, 12 | 13) => Box::new(rcache::Cache::open(ring)?),
        _ => {
            return Err(Unavailable(format!(
                "UCX {major}.{minor} is older than 1.12, the oldest version that can be tested: install a newer UCX, or name its folder in LD_LIBRARY_PATH"
            )));
        }
    };
    let note = (version > NEWEST).then(|| {
        let (newest, of) = NEWEST;
        format!("UCX {major}.{minor} is newer than {newest}.{of}, the newest tested version")
    });
    Ok((cache, note))
}

/// The version of the UCX that the loader finds.
fn version() -> Result<(u32, u32), Unavailable> {
    type GetVersion = unsafe extern "C" fn(*mut u32, *mut u32, *mut u32);
    let get = symbol(load(c"libucp.so.0")?, c"ucp_get_version")?;
    // SAFETY: this is the function's type in `ucp/api/ucp.h`.
    let get = unsafe { std::mem::transmute::<*mut c_void, GetVersion>(get) };
    let [mut major, mut minor, mut release] = [0; 3];
    // SAFETY: each of the three pointers has room for an integer.
    unsafe { get(&raw mut major, &raw mut minor, &raw mut release) };
    Ok((major, minor))
}
