//! A system call instruction on aarch64.

/// Calls `madvise` without going through libc.
///
/// # Safety
/// The caller must follow the rules of `madvise`.
pub(super) unsafe fn madvise(address: *mut u8, length: usize, advice: i32) -> i64 {
    let result: i64;
    // SAFETY: the caller follows the rules of `madvise`. The kernel preserves all registers except
    // x0.
    unsafe {
        std::arch::asm!("svc #0", in("x8") libc::SYS_madvise, inlateout("x0") address => result, in("x1") length,
            in("x2") advice as usize, options(nostack));
    }
    result
}
