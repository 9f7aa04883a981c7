//! Private memory of whole pages, mapped and unmapped by address.

use std::ffi::c_void;
use std::ptr;

const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Returns the size of a page.
pub(super) fn size() -> usize {
    // SAFETY: the call takes an integer.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// Returns an address as a pointer.
pub(super) fn at(address: usize) -> *mut c_void {
    ptr::with_exposed_provenance_mut(address)
}

/// Maps new pages at an address that the kernel chooses.
pub(super) fn map(pages: usize) -> usize {
    // SAFETY: the kernel chooses an address where nothing is mapped.
    let base = unsafe { libc::mmap(ptr::null_mut(), pages * size(), PROTECTION, PRIVATE, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED);
    base.expose_provenance()
}

/// Maps new pages over those at `base`, to which no Rust reference may point.
pub(super) fn map_over(base: usize, pages: usize) {
    let flags = PRIVATE | libc::MAP_FIXED;
    // SAFETY: the pages there belong to the caller, and no reference to them exists.
    let again = unsafe { libc::mmap(at(base), pages * size(), PROTECTION, flags, -1, 0) };
    assert_eq!(again, at(base));
}

/// Unmaps the pages at `base`, which no thread uses any more.
pub(super) fn unmap(base: usize, pages: usize) {
    // SAFETY: the pages belong to the caller, and no thread uses them.
    let result = unsafe { libc::munmap(at(base), pages * size()) };
    assert_eq!(result, 0);
}
