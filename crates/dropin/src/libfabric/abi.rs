//! The structures that libfabric and a memory monitor share, from libfabric's public headers
//! `rdma/fabric.h` and `rdma/fi_ext.h`.
//!
//! The layouts are the same from 1.13, the first version that imports a monitor, to 2.x.

use std::ffi::{c_char, c_int, c_void};

/// Version 1.13 of the interface, which the import requests.
pub(crate) const VERSION: u32 = 1 << 16 | 13;

/// The class of a memory monitor.
pub(crate) const CLASS_MEM_MONITOR: usize = 23;

/// `struct fid`, with which every object begins.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Fid {
    pub(crate) class: usize,
    pub(crate) context: *mut c_void,
    pub(crate) ops: *mut c_void,
}

/// The beginning of `struct fi_ops`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Ops {
    pub(crate) size: usize,
    pub(crate) close: Close,
    pub(crate) bind: Bind,
}

/// The beginning of `struct fi_fabric_attr`.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct FabricAttr {
    pub(crate) fabric: *mut c_void,
    pub(crate) name: *const c_char,
    pub(crate) provider: *const c_char,
}

pub(crate) type Close = unsafe extern "C" fn(*mut Fid) -> c_int;
pub(crate) type Bind = unsafe extern "C" fn(*mut Fid, *mut Fid, u64) -> c_int;

/// `fi_open`.
pub(crate) type FiOpen = unsafe extern "C" fn(
    u32,
    *const c_char,
    *mut c_void,
    usize,
    u64,
    *mut *mut Fid,
    *mut c_void,
) -> c_int;

/// `struct fid_mem_monitor`.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct MemMonitor {
    pub(crate) fid: Fid,
    pub(crate) export_ops: *const MonitorOps,
    pub(crate) import_ops: *const NotifyOps,
}

/// `struct fi_ops_mem_monitor`: the functions that libfabric calls.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct MonitorOps {
    pub(crate) size: usize,
    pub(crate) start: extern "C" fn(*mut MemMonitor) -> c_int,
    pub(crate) stop: extern "C" fn(*mut MemMonitor),
    pub(crate) subscribe: extern "C" fn(*mut MemMonitor, *const c_void, usize) -> c_int,
    pub(crate) unsubscribe: extern "C" fn(*mut MemMonitor, *const c_void, usize),
    pub(crate) valid: extern "C" fn(*mut MemMonitor, *const c_void, usize) -> bool,
}

/// `struct fi_ops_mem_notify`: the functions that a monitor calls.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct NotifyOps {
    pub(crate) size: usize,
    pub(crate) notify: unsafe extern "C" fn(*mut MemMonitor, *const c_void, usize),
}

#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<Fid>() == 24);
    assert!(size_of::<MemMonitor>() == 40);
    assert!(size_of::<MonitorOps>() == 48);
    assert!(size_of::<NotifyOps>() == 16);
};
