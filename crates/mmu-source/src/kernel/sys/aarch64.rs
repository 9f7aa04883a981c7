//! A call by the instruction itself, on aarch64.

/// `madvise`, not through libc.
///
/// # Safety
/// As `madvise`.
pub(super) unsafe fn madvise(address: *mut u8, length: usize, advice: i32) -> i64 {
    let result: i64;
    // SAFETY: what the call does is the caller's duty; the kernel keeps all registers but x0.
    unsafe {
        std::arch::asm!("svc #0", in("x8") libc::SYS_madvise, inlateout("x0") address => result, in("x1") length,
            in("x2") advice as usize, options(nostack));
    }
    result
}
