//! A library that uses this crate, and that a program unloads.
#![cfg(all(not(mmun_loom), not(miri), target_env = "gnu"))]
#![expect(unsafe_code, reason = "loads the library")]

use std::ffi::{CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Returns the library, and builds it if necessary: `cargo test --test unload` alone does not build
/// examples.
fn library() -> PathBuf {
    let program = std::env::current_exe().expect("this program has a name");
    let folder = program.ancestors().nth(2);
    let folder = folder.expect("it lies in target/PROFILE/deps");
    let library = folder.join("examples/libunloaded.so");
    // On a machine without Cargo, the library was built beforehand.
    if Path::new(env!("CARGO")).exists() {
        let mut build = Command::new(env!("CARGO"));
        build.args([
            "build",
            "--quiet",
            "--package",
            "srcu",
            "--example",
            "unloaded",
        ]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        build
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .arg("--target-dir")
            .arg(folder.parent().expect("target"));
        assert!(build.status().expect("cargo runs").success());
    }
    library
}

#[test]
fn a_library_with_the_background_thread_stays_loaded() {
    let path = library();
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
