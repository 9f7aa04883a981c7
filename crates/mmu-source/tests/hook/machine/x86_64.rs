//! x86-64.

/// Calls `munmap` by a system call instruction outside of libc.
pub(crate) fn munmap(address: usize, length: usize) -> i64 {
    let result: i64;
    // SAFETY: the caller, a replacement of `munmap`, was asked to unmap exactly this memory.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") libc::SYS_munmap => result, in("rdi") address, in("rsi") length,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// Returns `mov $target, %r11; jmp *%r11`, as UCX and other libraries write it over a function.
pub(crate) fn jump_to(target: usize) -> Vec<u8> {
    let mut code = vec![0x49, 0xbb];
    code.extend(target.to_le_bytes());
    code.extend([0x41, 0xff, 0xe3]);
    code
}

/// `int3`.
pub(crate) const BREAKPOINT: &[u8] = &[0xcc];
