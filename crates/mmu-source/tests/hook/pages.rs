//! Scratch memory for the tests.

use std::ptr;

/// The size of a page.
pub(crate) fn page_size() -> usize {
    // SAFETY: takes an integer.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// Maps `pages` new pages filled with `fill`, and returns their address. The test must unmap them.
pub(crate) fn map(pages: usize, fill: u8) -> usize {
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let at = unsafe {
        libc::mmap(
            ptr::null_mut(),
            pages * page_size(),
            PROTECTION,
            FLAGS,
            -1,
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    // SAFETY: fills what was just mapped.
    unsafe { ptr::write_bytes(at.cast::<u8>(), fill, pages * page_size()) };
    at.expose_provenance()
}

pub(crate) fn at(address: usize) -> *mut libc::c_void {
    ptr::with_exposed_provenance_mut(address)
}

pub(crate) fn unmap(address: usize, pages: usize) {
    // SAFETY: the calling test owns the pages.
    assert_eq!(unsafe { libc::munmap(at(address), pages * page_size()) }, 0);
}

pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error()
        .raw_os_error()
        .expect("it is an error of the system")
}

pub(crate) const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
pub(crate) const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Reads a byte of memory that the test has mapped.
pub(crate) fn byte(address: usize) -> u8 {
    // SAFETY: the calling test has mapped the memory. The read is volatile, because system calls
    // change the memory.
    unsafe { ptr::read_volatile(ptr::with_exposed_provenance(address)) }
}

pub(crate) fn discard(address: usize, pages: usize) {
    assert_eq!(
        // SAFETY: the calling test owns the pages.
        unsafe { libc::madvise(at(address), pages * page_size(), libc::MADV_DONTNEED) },
        0
    );
}

/// Allocates a block with `malloc`.
pub(crate) fn block(size: usize) -> usize {
    // SAFETY: takes an integer. This function checks the pointer.
    let block = unsafe { libc::malloc(size) };
    assert!(!block.is_null());
    block.expose_provenance()
}

/// Frees a block from `block`.
pub(crate) fn free(block: usize) {
    // SAFETY: the block came from `malloc`, and the calling test does not use it any more.
    unsafe { libc::free(at(block)) };
}

/// Makes the allocator return unused memory to the kernel.
pub(crate) fn trim() {
    // SAFETY: takes an integer, and unmaps only memory that the allocator does not use.
    unsafe { libc::malloc_trim(0) };
}
