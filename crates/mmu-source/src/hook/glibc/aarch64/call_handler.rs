//! Calls [`enter`](super::super::handler::enter) from patched code, and preserves everything that a
//! system call preserves.
//!
//! A trampoline calls a stub with the system call number in `x8` and the arguments in the registers
//! of the system call. Like the `svc` instruction, the stub changes `x0` and nothing else that the
//! site may still need. `x16`, `x17` and `x30` belong to the trampoline. The stub preserves the low
//! 128 bits of each vector register `v0` to `v31`. The kernel preserves no more: a system call
//! discards the upper part that SVE adds.

#![allow(unsafe_code, reason = "assembly")]

use super::super::handler::{enter, enter_function};

// `bti c` is written as a hint, because an assembler without the BTI extension accepts a hint, and
// a processor without it executes the hint as a no-op.
naked!(
    pub(super) fn call(),
    "call",
    [
        "hint #34",
        "sub sp, sp, #688",
        "stp x29, x30, [sp]",
        "mov x29, sp",
        "stp x0, x1, [sp, #16]",
        "stp x2, x3, [sp, #32]",
        "stp x4, x5, [sp, #48]",
        "stp x6, x7, [sp, #64]",
        "stp x8, x9, [sp, #80]",
        "stp x10, x11, [sp, #96]",
        "stp x12, x13, [sp, #112]",
        "stp x14, x15, [sp, #128]",
        "mrs x9, nzcv",
        "mrs x10, fpsr",
        "stp x18, x9, [sp, #144]",
        "str x10, [sp, #160]",
        "stp q0, q1, [sp, #176]",
        "stp q2, q3, [sp, #208]",
        "stp q4, q5, [sp, #240]",
        "stp q6, q7, [sp, #272]",
        "stp q8, q9, [sp, #304]",
        "stp q10, q11, [sp, #336]",
        "stp q12, q13, [sp, #368]",
        "stp q14, q15, [sp, #400]",
        "stp q16, q17, [sp, #432]",
        "stp q18, q19, [sp, #464]",
        "stp q20, q21, [sp, #496]",
        "stp q22, q23, [sp, #528]",
        "stp q24, q25, [sp, #560]",
        "stp q26, q27, [sp, #592]",
        "stp q28, q29, [sp, #624]",
        "stp q30, q31, [sp, #656]",
        "mov x0, x8",
        "add x1, sp, #16",
        "bl {enter}",
        "ldp q0, q1, [sp, #176]",
        "ldp q2, q3, [sp, #208]",
        "ldp q4, q5, [sp, #240]",
        "ldp q6, q7, [sp, #272]",
        "ldp q8, q9, [sp, #304]",
        "ldp q10, q11, [sp, #336]",
        "ldp q12, q13, [sp, #368]",
        "ldp q14, q15, [sp, #400]",
        "ldp q16, q17, [sp, #432]",
        "ldp q18, q19, [sp, #464]",
        "ldp q20, q21, [sp, #496]",
        "ldp q22, q23, [sp, #528]",
        "ldp q24, q25, [sp, #560]",
        "ldp q26, q27, [sp, #592]",
        "ldp q28, q29, [sp, #624]",
        "ldp q30, q31, [sp, #656]",
        "ldp x18, x9, [sp, #144]",
        "ldr x10, [sp, #160]",
        "msr nzcv, x9",
        "msr fpsr, x10",
        "ldr x1, [sp, #24]",
        "ldp x2, x3, [sp, #32]",
        "ldp x4, x5, [sp, #48]",
        "ldp x6, x7, [sp, #64]",
        "ldp x8, x9, [sp, #80]",
        "ldp x10, x11, [sp, #96]",
        "ldp x12, x13, [sp, #112]",
        "ldp x14, x15, [sp, #128]",
        "ldp x29, x30, [sp]",
        "add sp, sp, #688",
        "ret",
    ],
    enter = sym enter
);

