//! A system call instruction on aarch64.

/// Makes a system call and returns the kernel's `x0`: a value or a negative errno.
///
/// # Safety
/// The caller must follow the rules of the call, with these arguments, at this point of the
/// program.
#[inline(always)]
pub(in super::super) unsafe fn syscall(number: u64, [a0, a1, a2, a3, a4, a5]: [u64; 6]) -> u64 {
    let result;
    // SAFETY: the instruction takes its number and arguments in these registers, and the kernel
    // preserves all others. The caller follows the rules of the call. The compiler assumes that the
    // instruction may touch any memory.
    unsafe {
        std::arch::asm!("svc #0", in("x8") number, inlateout("x0") a0 => result, in("x1") a1, in("x2") a2,
            in("x3") a3, in("x4") a4, in("x5") a5, options(nostack));
    }
    result
}
