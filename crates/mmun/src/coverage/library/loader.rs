//! Loads libraries on demand, and never unloads them.
#![expect(unsafe_code, reason = "dlopen and dlsym with live strings")]

use std::ffi::{CStr, c_void};

use crate::coverage::operation::Unavailable;

/// Loads a library into the global scope.
pub(super) fn load(file: &CStr) -> Result<*mut c_void, Unavailable> {
    // SAFETY: `dlopen` reads a live string. The constructors of these libraries may run in any
    // program.
    let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        Err(Unavailable(format!(
            "{}: cannot be loaded",
            file.to_string_lossy()
        )))
    } else {
        Ok(handle)
    }
}

/// A function of an open library, or of the global scope (`RTLD_DEFAULT`).
pub(super) fn symbol(handle: *mut c_void, name: &CStr) -> Result<*mut c_void, Unavailable> {
    // SAFETY: `dlsym` gets an open handle or `RTLD_DEFAULT`, and a live string.
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    if found.is_null() {
        Err(Unavailable(format!("it has no {}", name.to_string_lossy())))
    } else {
        Ok(found)
    }
}
