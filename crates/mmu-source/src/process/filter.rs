//! The seccomp filter of a spawned process, assembled by hand.
//!
//! The filter returns `SECCOMP_RET_TRACE` for a memory call unless its register arguments show that
//! it changes no translation, and `SECCOMP_RET_ALLOW` for every other call of a known architecture.
//! The filter works in these steps:
//!
//! 1. Load the architecture. Continue at 2 for the native one, at 4 for the 32-bit one. Trace a
//!    call of any other architecture: the tracer cannot decode it, but reports it.
//! 2. Load the number. On x86-64, trace every number with the x32 bit; the tracer decodes it.
//! 3. Search the native table for the number. If the table lacks the number, allow the call.
//!    Otherwise test the call's arguments.
//! 4. The same as 3 with the table of 32-bit programs.
//!
//! For a call that is in no table, the filter reads only the architecture and the number. When the
//! filter is installed, the kernel (5.11 and later) finds such calls and never runs the filter for
//! them.
//!
//! # Source
//! The instruction set and the layout of `struct seccomp_data`:
//! Documentation/userspace-api/seccomp_filter.rst, seccomp(2).

use libc::sock_filter;

use super::abi::{self, ARCH_COMPAT, ARCH_NATIVE, COMPAT, Call, IPC_SHMAT, IPC_SHMDT, X32_BIT};
use crate::ranges::HARMLESS_ADVICE;

/// The arguments with which a call is traced.
enum When {
    Always,
    /// Argument `arg` has at least one bit of `set` and no bit of `clear`.
    Bits {
        arg: u32,
        set: u32,
        clear: u32,
    },
    /// Argument `arg` has no bit of `clear`.
    NoBits {
        arg: u32,
        clear: u32,
    },
    /// Argument `arg`, as 64 bits, is not zero.
    NonZero {
        arg: u32,
    },
    /// Argument `arg` is none of these values.
    NoneOf {
        arg: u32,
        values: &'static [u32],
    },
    /// The low 16 bits of argument `arg` are one of these values.
    LowHalfOf {
        arg: u32,
        values: [u32; 2],
    },
}

/// Which calls are traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Traced {
    /// Calls that may change a translation.
    Changes,
    /// Calls that may change a translation, and calls that only make a mapping.
    ChangesAndBirths,
}

fn when(call: Call, traced: Traced) -> When {
    match call {
        Call::Mmap | Call::Shmat if traced == Traced::ChangesAndBirths => When::Always,
        Call::Mmap => When::Bits {
            arg: 3,
            set: libc::MAP_FIXED as u32,
            clear: libc::MAP_FIXED_NOREPLACE as u32,
        },
        Call::Clone => When::NoBits {
            arg: 0,
            clear: libc::CLONE_VM as u32,
        },
        Call::Shmat => When::Bits {
            arg: 2,
            set: libc::SHM_REMAP as u32,
            clear: 0,
        },
        Call::Brk => When::NonZero { arg: 0 },
        Call::Madvise => When::NoneOf {
            arg: 2,
            values: HARMLESS_ADVICE,
        },
        Call::Ipc => When::LowHalfOf {
            arg: 0,
            values: [IPC_SHMAT as u32, IPC_SHMDT as u32],
        },
        // The filter does not test the arguments of these calls: their flags are in memory, or a
        // call without effect is rare. `decode` finds such a call.
        Call::OldMmap
        | Call::Clone3
        | Call::ProcessMadvise
        | Call::ProcessMrelease
        | Call::Munmap
        | Call::Mremap
        | Call::Shmdt
        | Call::Mprotect
        | Call::PkeyMprotect
        | Call::Mbind
        | Call::MovePages
        | Call::MigratePages
        | Call::RemapFilePages
        | Call::Fork => When::Always,
    }
}

/// Assembles the filter.
pub(super) fn program(traced: Traced) -> Vec<sock_filter> {
    let mut asm = Asm {
        code: Vec::new(),
        fixups: Vec::new(),
        traced,
    };
    asm.load(OFFSET_ARCH);
    let foreign = asm.jump_later(JEQ, ARCH_NATIVE, Side::Else);
    asm.load(OFFSET_NUMBER);
    if X32_BIT != 0 {
        let plain = asm.jump_later(JGE, X32_BIT as u32, Side::Else);
        asm.ret(RET_TRACE);
        asm.land(plain);
    }
    asm.table(&abi::native());
    asm.land(foreign);
    let unknown = asm.jump_later(JEQ, ARCH_COMPAT, Side::Else);
    asm.load(OFFSET_NUMBER);
    asm.table(COMPAT);
    asm.land(unknown);
    asm.ret(RET_TRACE);
    assert!(
        asm.fixups.iter().all(|fixup| fixup.landed),
        "a jump of the filter goes nowhere"
    );
    asm.code
}

/// The branch of a conditional jump whose target is filled in later. The other branch continues at
/// the next instruction.
#[derive(Clone, Copy)]
enum Side {
    Then,
    Else,
}

struct Fixup {
    at: usize,
    side: Side,
    landed: bool,
}

