//! aarch64.

/// Calls `munmap` by a system call instruction outside of libc.
pub(crate) fn munmap(address: usize, length: usize) -> i64 {
    let result: i64;
    // SAFETY: the caller, a replacement of `munmap`, was asked to unmap exactly this memory.
    unsafe {
        std::arch::asm!("svc #0", in("x8") libc::SYS_munmap, inlateout("x0") address => result, in("x1") length,
            options(nostack));
    }
    result
}

/// Returns `movz x15, ..., lsl #48; movk x15, ...; br x15`, as UCX and libfabric write it over a
/// function. The code begins with `bti c`, without which the processor would refuse an indirect
/// call.
pub(crate) fn jump_to(target: usize) -> Vec<u8> {
    const BTI_C: u32 = 0xd503_245f;
    const MOVZ_X15: u32 = 0xd280_000f;
    const MOVK_X15: u32 = 0xf280_000f;
    const BR_X15: u32 = 0xd61f_01e0;
    let part = |opcode: u32, index: u32| {
        let field = (target >> (16 * index) & 0xffff) as u32;
        opcode | (index << 21) | (field << 5)
    };
    let moves = (0..4).rev().map(|index| match index {
        3 => part(MOVZ_X15, index),
        _ => part(MOVK_X15, index),
    });
    let all = [BTI_C].into_iter().chain(moves).chain([BR_X15]);
    all.flat_map(u32::to_le_bytes).collect()
}

/// `brk #5`, which the kernel writes for uprobes.
pub(crate) const BREAKPOINT: &[u8] = &0xd420_00a0_u32.to_le_bytes();