// The target of a trampoline at the *entry* of a function. `x9` holds the number of the call, `x10`
// the function to call; the arguments and the stack are those of the function. The stub may change
// every register that a function may change.
naked!(
    pub(super) fn function(),
    "function",
    [
        "hint #34",
        "stp x29, x30, [sp, #-64]!",
        "mov x29, sp",
        "stp x0, x1, [sp, #16]",
        "stp x2, x3, [sp, #32]",
        "stp x4, x5, [sp, #48]",
        "mov x0, x9",
        "add x1, sp, #16",
        "mov x2, x10",
        "bl {enter}",
        "ldp x29, x30, [sp], #64",
        "ret",
    ],
    enter = sym enter_function
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::current_ref;
    use mmu_notifier::{InvalidateRange, Notifier, Registration};

    type Stub = unsafe extern "C" fn();

    /// The registers before and after a stub: `v0` to `v31`, `x0` to `x15`, the flags, `x18`.
    #[repr(C, align(16))]
    #[derive(Debug, Clone, PartialEq)]
    struct Registers {
        vectors: [[u64; 2]; 32],
        general: [u64; 16],
        flags: u64,
        x18: u64,
    }

    // Loads registers from its first argument, calls its third argument, and stores registers to
    // its second.
    naked!(
        fn through(from: *const Registers, to: *mut Registers, stub: Stub),
        "through",
        [
            "stp x29, x30, [sp, #-112]!",
            "stp x19, x20, [sp, #16]",
            "str x21, [sp, #32]",
            "stp d8, d9, [sp, #48]",
            "stp d10, d11, [sp, #64]",
            "stp d12, d13, [sp, #80]",
            "stp d14, d15, [sp, #96]",
            "mov x19, x0",
            "mov x20, x1",
            "mov x21, x2",
            "ldp q0, q1, [x19, #0]", "ldp q2, q3, [x19, #32]", "ldp q4, q5, [x19, #64]",
            "ldp q6, q7, [x19, #96]", "ldp q8, q9, [x19, #128]", "ldp q10, q11, [x19, #160]",
            "ldp q12, q13, [x19, #192]", "ldp q14, q15, [x19, #224]", "ldp q16, q17, [x19, #256]",
            "ldp q18, q19, [x19, #288]", "ldp q20, q21, [x19, #320]", "ldp q22, q23, [x19, #352]",
            "ldp q24, q25, [x19, #384]", "ldp q26, q27, [x19, #416]", "ldp q28, q29, [x19, #448]",
            "ldp q30, q31, [x19, #480]",
            "add x19, x19, #512",
            "ldp x0, x18, [x19, #128]",
            "msr nzcv, x0",
            "ldp x0, x1, [x19, #0]", "ldp x2, x3, [x19, #16]", "ldp x4, x5, [x19, #32]",
            "ldp x6, x7, [x19, #48]", "ldp x8, x9, [x19, #64]", "ldp x10, x11, [x19, #80]",
            "ldp x12, x13, [x19, #96]", "ldp x14, x15, [x19, #112]",
            "blr x21",
            "stp q0, q1, [x20, #0]", "stp q2, q3, [x20, #32]", "stp q4, q5, [x20, #64]",
            "stp q6, q7, [x20, #96]", "stp q8, q9, [x20, #128]", "stp q10, q11, [x20, #160]",
            "stp q12, q13, [x20, #192]", "stp q14, q15, [x20, #224]", "stp q16, q17, [x20, #256]",
            "stp q18, q19, [x20, #288]", "stp q20, q21, [x20, #320]", "stp q22, q23, [x20, #352]",
            "stp q24, q25, [x20, #384]", "stp q26, q27, [x20, #416]", "stp q28, q29, [x20, #448]",
            "stp q30, q31, [x20, #480]",
            "add x20, x20, #512",
            "stp x0, x1, [x20, #0]", "stp x2, x3, [x20, #16]", "stp x4, x5, [x20, #32]",
            "stp x6, x7, [x20, #48]", "stp x8, x9, [x20, #64]", "stp x10, x11, [x20, #80]",
            "stp x12, x13, [x20, #96]", "stp x14, x15, [x20, #112]",
            "mrs x0, nzcv",
            "stp x0, x18, [x20, #128]",
            "ldp x19, x20, [sp, #16]",
            "ldr x21, [sp, #32]",
            "ldp d8, d9, [sp, #48]",
            "ldp d10, d11, [sp, #64]",
            "ldp d12, d13, [sp, #80]",
            "ldp d14, d15, [sp, #96]",
            "ldp x29, x30, [sp], #112",
            "ret",
        ]
    );

    /// Overwrites some of the registers that a function may overwrite, and the flags.
    #[derive(Debug)]
    struct Destroyer;

    impl Notifier for Destroyer {
        fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
            // SAFETY: all overwritten registers are declared.
            unsafe {
                std::arch::asm!("movi v0.2d, #0", "movi v7.2d, #0", "movi v8.2d, #0",
                    "movi v15.2d, #0", "movi v31.2d, #0", "mov x1, #0", "mov x15, #0", "cmp x1, #1",
                    clobber_abi("C"), out("v8") _, out("v15") _);
            }
        }
    }

    #[test]
    fn a_stub_preserves_all_registers_but_the_result() {
        let watch = Registration::new(current_ref(), Destroyer).expect("registers");
        let mut from = Registers {
            vectors: [[0; 2]; 32],
            general: [0; 16],
            flags: 0xb000_0000,
            x18: 0x1818,
        };
        for (n, register) in from.vectors.iter_mut().flatten().enumerate() {
            *register = 0x0101_0101_0101_0101 * (n as u64 + 1);
        }
        for (n, register) in from.general.iter_mut().enumerate() {
            *register = 0x1111 * (n as u64 + 1);
        }
        // The kernel refuses this `munmap`, because the address is not page-aligned.
        from.general[..2].copy_from_slice(&[0x1001, 4096]);
        from.general[8] = libc::SYS_munmap as u64;
        let mut to = from.clone();
        to.vectors = [[0; 2]; 32];
        to.flags = 0;
        // SAFETY: the structures have the size that the function expects, and the kernel refuses
        // the call.
        unsafe { through(&from, &mut to, call) };
        assert_eq!(to.general[0] as i64, -i64::from(libc::EINVAL));
        from.general[0] = to.general[0];
        assert_eq!(to, from);
        drop(watch);
    }
}