/// A jump whose target is not known yet.
struct Jump(usize);

struct Asm {
    code: Vec<sock_filter>,
    fixups: Vec<Fixup>,
    traced: Traced,
}

impl Asm {
    /// Emits the search for the number in `table`, and the argument tests of each call. Every path
    /// ends in a return.
    fn table(&mut self, table: &[(u32, Call)]) {
        let mut sorted = table.to_vec();
        sorted.sort_unstable_by_key(|(number, _)| *number);
        let mut hits = Vec::new();
        self.search(&sorted, &mut hits);
        for (jump, call) in hits {
            self.land(jump);
            self.test(when(call, self.traced));
        }
    }

    /// Emits a binary search. Each number that matches jumps to a test that is emitted later.
    fn search(&mut self, sorted: &[(u32, Call)], hits: &mut Vec<(Jump, Call)>) {
        if sorted.len() <= 3 {
            for (number, call) in sorted {
                hits.push((self.jump_later(JEQ, *number, Side::Then), *call));
            }
            self.ret(RET_ALLOW);
            return;
        }
        let (low, high) = sorted.split_at(sorted.len() / 2);
        let above = self.jump_later(JGE, high[0].0, Side::Then);
        self.search(low, hits);
        self.land(above);
        self.search(high, hits);
    }

    fn test(&mut self, when: When) {
        match when {
            When::Always => self.ret(RET_TRACE),
            When::Bits { arg, set, clear } => {
                self.load(low_of(arg));
                let allow = self.jump_later(JSET, set, Side::Else);
                let also_allow = self.jump_later(JSET, clear, Side::Then);
                self.ret(RET_TRACE);
                self.land(allow);
                self.land(also_allow);
                self.ret(RET_ALLOW);
            }
            When::NoBits { arg, clear } => {
                self.load(low_of(arg));
                let allow = self.jump_later(JSET, clear, Side::Then);
                self.ret(RET_TRACE);
                self.land(allow);
                self.ret(RET_ALLOW);
            }
            When::NonZero { arg } => {
                self.load(low_of(arg));
                let trace = self.jump_later(JEQ, 0, Side::Else);
                self.load(high_of(arg));
                let also_trace = self.jump_later(JEQ, 0, Side::Else);
                self.ret(RET_ALLOW);
                self.land(trace);
                self.land(also_trace);
                self.ret(RET_TRACE);
            }
            When::NoneOf { arg, values } => {
                self.load(low_of(arg));
                let allow: Vec<Jump> = values
                    .iter()
                    .map(|value| self.jump_later(JEQ, *value, Side::Then))
                    .collect();
                self.ret(RET_TRACE);
                allow.into_iter().for_each(|jump| self.land(jump));
                self.ret(RET_ALLOW);
            }
            When::LowHalfOf { arg, values } => {
                self.load(low_of(arg));
                self.emit(AND, 0xffff, 0, 0);
                let trace = values.map(|value| self.jump_later(JEQ, value, Side::Then));
                self.ret(RET_ALLOW);
                trace.into_iter().for_each(|jump| self.land(jump));
                self.ret(RET_TRACE);
            }
        }
    }

    fn emit(&mut self, code: u32, k: u32, jt: u8, jf: u8) {
        self.code.push(sock_filter {
            code: code as u16,
            jt,
            jf,
            k,
        });
    }

    fn load(&mut self, offset: u32) {
        self.emit(LOAD, offset, 0, 0);
    }

    fn ret(&mut self, action: u32) {
        self.emit(RET, action, 0, 0);
    }

    fn jump_later(&mut self, test: u32, k: u32, side: Side) -> Jump {
        self.emit(test, k, 0, 0);
        self.fixups.push(Fixup {
            at: self.code.len() - 1,
            side,
            landed: false,
        });
        Jump(self.fixups.len() - 1)
    }

    /// Makes `jump` go to the next instruction.
    fn land(&mut self, jump: Jump) {
        let fixup = &mut self.fixups[jump.0];
        let distance = self.code.len() - fixup.at - 1;
        let distance =
            u8::try_from(distance).expect("a jump of the filter is at most 255 instructions");
        match fixup.side {
            Side::Then => self.code[fixup.at].jt = distance,
            Side::Else => self.code[fixup.at].jf = distance,
        }
        fixup.landed = true;
    }
}

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const JEQ: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const JGE: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const JSET: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const RET: u32 = libc::BPF_RET | libc::BPF_K;
const RET_ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const RET_TRACE: u32 = libc::SECCOMP_RET_TRACE | DATUM as u32;
/// The datum that the filter passes to the tracer at each stop. A program may install filters of
/// its own that pass data to a tracer. If both filters ask for a stop, the kernel reports the datum
/// of the filter installed last, which is the program's.
pub(super) const DATUM: u16 = 0x6d75;

/// Offsets in `struct seccomp_data`.
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;

/// The offset of the low half of an argument. All supported architectures are little-endian.
const fn low_of(arg: u32) -> u32 {
    16 + 8 * arg
}

