//! An assembler for the few BPF instructions that the programs of this source need.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Registers. A call overwrites registers 1 to 5, preserves 6 to 9, and returns its result in 0.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    /// The end of the stack frame, read only.
    R10,
}

/// 64-bit operations, `BPF_ALU64`, with an immediate operand (`BPF_K`).
#[derive(Debug, Clone, Copy)]
pub(super) enum Op {
    Add = 0x07,
    Sub = 0x17,
    Or = 0x47,
    And = 0x57,
    Shl = 0x67,
    Shr = 0x77,
    Mul = 0x27,
    Xor = 0xa7,
    Mov = 0xb7,
}

/// The bit that selects a register as the operand (`BPF_X`).
const BY_REGISTER: u8 = 0x08;

/// The conditions of jumps, on unsigned 64-bit values (`BPF_JMP`).
#[derive(Debug, Clone, Copy)]
pub(super) enum If {
    Always = 0x05,
    Equal = 0x15,
    Greater = 0x25,
    NotEqual = 0x55,
    NotLess = 0x35,
    Less = 0xa5,
}

/// A program under construction. `L` names its jump targets.
pub(super) struct Assembler<L> {
    code: Vec<u64>,
    labels: HashMap<L, usize>,
    jumps: Vec<(usize, L)>,
}

/// Encodes `struct bpf_insn`: eight bits of opcode, four bits each for destination and source, an
/// offset, an immediate.
fn instruction(code: u8, dst: Reg, src: u8, offset: i16, immediate: i32) -> u64 {
    u64::from(code)
        | (dst as u64) << 8
        | u64::from(src) << 12
        | u64::from(offset as u16) << 16
        | u64::from(immediate as u32) << 32
}

/// Where [`Assembler::peek`] stores the value that it has read, relative to the end of the stack.
pub(super) const PEEKED: isize = -8;

impl<L: Copy + Eq + Hash + Debug> Assembler<L> {
    pub(super) fn new() -> Self {
        Self {
            code: Vec::new(),
            labels: HashMap::new(),
            jumps: Vec::new(),
        }
    }

    fn push(&mut self, code: u8, dst: Reg, src: u8, offset: isize, immediate: i32) {
        let offset = i16::try_from(offset).expect("offsets of these programs are small");
        self.code
            .push(instruction(code, dst, src, offset, immediate));
    }

    /// `dst op= immediate`.
    pub(super) fn op(&mut self, op: Op, dst: Reg, immediate: i32) {
        self.push(op as u8, dst, 0, 0, immediate);
    }

    /// `dst op= src`.
    pub(super) fn op_reg(&mut self, op: Op, dst: Reg, src: Reg) {
        self.push(op as u8 | BY_REGISTER, dst, src as u8, 0, 0);
    }

    /// `dst = (u32)dst`.
    pub(super) fn lower_half(&mut self, dst: Reg) {
        self.push(0xbc, dst, dst as u8, 0, 0);
    }

    /// `dst = *(u64 *)(src + offset)`.
    pub(super) fn load(&mut self, dst: Reg, src: Reg, offset: isize) {
        self.push(0x79, dst, src as u8, offset, 0);
    }

    /// `dst = *(u16 *)src`.
    pub(super) fn load_u16(&mut self, dst: Reg, src: Reg) {
        self.push(0x69, dst, src as u8, 0, 0);
    }

    /// `dst = *(u32 *)(src + offset)`.
    pub(super) fn load_u32(&mut self, dst: Reg, src: Reg, offset: isize) {
        self.push(0x61, dst, src as u8, offset, 0);
    }

    /// `*(u64 *)(dst + offset) = immediate`.
    pub(super) fn store_immediate(&mut self, dst: Reg, offset: isize, immediate: i32) {
        self.push(0x7a, dst, 0, offset, immediate);
    }

    /// `*(u64 *)(dst + offset) = src`.
    pub(super) fn store(&mut self, dst: Reg, offset: isize, src: Reg) {
        self.push(0x7b, dst, src as u8, offset, 0);
    }

