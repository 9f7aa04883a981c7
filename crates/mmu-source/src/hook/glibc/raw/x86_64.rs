//! A system call instruction on x86-64.

/// Makes a system call and returns the kernel's `rax`: a value or a negative errno.
///
/// # Safety
/// The caller must follow the rules of the call, with these arguments, at this point of the
/// program.
#[inline(always)]
pub(in super::super) unsafe fn syscall(number: u64, [a0, a1, a2, a3, a4, a5]: [u64; 6]) -> u64 {
    let result;
    // SAFETY: the instruction takes its number and arguments in these registers, and overwrites
    // `rcx` and `r11`, as declared. The caller follows the rules of the call. The compiler assumes
    // that the instruction may touch any memory.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") number => result, in("rdi") a0, in("rsi") a1, in("rdx") a2,
            in("r10") a3, in("r8") a4, in("r9") a5, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}
