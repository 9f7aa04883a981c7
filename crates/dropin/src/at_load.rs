//! What the library does when it is loaded.
//!
//! It registers handlers for forks ([`fork`](crate::ucx::fork)), and registers the process for
//! `membarrier` if it has one thread.
//!
//! The sources need two kinds of `membarrier`: `hook` to replace code, the core for its read
//! sections. The kernel registers a process with one thread at once. If there are more threads, it
//! waits for a grace period, 12 to 15 ms for each kind. UCX starts a thread before its first cache
//! subscribes, and so does Open MPI. So this library registers both kinds when it is loaded.

#![allow(unsafe_code, reason = "system calls that take integers")]

use std::ffi::c_char;

/// The dynamic loader calls this when it has loaded the library.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = register;

/// In a process with threads, as after a `dlopen`, the sources register when they start.
extern "C" fn register() {
    crate::ucx::fork::register();
    if !is_single_threaded() {
        return;
    }
    // The result does not matter: the sources register again, which returns at once if the process
    // is registered, and they also work if the kernel refuses.
    for kind in [
        libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED,
        libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE,
    ] {
        // SAFETY: `membarrier` takes three integers and touches no memory of this program.
        unsafe { libc::syscall(libc::SYS_membarrier, kind, 0, 0) };
    }
}

/// Tells whether glibc knows that this process has one thread. Always false before glibc 2.32.
fn is_single_threaded() -> bool {
    // SAFETY: `dlsym` reads a live string, and searches the default scope.
    let flag = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__libc_single_threaded".as_ptr()) };
    // SAFETY: the symbol is a `char` of glibc, which is never unloaded. No thread writes it
    // meanwhile: glibc clears it when the only thread starts another one. That thread is here.
    !flag.is_null() && unsafe { flag.cast::<c_char>().read() } != 0
}