    /// `atomic_add(dst + offset, src)`. With `fetch`, `src` receives the old value, and the
    /// addition is also a full barrier.
    pub(super) fn atomic_add(&mut self, dst: Reg, offset: isize, src: Reg, fetch: bool) {
        self.push(0xdb, dst, src as u8, offset, i32::from(fetch));
    }

    /// `src = exchange(dst + offset, src)`, which is a full barrier.
    pub(super) fn exchange(&mut self, dst: Reg, offset: isize, src: Reg) {
        self.push(0xdb, dst, src as u8, offset, 0xe1);
    }

    /// Emits a full barrier, except on x86-64. That processor keeps loads in order, and the kernel
    /// executes a locked instruction between its own stores and the program. An atomic addition
    /// that fetches is a full barrier, whatever word it changes. The addition here changes the word
    /// at [`PEEKED`]. Overwrites register 0.
    pub(super) fn fence(&mut self) {
        if cfg!(not(target_arch = "x86_64")) {
            self.store_immediate(Reg::R10, PEEKED, 0);
            self.op(Op::Mov, Reg::R0, 0);
            self.atomic_add(Reg::R10, PEEKED, Reg::R0, true);
        }
    }

    /// `dst = immediate`, 64 bits in two instructions.
    pub(super) fn wide(&mut self, dst: Reg, kind: u8, low: u32, high: u32) {
        self.push(0x18, dst, kind, 0, low as i32);
        self.code.push(u64::from(high) << 32);
    }

    pub(super) fn map(&mut self, dst: Reg, map: BorrowedFd<'_>) {
        self.wide(dst, 1, map.as_raw_fd() as u32, 0);
    }

    pub(super) fn map_value(&mut self, dst: Reg, map: BorrowedFd<'_>) {
        self.wide(dst, 2, map.as_raw_fd() as u32, 0);
    }

    pub(super) fn call(&mut self, helper: i32) {
        self.push(0x85, Reg::R0, 0, 0, helper);
    }

    pub(super) fn jump(&mut self, condition: If, dst: Reg, immediate: i32, to: L) {
        self.jumps.push((self.code.len(), to));
        self.push(condition as u8, dst, 0, 0, immediate);
    }

    pub(super) fn jump_reg(&mut self, condition: If, dst: Reg, src: Reg, to: L) {
        self.jumps.push((self.code.len(), to));
        self.push(condition as u8 | BY_REGISTER, dst, src as u8, 0, 0);
    }

    pub(super) fn goto(&mut self, to: L) {
        self.jump(If::Always, Reg::R0, 0, to);
    }

    pub(super) fn label(&mut self, label: L) {
        let before = self.labels.insert(label, self.code.len());
        assert!(before.is_none(), "one place for {label:?}");
    }

    /// Returns the length of the program so far.
    pub(super) fn len(&self) -> usize {
        self.code.len()
    }

    pub(super) fn exit(&mut self) {
        self.push(0x95, Reg::R0, 0, 0, 0);
    }

    /// Reads `bytes` of kernel memory from the address in register 3 into the zeroed word at
    /// [`PEEKED`]. Register 0 is zero on success. Registers 1 to 5 are overwritten.
    pub(super) fn peek(&mut self, bytes: i32) {
        const PROBE_READ_KERNEL: i32 = 113;
        self.store_immediate(Reg::R10, PEEKED, 0);
        self.op_reg(Op::Mov, Reg::R1, Reg::R10);
        self.op(Op::Add, Reg::R1, PEEKED as i32);
        self.op(Op::Mov, Reg::R2, bytes);
        self.call(PROBE_READ_KERNEL);
    }

    pub(super) fn finish(mut self) -> Vec<u64> {
        for (at, label) in self.jumps {
            let to = self.labels[&label] as i64;
            let offset = i16::try_from(to - at as i64 - 1).expect("the program is short");
            self.code[at] |= u64::from(offset as u16) << 16;
        }
        self.code
    }
}
