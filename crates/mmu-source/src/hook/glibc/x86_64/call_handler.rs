//! From patched code into [`enter`](super::super::handler::enter), with everything kept that a
//! system call keeps.
//!
//! A stub is called by a trampoline with the number in `rax` and the arguments where the kernel
//! wants them. Like the `syscall` instruction it changes `rax`, `rcx` and `r11` and nothing else
//! that the site may still need. Every general register is kept; whether vector registers and flags
//! are still needed is found out per site by looking at the code behind it, because keeping them
//! costs more than all the rest. `xsave` and `fxsave` would be shorter, and cost 150 to 500 ns.

#![allow(unsafe_code, reason = "assembly")]

use super::super::handler::{enter, enter_function};

/// What a stub keeps besides the general registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::hook::glibc) enum Keep {
    /// Nothing: no flag and no vector register is read behind the site before its function returns.
    Nothing,
    /// Flags and all vector registers that this processor has.
    All,
}

/// Returns the stub that keeps as much, or `None` for a processor whose registers no stub here
/// knows.
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

/// Begins a stub: a frame, and the arguments in memory, in order, with their address in `rsi` and
/// the number in `rdi`.
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

/// Puts the registers back that `begin` has stored.
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

/// A stub that moves numbered registers to memory and back, one by one.
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

// What a trampoline at the *entry* of a function jumps to: the number in `rax`, what to call in
// `r11`, the arguments and the stack as for the function. A function keeps no more than its callees
// do.
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

    /// What goes in and comes out: vector registers, a general register each for number and
    /// arguments, the carry flag.
    #[repr(C, align(64))]
    #[derive(Debug, Clone, PartialEq)]
    struct Registers {
        vectors: [[u64; 8]; 32],
        arguments: [u64; 6],
        carry: u64,
        result: u64,
    }

    /// A function that loads registers from its first argument, calls its third, and stores them to
    /// its second.
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

    /// Leaves nothing of the vector registers that any code may use, nor of the flags.
    #[derive(Debug)]
    struct Destroyer;

    impl Notifier for Destroyer {
        fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
            // SAFETY: what is destroyed is declared.
            unsafe {
                std::arch::asm!("pxor xmm0, xmm0", "pxor xmm1, xmm1", "pxor xmm7, xmm7", "pxor xmm8, xmm8", "pxor xmm15, xmm15",
                    "clc", out("xmm0") _, out("xmm1") _, out("xmm7") _, out("xmm8") _, out("xmm15") _);
            }
            if is_x86_feature_detected!("avx") {
                // SAFETY: clears the upper halves, which any function may.
                unsafe { std::arch::asm!("vzeroall", clobber_abi("C")) };
            }
        }
    }

    /// Sends a `munmap` that is refused through a stub.
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
        // SAFETY: the structures are as long as the function takes them to be, and the call is
        // refused.
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
    fn a_stub_keeps_what_it_says() {
        let watch = Registration::new(current_ref(), Destroyer)
            .map_err(|_| "refused")
            .expect("registers");
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
