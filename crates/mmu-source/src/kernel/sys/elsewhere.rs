//! For processors that `hook` does not support. There `hook` reports no calls through libc.

/// Calls `madvise` through libc.
///
/// # Safety
/// The caller must follow the rules of `madvise`.
pub(super) unsafe fn madvise(address: *mut u8, length: usize, advice: i32) -> i64 {
    // SAFETY: the caller follows the rules of `madvise`.
    i64::from(unsafe { libc::madvise(address.cast(), length, advice) })
}
