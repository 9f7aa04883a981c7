//! The real functions behind the ones that this library defines.
//!
//! `RTLD_NEXT` finds them where the other library is in the global scope. A library that Python or
//! a plug-in has loaded with `RTLD_LOCAL` is not: then every mapped file is asked whose name fits.
//! The files are those of `/proc/self/maps`. `dl_iterate_phdr` would take a lock that stays locked
//! in the child of a fork if another thread of the parent is loading a library. (The one that
//! `dlsym` and `dlopen` take is made anew there.)
//!
//! # Safety
//! This module looks functions up by name in loaded objects. It pins an object (`RTLD_NODELETE`)
//! before it returns an address in it, so the address stays valid until the process ends. The
//! caller is responsible for the function's type.

#![allow(
    unsafe_code,
    reason = "dlsym, dlopen and dladdr; see the Safety section"
)]

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::ptr::{self, NonNull};

/// The prefix of a library's file name.
pub(crate) const UCM: &CStr = c"libucm";
pub(crate) const UCS: &CStr = c"libucs";
pub(crate) const FABRIC: &CStr = c"libfabric";
/// The library that all of Open MPI's libraries use; it has Open MPI's patcher.
pub(crate) const OPAL: &CStr = c"libopen-pal";

/// Returns the function `symbol` of the loaded library whose file name begins with `library`.
pub(crate) fn function(library: &CStr, symbol: &CStr) -> Option<NonNull<c_void>> {
    // SAFETY: the name is a live string. `RTLD_NEXT` searches the objects after this one, so it
    // does not find our own function.
    let next = unsafe { libc::dlsym(libc::RTLD_NEXT, symbol.as_ptr()) };
    let found = NonNull::new(next)
        .or_else(|| in_loaded(library, symbol))
        .or_else(|| in_program(symbol))?;
    pin(found);
    Some(found)
}

/// Looks in the program itself, which may have the library statically linked and export its
/// functions. `RTLD_NEXT` does not search the program, because the program comes before this
/// object.
fn in_program(symbol: &CStr) -> Option<NonNull<c_void>> {
    // SAFETY: a live string; the default scope is searched.
    let found = NonNull::new(unsafe { libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr()) })?;
    let own = NonNull::new((function as *const ()).cast_mut().cast())?;
    (object(found) != object(own)).then_some(found)
}

/// Whether a library is loaded whose file name begins with `library`.
pub(crate) fn is_loaded(library: &CStr) -> bool {
    !loaded(library).is_empty()
}

fn in_loaded(library: &CStr, symbol: &CStr) -> Option<NonNull<c_void>> {
    loaded(library).iter().find_map(|file| {
        let handle = open(file, libc::RTLD_LAZY | libc::RTLD_NOLOAD)?;
        // SAFETY: the handle is open, the name a live string.
        let found = NonNull::new(unsafe { libc::dlsym(handle.as_ptr(), symbol.as_ptr()) });
        // SAFETY: the handle comes from `dlopen` and is closed once. The object stays loaded,
        // because it was loaded before.
        unsafe { libc::dlclose(handle.as_ptr()) };
        // A look-up in a handle also searches the library's dependencies, which may include this
        // library.
        found.filter(|found| object(*found).is_some_and(|name| is_same(&name, file)))
    })
}

/// The paths of mapped files whose name begins with `library`.
fn loaded(library: &CStr) -> Vec<CString> {
    let maps = std::fs::read("/proc/self/maps").unwrap_or_default();
    let mut found: Vec<CString> = Vec::new();
    for path in maps.split(|byte| *byte == b'\n').filter_map(path) {
        let file = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        // libfabric.so.1, or a name from a Python wheel: libfabric-0a1b2c3d.so.1.
        let rest = file.strip_prefix(library.to_bytes());
        let fits = rest.is_some_and(|rest| rest.starts_with(b".so") || rest.starts_with(b"-"));
        // A file has several mappings, one after the other.
        if fits && found.last().is_none_or(|last| last.as_bytes() != path) {
            found.extend(CString::new(path));
        }
    }
    found
}

/// The path in a line of `/proc/self/maps`, the sixth column.
fn path(line: &[u8]) -> Option<&[u8]> {
    let path = line
        .splitn(6, |byte| *byte == b' ')
        .nth(5)?
        .trim_ascii_start();
    path.starts_with(b"/").then_some(path)
}

/// Keeps the object around `address` loaded.
fn pin(address: NonNull<c_void>) {
    if let Some(name) = object(address) {
        // The handle is leaked, and `RTLD_NODELETE` outlasts even its closing.
        open(
            &name,
            libc::RTLD_LAZY | libc::RTLD_NOLOAD | libc::RTLD_NODELETE,
        );
    }
}

/// Returns the loader's name of the object around `address`.
fn object(address: NonNull<c_void>) -> Option<CString> {
    let mut info = libc::Dl_info {
        dli_fname: ptr::null(),
        dli_fbase: ptr::null_mut(),
        dli_sname: ptr::null(),
        dli_saddr: ptr::null_mut(),
    };
    // SAFETY: `dladdr` only writes to `info`.
    let found = unsafe { libc::dladdr(address.as_ptr(), &raw mut info) };
    if found == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the loader's own copy of the name, alive as long as the object.
    Some(unsafe { CStr::from_ptr(info.dli_fname) }.to_owned())
}

/// Whether the loader's name of an object and a path are of one file. They differ where the loader
/// was given a link or a relative name.
fn is_same(name: &CStr, path: &CStr) -> bool {
    let id = |name: &CStr| {
        let name = Path::new(OsStr::from_bytes(name.to_bytes()));
        let file = std::fs::metadata(name).ok()?;
        Some((file.dev(), file.ino()))
    };
    name == path || id(name).is_some_and(|own| id(path) == Some(own))
}

fn open(file: &CStr, flags: c_int) -> Option<NonNull<c_void>> {
    let file: *const c_char = file.as_ptr();
    // SAFETY: a live string; with `RTLD_NOLOAD` nothing is loaded and no code of the object runs.
    NonNull::new(unsafe { libc::dlopen(file, flags) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_of_a_loaded_library_is_found_by_the_beginning_of_its_name() {
        let found = in_loaded(c"libc", c"getpid").expect("libc is loaded");
        assert_eq!(
            found.as_ptr().addr(),
            (libc::getpid as *const ()).addr(),
            "the one that this program links with"
        );
        assert!(object(found).is_some_and(|name| name.to_string_lossy().contains("libc.so")));
        assert!(in_loaded(c"libc", c"mmun_there_is_none").is_none());
        assert!(
            in_loaded(c"lib", c"getpid").is_none(),
            "the middle of a name does not match"
        );
        assert!(
            in_program(c"main").is_none(),
            "this object's own functions are not found"
        );
    }
}
