//! A library that uses this crate, and that a program unloads.
#![cfg(all(not(mmun_loom), not(miri), target_env = "gnu"))]
#![expect(unsafe_code, reason = "loads the library")]

use std::ffi::{CString, c_void};
use std::os::unix::ffi::OsStrExt;

#[test]
fn a_library_with_the_background_thread_stays_loaded() {
    let path = testkit::example_library("srcu", "unloaded", false);
    let name = CString::new(path.as_os_str().as_bytes()).expect("a path has no zero byte");
    let is_loaded = || {
        std::fs::read_to_string("/proc/self/maps")
            .expect("proc is there")
            .contains("libunloaded.so")
    };
    for _ in 0..2 {
        // SAFETY: the library's initialisers may run on any thread.
        let handle: *mut c_void = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null(), "{}", path.display());
        // SAFETY: the handle is open, and the name is a C string.
        let run = unsafe { libc::dlsym(handle, c"run".as_ptr()) };
        assert!(!run.is_null());
        // SAFETY: the library defines the function with this type.
        let run: extern "C" fn() = unsafe { std::mem::transmute(run) };
        run();
        // SAFETY: the handle is closed once.
        unsafe { libc::dlclose(handle) };
        assert!(is_loaded(), "its background thread has no code");
    }
}
