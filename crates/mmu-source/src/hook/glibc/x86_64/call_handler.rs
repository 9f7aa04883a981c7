//! Calls [`enter`](super::super::handler::enter) from patched code, and preserves everything that a
//! system call preserves.
//!
//! A trampoline calls a stub with the system call number in `rax` and the arguments in the
//! registers of the system call. Like the `syscall` instruction, the stub changes `rax`, `rcx` and
//! `r11` and nothing else that the site may still need. Every stub of a site preserves the general
//! registers. Preserving vector registers and flags costs more than everything else, so the scanner
//! examines the code after each site and decides whether the site still needs them. `xsave` and
//! `fxsave` would be shorter, but cost 150 to 500 ns.

#![allow(unsafe_code, reason = "assembly")]

use super::super::handler::{enter, enter_function};

/// What a stub preserves besides the general registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::hook::glibc) enum Keep {
    /// Nothing: the code after the site reads no flag and no vector register before its function
    /// returns.
    Nothing,
    /// The flags, and all vector registers of this processor.
    All,
}

/// Returns the stub of a site that preserves `keep`. Returns `None` if `keep` is [`Keep::All`] and
/// no stub here knows all registers of this processor.
pub(in crate::hook::glibc) fn stub(keep: Keep) -> Option<unsafe extern "C" fn()> {
    if keep == Keep::Nothing {
        return Some(lean);
    }
    let has_mask_registers = is_x86_feature_detected!("avx512f");
    match (has_mask_registers, is_x86_feature_detected!("avx")) {
        (true, _) => {
            is_x86_feature_detected!("avx512bw").then_some(all_avx512 as unsafe extern "C" fn())
        }
        (false, true) => Some(all_avx),
        (false, false) => Some(all_sse),
    }
}

/// Begins a stub: makes a frame and stores the arguments to memory, in order. Puts the address of
/// the arguments into `rsi` and the system call number into `rdi`.
macro_rules! begin {
    () => {
        "push rbp
         mov rbp, rsp
         push r9
         push r8
         push r10
         push rdx
         push rsi
         push rdi
         mov rsi, rsp
         mov rdi, rax"
    };
}

/// Restores the registers that `begin` has stored.
macro_rules! end {
    () => {
        "lea rsp, [rbp - 48]
         pop rdi
         pop rsi
         pop rdx
         pop r10
         pop r8
         pop r9
         pop rbp"
    };
}

naked!(fn lean(), "lean", [begin!(), "and rsp, -16", "call {enter}", end!(), "ret"], enter = sym enter);

/// Defines a stub that saves and restores numbered vector registers one by one.
macro_rules! all {
    ($name:ident, $mov:literal, $register:literal, $size:literal, [$($n:literal)*], [$($mask:literal)*]) => {
        naked!(
            fn $name(),
            stringify!($name),
            [
                "pushfq",
                begin!(),
                concat!("sub rsp, ", $size, " * 32 + 64"),
                "and rsp, -64",
                $(concat!($mov, " [rsp + ", $size, " * ", $n, "], ", $register, $n),)*
                $(concat!("kmovq [rsp + ", $size, " * 32 + 8 * ", $mask, "], k", $mask),)*
                "call {enter}",
                $(concat!($mov, " ", $register, $n, ", [rsp + ", $size, " * ", $n, "]"),)*
                $(concat!("kmovq k", $mask, ", [rsp + ", $size, " * 32 + 8 * ", $mask, "]"),)*
                end!(),
                "popfq",
                "ret",
            ],
            enter = sym enter
        );
    };
}

all!(all_sse, "movups", "xmm", "16", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], []);
all!(all_avx, "vmovups", "ymm", "32", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], []);
all!(all_avx512, "vmovups", "zmm", "64",
    [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31], [0 1 2 3 4 5 6 7]);

