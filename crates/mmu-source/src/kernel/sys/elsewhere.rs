//! A processor whose instruction for calls is not known here: `hook` is not there either.

/// `madvise`.
///
/// # Safety
/// As `madvise`.
pub(super) unsafe fn madvise(address: *mut u8, length: usize, advice: i32) -> i64 {
    // SAFETY: the caller's duty.
    i64::from(unsafe { libc::madvise(address.cast(), length, advice) })
}
