//! A call by the instruction itself, on x86-64.

/// `madvise`, not through libc.
///
/// # Safety
/// As `madvise`.
pub(super) unsafe fn madvise(address: *mut u8, length: usize, advice: i32) -> i64 {
    let mut result = libc::SYS_madvise;
    // SAFETY: what the call does is the caller's duty; the registers that the instruction destroys
    // are named.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") result, in("rdi") address, in("rsi") length,
            in("rdx") advice as usize, out("rcx") _, out("r11") _, options(nostack));
    }
    result
}