// The target of a trampoline at the *entry* of a function. `rax` holds the number of the call,
// `r11` the address to call; the arguments and the stack are those of the function. The stub
// preserves only the registers that a function must preserve.
naked!(
    pub(in crate::hook::glibc) fn function(),
    "function",
    [
        "push r9",
        "push r8",
        "push rcx",
        "push rdx",
        "push rsi",
        "push rdi",
        "mov rdi, rax",
        "mov rsi, rsp",
        "mov rdx, r11",
        "sub rsp, 8",
        "call {enter}",
        "add rsp, 56",
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

    /// The registers before and after a stub: the vector registers, the general registers for the
    /// number and the arguments, the carry flag.
    #[repr(C, align(64))]
    #[derive(Debug, Clone, PartialEq)]
    struct Registers {
        vectors: [[u64; 8]; 32],
        arguments: [u64; 6],
        carry: u64,
        result: u64,
    }

    /// Defines a function that loads registers from its first argument, calls its third argument,
    /// and stores registers to its second.
    macro_rules! through {
        ($name:ident, $mov:literal, $register:literal, [$($n:literal)*]) => {
            naked!(
                fn $name(from: *const Registers, to: *mut Registers, stub: Stub),
                stringify!($name),
                [
                    "push rbx", "push r12", "push r13",
                    "mov rbx, rdi", "mov r12, rsi", "mov r13, rdx",
                    $(concat!($mov, " ", $register, $n, ", [rbx + 64 * ", $n, "]"),)*
                    "mov rax, [rbx + 2104]",
                    "mov rdi, [rbx + 2048]", "mov rsi, [rbx + 2056]", "mov rdx, [rbx + 2064]",
                    "mov r10, [rbx + 2072]", "mov r8, [rbx + 2080]", "mov r9, [rbx + 2088]",
                    "stc", "call r13", "setc cl", "movzx ecx, cl", "mov [r12 + 2096], rcx",
                    "mov [r12 + 2104], rax",
                    "mov [r12 + 2048], rdi", "mov [r12 + 2056], rsi", "mov [r12 + 2064], rdx",
                    "mov [r12 + 2072], r10", "mov [r12 + 2080], r8", "mov [r12 + 2088], r9",
                    $(concat!($mov, " [r12 + 64 * ", $n, "], ", $register, $n),)*
                    "pop r13", "pop r12", "pop rbx", "ret",
                ]
            );
        };
    }

    through!(through_sse, "movups", "xmm", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]);
    through!(through_avx, "vmovups", "ymm", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]);
    through!(through_avx512, "vmovups", "zmm",
        [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31]);

    /// Overwrites some of the vector registers that a function may overwrite, and the carry flag.
    #[derive(Debug)]
    struct Destroyer;

    impl Notifier for Destroyer {
        fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
            // SAFETY: all overwritten registers are declared.
            unsafe {
                std::arch::asm!("pxor xmm0, xmm0", "pxor xmm1, xmm1", "pxor xmm7, xmm7", "pxor xmm8, xmm8", "pxor xmm15, xmm15",
                    "clc", out("xmm0") _, out("xmm1") _, out("xmm7") _, out("xmm8") _, out("xmm15") _);
            }
            if is_x86_feature_detected!("avx") {
                // SAFETY: clears vector registers, which any function may do.
                unsafe { std::arch::asm!("vzeroall", clobber_abi("C")) };
            }
        }
    }

    /// Makes a `munmap`, which the kernel refuses, through a stub.
    fn check(
        name: &str,
        through: unsafe extern "C" fn(*const Registers, *mut Registers, Stub),
        stub: Stub,
        keep: Keep,
        lanes: usize,
    ) {
        let mut vectors = [[0; 8]; 32];
        let registers = if lanes == 8 { 32 } else { 16 };
        for (n, register) in vectors.iter_mut().enumerate().take(registers) {
            for (lane, value) in register.iter_mut().enumerate().take(lanes) {
                *value = 0x0101_0101_0101_0101 * (n as u64 + 1) + lane as u64;
            }
        }
        let from = Registers {
            vectors,
            arguments: [0x1001, 4096, 3, 4, 5, 6],
            carry: 1,
            result: libc::SYS_munmap as u64,
        };
        let mut to = Registers {
            vectors: [[0; 8]; 32],
            arguments: [0; 6],
            carry: 0,
            result: 0,
        };
        // SAFETY: the structures have the size that the function expects, and the kernel refuses
        // the call.
        unsafe { through(&from, &mut to, stub) };
        assert_eq!(to.result as i64, -i64::from(libc::EINVAL), "{name}");
        assert_eq!(to.arguments, from.arguments, "{name}");
        if keep == Keep::All {
            assert_eq!((to.vectors, to.carry), (from.vectors, 1), "{name}");
        } else {
            assert_ne!(to.vectors, from.vectors, "{name}: the callback has run");
        }
    }

    #[test]
    fn a_stub_preserves_the_registers_that_it_promises() {
        let watch = Registration::new(current_ref(), Destroyer).expect("registers");
        check("lean", through_sse, lean, Keep::Nothing, 2);
        check("sse", through_sse, all_sse, Keep::All, 2);
        if is_x86_feature_detected!("avx") {
            check("avx", through_avx, all_avx, Keep::All, 4);
        }
        if is_x86_feature_detected!("avx512bw") {
            check("avx512", through_avx512, all_avx512, Keep::All, 8);
        }
        drop(watch);
    }
}
