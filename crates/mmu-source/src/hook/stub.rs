//! From patched code into [`enter`](super::handler::enter), with everything kept that a system call keeps.
//!
//! A stub is called by a trampoline with the number in `rax` and the arguments where the kernel wants them. Like the
//! `syscall` instruction it changes `rax`, `rcx` and `r11` and nothing else that the site may still need. Every general register is
//! kept; whether vector registers and flags are still needed is found out per site by looking at the code behind it,
//! because keeping them costs more than all the rest. `xsave` and `fxsave` would be shorter, and cost 150 to 500 ns.

#![allow(unsafe_code, reason = "assembly")]

use super::handler::enter;
use std::arch::naked_asm;

/// What a stub keeps besides the general registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Nothing: no flag and no vector register is read behind the site before its function returns.
    Nothing,
    /// Flags and all vector registers that this processor has.
    All,
}

/// Returns the stub that keeps as much, or `None` for a processor whose registers no stub here knows.
pub(super) fn stub(keep: Keep) -> Option<unsafe extern "C" fn()> {
    if keep == Keep::Nothing {
        return Some(lean);
    }
    let has_mask_registers = is_x86_feature_detected!("avx512f");
    match (has_mask_registers, is_x86_feature_detected!("avx")) {
        (true, _) => is_x86_feature_detected!("avx512bw").then_some(all_avx512 as unsafe extern "C" fn()),
        (false, true) => Some(all_avx),
        (false, false) => Some(all_sse),
    }
}

/// Begins a stub: a frame, and the arguments in memory, in order, with their address in `rsi` and the number in `rdi`.
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

#[unsafe(naked)]
unsafe extern "C" fn lean() {
    naked_asm!(begin!(), "and rsp, -16", "call {enter}", end!(), "ret", enter = sym enter)
}

/// A stub that moves numbered registers to memory and back, one by one.
macro_rules! all {
    ($name:ident, $mov:literal, $register:literal, $size:literal, [$($n:literal)*], [$($mask:literal)*]) => {
        #[unsafe(naked)]
        unsafe extern "C" fn $name() {
            naked_asm!(
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
                enter = sym enter,
            )
        }
    };
}

all!(all_sse, "movups", "xmm", "16", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], []);
all!(all_avx, "vmovups", "ymm", "32", [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], []);
all!(all_avx512, "vmovups", "zmm", "64",
    [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31], [0 1 2 3 4 5 6 7]);
