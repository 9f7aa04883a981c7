//! The real functions behind the functions that this library defines.
//!
//! `RTLD_NEXT` finds a function if the other library is in the global scope. A library that Python
//! or a plug-in has loaded with `RTLD_LOCAL` is not in that scope. Then this module searches every
//! mapped file whose name fits. The files are those of `/proc/self/maps`. `dl_iterate_phdr` would
//! take a lock that stays locked in the child of a fork if another thread of the parent is loading
//! a library. (glibc makes the lock of `dlsym`, `dlopen` and `dladdr` anew in the child.)
//!
//! # Safety
//! This module looks functions up by name in loaded objects. It pins an object (`RTLD_NODELETE`)
//! before it returns an address in it, so the address stays valid until the process ends. The
//! caller is responsible for the function's type.

#![allow(
    unsafe_code,
    reason = "dlsym, dlopen and dladdr; see the Safety section"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::{self, NonNull};

/// Returns the result of a real function. On aarch64 this keeps the compiler from making the call
/// of that function a jump. If the function is in code with branch target identification
/// (`-mbranch-protection=standard`, as in Debian 13), an indirect jump to it raises SIGILL, unless
/// the address is in `x16` or `x17`. An indirect call raises none.
#[inline(always)]
pub(crate) fn returned<T>(result: T) -> T {
    #[cfg(target_arch = "aarch64")]
    let result = std::hint::black_box((result, 0_u8)).0;
    result
}

/// The prefix of a library's file name.
pub(crate) const UCM: &CStr = c"libucm";
pub(crate) const UCS: &CStr = c"libucs";
pub(crate) const FABRIC: &CStr = c"libfabric";
/// The library that all of Open MPI's libraries use; it has Open MPI's patcher.
pub(crate) const OPAL: &CStr = c"libopen-pal";

/// Returns the function `symbol`: that of the next object in the global scope, else that of a
/// loaded library whose file name begins with `library`, else that of the program itself.
pub(crate) fn function(library: &CStr, symbol: &CStr) -> Option<NonNull<c_void>> {
    // Reading the mappings is a cancellation point.
    let _whole = srcu::Uncancelled::enter();
    let found = global(symbol)
        .or_else(|| in_loaded(library, symbol))
        .or_else(|| in_program(symbol))?;
    pin(found);
    Some(found)
}

/// Returns the same as [`function`] if the function is in the global scope, as the loader would
/// bind it, or if exactly one file with the library's name is loaded. Otherwise returns the
/// function that the caller of this library would call, and if there is no such function, the same
/// as [`function`]. (Python can load one UCX for mpi4py and another one from a wheel.)
///
/// The global scope comes first because the functions that this library does not define are bound
/// so: a cache must be made and destroyed by the same copy.
pub(crate) fn for_caller(library: &CStr, symbol: &CStr) -> Option<NonNull<c_void>> {
    if global(symbol).is_none() && loaded(library).len() != 1 {
        if let Some(found) = caller().and_then(|caller| from(&caller, symbol)) {
            return Some(found);
        }
    }
    function(library, symbol)
}

/// Looks in the objects of the global scope that come after this library, so not in this library.
fn global(symbol: &CStr) -> Option<NonNull<c_void>> {
    // SAFETY: the name is a live string.
    NonNull::new(unsafe { libc::dlsym(libc::RTLD_NEXT, symbol.as_ptr()) })
}

/// Whether several files with the library's name are loaded.
pub(crate) fn has_copies(library: &CStr) -> bool {
    loaded(library).len() > 1
}

/// The function that an object finds in itself and its dependencies. `None` if that is a function
/// of this library.
fn from(name: &CStr, symbol: &CStr) -> Option<NonNull<c_void>> {
    let found = seen_from(name, symbol).filter(|found| object(*found) != own())?;
    pin(found);
    Some(found)
}

/// Looks in a loaded object and its dependencies.
fn seen_from(name: &CStr, symbol: &CStr) -> Option<NonNull<c_void>> {
    let handle = open(name, libc::RTLD_LAZY | libc::RTLD_NOLOAD)?;
    // SAFETY: the handle is open, the name a live string.
    let found = NonNull::new(unsafe { libc::dlsym(handle.as_ptr(), symbol.as_ptr()) });
    // SAFETY: the handle comes from `dlopen` and is closed once. The object stays loaded, because
    // it was loaded before.
    unsafe { libc::dlclose(handle.as_ptr()) };
    found
}

/// The loader's name of this library.
fn own() -> Option<CString> {
    object(NonNull::new((function as *const ()).cast_mut().cast())?)
}

/// The loader's name of the object whose code has called this library: that of the innermost frame
/// outside of this library. `None` if there is none.
fn caller() -> Option<CString> {
    unsafe extern "C" {
        fn _Unwind_Backtrace(
            each: extern "C" fn(*mut c_void, *mut c_void) -> c_int,
            frames: *mut c_void,
        ) -> c_int;
        fn _Unwind_GetIP(context: *mut c_void) -> usize;
    }
    struct Frames {
        own: Option<CString>,
        caller: Option<CString>,
    }
    extern "C" fn each(context: *mut c_void, frames: *mut c_void) -> c_int {
        // SAFETY: `context` is the one that the unwinder passes to this callback.
        let address = unsafe { _Unwind_GetIP(context) };
        // SAFETY: `frames` is the pointer that the call below passes; no other reference to the
        // value exists meanwhile.
        let frames = unsafe { &mut *frames.cast::<Frames>() };
        let name = NonNull::new(ptr::without_provenance_mut(address)).and_then(object);
        if name == frames.own {
            return 0;
        }
        frames.caller = name;
        // `_URC_END_OF_STACK` stops the walk.
        5
    }
    let mut frames = Frames {
        own: own(),
        caller: None,
    };
    // SAFETY: the callback gets this pointer, and nothing else uses it meanwhile.
    unsafe { _Unwind_Backtrace(each, (&raw mut frames).cast()) };
    frames.caller
}

