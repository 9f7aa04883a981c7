//! A system call by the instruction itself, on aarch64.

/// Makes a system call and returns what the kernel leaves in `x0`: a value, or a negative error
/// number.
///
/// # Safety
/// As for the call itself, with these arguments, at this place.
#[inline(always)]
pub(in super::super) unsafe fn syscall(number: u64, [a0, a1, a2, a3, a4, a5]: [u64; 6]) -> u64 {
    let result;
    // SAFETY: the instruction needs its number and arguments in these registers, and the kernel
    // keeps all others. What the call does to memory is the caller's duty; by default the compiler
    // takes it to touch any.
    unsafe {
        std::arch::asm!("svc #0", in("x8") number, inlateout("x0") a0 => result, in("x1") a1, in("x2") a2,
            in("x3") a3, in("x4") a4, in("x5") a5, options(nostack));
    }
    result
}
