//! A system call instruction on x86-64.

/// Calls `madvise` without going through libc.
///
/// # Safety
/// The caller must follow the rules of `madvise`.
pub(super) unsafe fn madvise(address: *mut u8, length: usize, advice: i32) -> i64 {
    let mut result = libc::SYS_madvise;
    // SAFETY: the caller follows the rules of `madvise`. The registers that the instruction
    // overwrites are listed.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") result, in("rdi") address, in("rsi") length,
            in("rdx") advice as usize, out("rcx") _, out("r11") _, options(nostack));
    }
    result
}