const fn high_of(arg: u32) -> u32 {
    low_of(arg) + 4
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel would.
    fn run(arch: u32, number: u32, args: [u64; 6]) -> u32 {
        run_with(Traced::Changes, arch, number, args)
    }

    fn run_with(traced: Traced, arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let program = program(traced);
        let (mut pc, mut a) = (0, 0_u32);
        loop {
            let insn = program[pc];
            pc += 1;
            let jump = |yes: bool| usize::from(if yes { insn.jt } else { insn.jf });
            match u32::from(insn.code) {
                LOAD if insn.k == OFFSET_NUMBER => a = number,
                LOAD if insn.k == OFFSET_ARCH => a = arch,
                LOAD => a = (args[(insn.k as usize - 16) / 8] >> (8 * (insn.k & 4))) as u32,
                AND => a &= insn.k,
                JEQ => pc += jump(a == insn.k),
                JGE => pc += jump(a >= insn.k),
                JSET => pc += jump(a & insn.k != 0),
                RET => return insn.k,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn native(number: libc::c_long, args: [u64; 6]) -> bool {
        run(ARCH_NATIVE, number as u32, args) == RET_TRACE
    }

    #[test]
    fn every_call_of_a_table_is_found_and_no_other_number_is() {
        let args = [1, 0, 4, libc::MAP_FIXED as u64, 0, 0];
        let traced: Vec<u32> = (0..600)
            .filter(|nr| run(ARCH_NATIVE, *nr, args) == RET_TRACE)
            .collect();
        let mut expected: Vec<u32> = abi::native().iter().map(|row| row.0).collect();
        expected.retain(|nr| *nr != libc::SYS_shmat as u32);
        expected.sort_unstable();
        assert_eq!(traced, expected);
    }

    #[test]
    fn only_a_mmap_that_replaces_is_traced() {
        let mmap = |flags: i32| native(libc::SYS_mmap, [0, 0, 0, flags as u64, 0, 0]);
        assert!(mmap(libc::MAP_FIXED | libc::MAP_PRIVATE));
        assert!(!mmap(libc::MAP_PRIVATE) && !mmap(libc::MAP_FIXED_NOREPLACE));
        assert!(
            !mmap(libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE),
            "the kernel lets NOREPLACE win"
        );
    }

    #[test]
    fn every_mmap_is_traced_if_births_are_asked_for() {
        for number in [libc::SYS_mmap, libc::SYS_shmat] {
            assert_eq!(
                run_with(Traced::ChangesAndBirths, ARCH_NATIVE, number as u32, [0; 6]),
                RET_TRACE
            );
            assert!(!native(number, [0; 6]));
        }
    }

    #[test]
    fn a_clone_that_shares_memory_is_not_traced_and_fork_is() {
        assert!(native(
            libc::SYS_clone,
            [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]
        ));
        assert!(!native(
            libc::SYS_clone,
            [(libc::CLONE_VM | libc::CLONE_VFORK) as u64, 0, 0, 0, 0, 0]
        ));
    }

    #[test]
    fn a_query_of_the_break_is_not_traced_and_any_address_is() {
        assert!(!native(libc::SYS_brk, [0; 6]));
        assert!(
            native(libc::SYS_brk, [1 << 32, 0, 0, 0, 0, 0])
                && native(libc::SYS_brk, [1, 0, 0, 0, 0, 0])
        );
    }

    #[test]
    fn harmful_and_unknown_advice_is_traced() {
        let madvise = |advice: u64| native(libc::SYS_madvise, [0, 0, advice, 0, 0, 0]);
        for advice in [4, 8, 9, 13, 21, 23, 24, 25, 100, 101, 102, 5000] {
            assert!(madvise(advice), "{advice}");
        }
        assert!(
            !HARMLESS_ADVICE
                .iter()
                .any(|advice| madvise(u64::from(*advice)))
        );
    }

    #[test]
    fn an_unknown_architecture_is_traced() {
        assert_eq!(run(0x1234, 0, [0; 6]), RET_TRACE);
    }

    #[cfg(target_arch = "aarch64")]
    #[test]
    fn calls_of_32_bit_programs_have_their_own_numbers_in_the_filter() {
        assert_eq!(run(ARCH_COMPAT, 91, [0; 6]), RET_TRACE);
        assert_eq!(run(ARCH_COMPAT, libc::SYS_munmap as u32, [0; 6]), RET_ALLOW);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn i386_calls_have_their_own_numbers_and_every_x32_call_is_traced() {
        assert_eq!(run(ARCH_COMPAT, 91, [0; 6]), RET_TRACE);
        assert_eq!(run(ARCH_COMPAT, libc::SYS_munmap as u32, [0; 6]), RET_ALLOW);
        assert_eq!(run(ARCH_COMPAT, 117, [0x1_0015, 0, 0, 0, 0, 0]), RET_TRACE);
        assert_eq!(run(ARCH_COMPAT, 117, [1, 0, 0, 0, 0, 0]), RET_ALLOW);
        assert_eq!(run(ARCH_NATIVE, X32_BIT as u32 | 39, [0; 6]), RET_TRACE);
    }
}