/// Looks in the program itself, which may have the library statically linked and export its
/// functions. `RTLD_NEXT` does not search the program, because the program comes before this
/// object.
fn in_program(symbol: &CStr) -> Option<NonNull<c_void>> {
    // SAFETY: `dlsym` reads a live string, and searches the default scope.
    let found = NonNull::new(unsafe { libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr()) })?;
    (object(found) != own()).then_some(found)
}

/// Whether a library is loaded whose file name begins with `library`.
pub(crate) fn is_loaded(library: &CStr) -> bool {
    !loaded(library).is_empty()
}

/// Whether each of `libraries` is loaded, as [`is_loaded`] tells; reads the mappings once.
pub(crate) fn are_loaded<const N: usize>(libraries: [&CStr; N]) -> [bool; N] {
    let maps = mappings();
    libraries.map(|library| !loaded_in(&maps, library).is_empty())
}

fn in_loaded(library: &CStr, symbol: &CStr) -> Option<NonNull<c_void>> {
    loaded(library).iter().find_map(|name| {
        let found = seen_from(name, symbol);
        // A look-up in a handle also searches the library's dependencies, which may include this
        // library.
        found.filter(|found| object(*found).as_ref() == Some(name))
    })
}

/// The loader's names of the objects whose file name begins with `library`.
///
/// `/proc/self/maps` has the address of each object, from which `dladdr` gets the loader's name.
/// The path in that file differs: it ends in ` (deleted)` if the file was replaced, and escapes
/// some characters.
fn loaded(library: &CStr) -> Vec<CString> {
    loaded_in(&mappings(), library)
}

fn mappings() -> Vec<u8> {
    std::fs::read("/proc/self/maps").unwrap_or_default()
}

fn loaded_in(maps: &[u8], library: &CStr) -> Vec<CString> {
    let mut found: Vec<CString> = Vec::new();
    let mut last: &[u8] = b"";
    for (start, path) in maps.split(|byte| *byte == b'\n').filter_map(mapping) {
        // A file has several mappings, one after the other.
        if path == last {
            continue;
        }
        last = path;
        let file = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        // libfabric.so.1, or a name from a Python wheel: libfabric-0a1b2c3d.so.1.
        let rest = file.strip_prefix(library.to_bytes());
        if rest.is_some_and(|rest| rest.starts_with(b".so") || rest.starts_with(b"-")) {
            // `None` if the file is mapped, and not loaded. A file can have mappings of others
            // between its own.
            found.extend(object(start).filter(|name| !found.contains(name)));
        }
    }
    found
}

/// The start and the path in a line of `/proc/self/maps`, the first and the sixth column.
fn mapping(line: &[u8]) -> Option<(NonNull<c_void>, &[u8])> {
    let mut columns = line.splitn(6, |byte| *byte == b' ');
    let start = columns.next()?.split(|byte| *byte == b'-').next()?;
    let start = usize::from_str_radix(std::str::from_utf8(start).ok()?, 16).ok()?;
    let path = columns.nth(4)?.trim_ascii_start();
    let start = NonNull::new(ptr::without_provenance_mut(start))?;
    path.starts_with(b"/").then_some((start, path))
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
    // SAFETY: `dli_fname` points to the loader's own copy of the name, which lives as long as the
    // object.
    Some(unsafe { CStr::from_ptr(info.dli_fname) }.to_owned())
}

fn open(file: &CStr, flags: c_int) -> Option<NonNull<c_void>> {
    let file: *const c_char = file.as_ptr();
    // SAFETY: `dlopen` reads a live string. With `RTLD_NOLOAD` it loads nothing, and no code of the
    // object runs.
    NonNull::new(unsafe { libc::dlopen(file, flags) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_whose_file_was_replaced_is_still_found() {
        let math = open(c"libm.so.6", libc::RTLD_LAZY).expect("glibc has it");
        // SAFETY: the handle is open, the name a live string.
        let cos = unsafe { libc::dlsym(math.as_ptr(), c"cos".as_ptr()) };
        let file = object(NonNull::new(cos).expect("it is there")).expect("it is loaded");
        let folder = std::env::temp_dir();
        let copy = format!(
            "{}/libmmunprobe-{}.so.1",
            folder.display(),
            std::process::id()
        );
        std::fs::copy(file.to_str().expect("a plain name"), &copy).expect("room in TMPDIR");
        let name = CString::new(copy.clone()).expect("no NUL");
        assert!(open(&name, libc::RTLD_LAZY | libc::RTLD_LOCAL).is_some());
        assert!(in_loaded(c"libmmunprobe", c"cos").is_some());
        std::fs::remove_file(&copy).expect("it was made above");
        assert!(in_loaded(c"libmmunprobe", c"cos").is_some());
    }

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
