//! A system call by the instruction itself, on x86-64.

/// Makes a system call and returns what the kernel leaves in `rax`: a value, or a negative error
/// number.
///
/// # Safety
/// As for the call itself, with these arguments, at this place.
#[inline(always)]
pub(in super::super) unsafe fn syscall(number: u64, [a0, a1, a2, a3, a4, a5]: [u64; 6]) -> u64 {
    let result;
    // SAFETY: the instruction needs its number and arguments in these registers and destroys `rcx`
    // and `r11`, as declared. What the call does to memory is the caller's duty; by default the
    // compiler takes it to touch any.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") number => result, in("rdi") a0, in("rsi") a1, in("rdx") a2,
            in("r10") a3, in("r8") a4, in("r9") a5, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}
