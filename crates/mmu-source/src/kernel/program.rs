//! The BPF program, as instructions.
//!
//! It runs at the tracepoint `kvm:kvm_unmap_hva_range`, whose arguments are the start and the end of what is about to
//! change. In C it would read:
//!
//! ```c
//! seen++;                                            // Every event, armed or not: `arm` needs it.
//! if (!armed) return;
//! if (wide) goto hit;
//! last = end - 1;
//! for (level = 0; ; level++) {                       // The level of the event.
//!     if (level == LEVELS) goto hit;
//!     if ((last >> shift[level]) - (start >> shift[level]) < SPAN) break;
//! }
//! for (granule = start >> shift[level]; granule <= last >> shift[level]; granule++)
//!     if (sum[level][hash(granule)]) goto hit;
//! while (++level < LEVELS)
//!     if (ranges[level] && (own[level][hash(start >> shift[level])] || own[level][hash(last >> shift[level])])) goto hit;
//! return;
//! // A granule is armed if both of its counters are above zero: `hash` stands for two.
//! hit:
//! number = ++generation;                             // Before the page tables change, and before the record is there.
//! record = bpf_ringbuf_reserve(ring, 24);
//! if (!record) { lost++; return; }
//! *record = { start, end, number };
//! bpf_ringbuf_submit(record);
//! ```
//!
//! The loops over levels are unrolled by [`build`].

use super::filter::{FACTORS, LEVELS, LINE_BITS, SPAN, shift, start_of};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Where the words of the shared header lie. Those that are written often have a cache line each.
pub(super) mod header {
    pub(in super::super) const BYTES: usize = 4096;
    /// How many events hit an armed range.
    pub(in super::super) const GENERATION: usize = 0;
    /// How many events there were.
    pub(in super::super) const SEEN: usize = 64;
    /// How many hits found the ring full.
    pub(in super::super) const LOST: usize = 128;
    /// How many ranges are armed.
    pub(in super::super) const ARMED: usize = 192;
    /// How many of them are wider than the filter.
    pub(in super::super) const WIDE: usize = 200;
    /// How many of them belong to each level: a word for each.
    pub(in super::super) const RANGES: usize = 256;
}

/// The size of a record: start, end, number.
const RECORD: i32 = 24;

/// Registers. 1 to 5 are lost in a call, 6 to 9 are not; 0 is a call's result.
#[derive(Debug, Clone, Copy)]
enum Reg {
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
}
use Reg::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R9};

const START: Reg = R6;
const LAST: Reg = R7;
const HEADER: Reg = R8;
const HASHES: [Reg; 2] = [R1, R9];

/// Operations of 64 bits, `BPF_ALU64`, with an immediate (`BPF_K`).
#[derive(Debug, Clone, Copy)]
enum Op {
    Add = 0x07,
    Sub = 0x17,
    And = 0x57,
    Shl = 0x67,
    Shr = 0x77,
    Mul = 0x27,
    Mov = 0xb7,
}

/// The bit that makes the source a register (`BPF_X`).
const BY_REGISTER: u8 = 0x08;

/// Conditions of 64 bits, `BPF_JMP`; unsigned.
#[derive(Debug, Clone, Copy)]
enum If {
    Always = 0x05,
    Equal = 0x15,
    Greater = 0x25,
    NotEqual = 0x55,
    Less = 0xa5,
}

/// A place to jump to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Label {
    Hit,
    Lost,
    Out,
    Level(usize),
    Granule(usize),
    /// Behind the test of a granule that is not armed; they are numbered.
    Passed(usize),
    Coarser(usize),
}

#[derive(Default)]
struct Assembler {
    code: Vec<u64>,
    labels: HashMap<Label, usize>,
    jumps: Vec<(usize, Label)>,
    tests: usize,
}

/// `struct bpf_insn`: eight bits of code, four each of destination and source, an offset, an immediate.
fn instruction(code: u8, dst: Reg, src: u8, offset: i16, immediate: i32) -> u64 {
    u64::from(code)
        | (dst as u64) << 8
        | u64::from(src) << 12
        | u64::from(offset as u16) << 16
        | u64::from(immediate as u32) << 32
}

impl Assembler {
    fn push(&mut self, code: u8, dst: Reg, src: u8, offset: usize, immediate: i32) {
        let offset = i16::try_from(offset).expect("offsets of this program are small");
        self.code.push(instruction(code, dst, src, offset, immediate));
    }

    /// `dst op= immediate`.
    fn op(&mut self, op: Op, dst: Reg, immediate: i32) {
        self.push(op as u8, dst, 0, 0, immediate);
    }

    /// `dst op= src`.
    fn op_reg(&mut self, op: Op, dst: Reg, src: Reg) {
        self.push(op as u8 | BY_REGISTER, dst, src as u8, 0, 0);
    }

    /// `dst = *(u64 *)(src + offset)`.
    fn load(&mut self, dst: Reg, src: Reg, offset: usize) {
        self.push(0x79, dst, src as u8, offset, 0);
    }

    /// `dst = *(u16 *)src`.
    fn load_u16(&mut self, dst: Reg, src: Reg) {
        self.push(0x69, dst, src as u8, 0, 0);
    }

    /// `*(u64 *)(dst + offset) = src`.
    fn store(&mut self, dst: Reg, offset: usize, src: Reg) {
        self.push(0x7b, dst, src as u8, offset, 0);
    }

    /// `atomic_add(dst + offset, src)`, and with `fetch` `src =` its former value, which makes it a full barrier too.
    fn atomic_add(&mut self, dst: Reg, offset: usize, src: Reg, fetch: bool) {
        self.push(0xdb, dst, src as u8, offset, i32::from(fetch));
    }

    /// `dst = immediate`, 64 bits in two instructions.
    fn wide(&mut self, dst: Reg, kind: u8, low: u32, high: u32) {
        self.push(0x18, dst, kind, 0, low as i32);
        self.code.push(u64::from(high) << 32);
    }

    fn map(&mut self, dst: Reg, map: BorrowedFd<'_>) {
        self.wide(dst, 1, map.as_raw_fd() as u32, 0);
    }

    fn map_value(&mut self, dst: Reg, map: BorrowedFd<'_>) {
        self.wide(dst, 2, map.as_raw_fd() as u32, 0);
    }

    fn call(&mut self, helper: i32) {
        self.push(0x85, R0, 0, 0, helper);
    }

    fn jump(&mut self, condition: If, dst: Reg, immediate: i32, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(condition as u8, dst, 0, 0, immediate);
    }

    fn jump_reg(&mut self, condition: If, dst: Reg, src: Reg, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(condition as u8 | BY_REGISTER, dst, src as u8, 0, 0);
    }

    fn goto(&mut self, to: Label) {
        self.jump(If::Always, R0, 0, to);
    }

    fn label(&mut self, label: Label) {
        let before = self.labels.insert(label, self.code.len());
        assert!(before.is_none(), "one place for {label:?}");
    }

    /// Jumps to `Hit` if both counters of the granule in `granule` are above zero. Uses registers 0 and 4.
    fn test_granule(&mut self, level: usize, table: BorrowedFd<'_>, granule: Reg) {
        let passed = Label::Passed(self.tests);
        self.tests += 1;
        for hash in HASHES {
            self.op_reg(Op::Mov, R4, granule);
            self.op(Op::Shr, R4, 4);
            self.op_reg(Op::Mul, R4, hash);
            self.op(Op::Shr, R4, 64 - LINE_BITS as i32);
            self.op(Op::Shl, R4, 5);
            self.op_reg(Op::Mov, R0, granule);
            self.op(Op::And, R0, 15);
            self.op(Op::Shl, R0, 1);
            self.op_reg(Op::Add, R4, R0);
            self.op(Op::Add, R4, start_of(level) as i32);
            self.map_value(R0, table);
            self.op_reg(Op::Add, R0, R4);
            self.load_u16(R0, R0);
            self.jump(If::Equal, R0, 0, passed);
        }
        self.goto(Label::Hit);
        self.label(passed);
    }

    /// `first = start >> shift; last = last >> shift` into registers 2 and 3.
    fn granules(&mut self, level: usize) {
        for (dst, src) in [(R2, START), (R3, LAST)] {
            self.op_reg(Op::Mov, dst, src);
            self.op(Op::Shr, dst, shift(level) as i32);
        }
    }

    fn finish(mut self) -> Vec<u64> {
        for (at, label) in self.jumps {
            let to = self.labels[&label] as i64;
            let offset = i16::try_from(to - at as i64 - 1).expect("the program is short");
            self.code[at] |= u64::from(offset as u16) << 16;
        }
        self.code
    }
}

/// The maps of the program.
#[derive(Debug, Clone, Copy)]
pub(super) struct Maps<'a> {
    pub(super) header: BorrowedFd<'a>,
    pub(super) sum: BorrowedFd<'a>,
    pub(super) own: BorrowedFd<'a>,
    pub(super) ring: BorrowedFd<'a>,
}

/// Builds the program over these maps.
pub(super) fn build(maps: Maps<'_>) -> Vec<u64> {
    let mut a = Assembler::default();
    a.load(START, R1, 0);
    a.load(LAST, R1, 8);
    a.op(Op::Sub, LAST, 1);
    a.map_value(HEADER, maps.header);
    a.op(Op::Mov, R2, 1);
    a.atomic_add(HEADER, header::SEEN, R2, true);
    a.load(R2, HEADER, header::ARMED);
    a.jump(If::Equal, R2, 0, Label::Out);
    a.load(R2, HEADER, header::WIDE);
    a.jump(If::NotEqual, R2, 0, Label::Hit);
    for (hash, factor) in HASHES.into_iter().zip(FACTORS) {
        a.wide(hash, 0, factor as u32, (factor >> 32) as u32);
    }
    for level in 0..LEVELS {
        a.granules(level);
        a.op_reg(Op::Mov, R4, R3);
        a.op_reg(Op::Sub, R4, R2);
        a.jump(If::Less, R4, SPAN as i32, Label::Level(level));
    }
    a.goto(Label::Hit);
    for level in 0..LEVELS {
        a.label(Label::Level(level));
        // Register 5 bounds the loop where the verifier can see it.
        a.op(Op::Mov, R5, 0);
        a.label(Label::Granule(level));
        a.test_granule(level, maps.sum, R2);
        a.op(Op::Add, R2, 1);
        a.jump_reg(If::Greater, R2, R3, Label::Coarser(level + 1));
        a.op(Op::Add, R5, 1);
        a.jump(If::Less, R5, SPAN as i32, Label::Granule(level));
        a.goto(Label::Hit);
    }
    for level in 1..LEVELS {
        a.label(Label::Coarser(level));
        a.load(R0, HEADER, header::RANGES + 8 * level);
        a.jump(If::Equal, R0, 0, Label::Coarser(level + 1));
        a.granules(level);
        a.test_granule(level, maps.own, R2);
        a.jump_reg(If::Equal, R2, R3, Label::Coarser(level + 1));
        a.test_granule(level, maps.own, R3);
    }
    a.label(Label::Coarser(LEVELS));
    a.goto(Label::Out);
    hit(&mut a, maps.ring);
    a.finish()
}

/// The end of the program: counts and records the event.
fn hit(a: &mut Assembler, ring: BorrowedFd<'_>) {
    const RINGBUF_RESERVE: i32 = 131;
    const RINGBUF_SUBMIT: i32 = 132;
    a.label(Label::Hit);
    a.op(Op::Mov, R9, 1);
    a.atomic_add(HEADER, header::GENERATION, R9, true);
    a.op(Op::Add, R9, 1);
    a.map(R1, ring);
    a.op(Op::Mov, R2, RECORD);
    a.op(Op::Mov, R3, 0);
    a.call(RINGBUF_RESERVE);
    a.jump(If::Equal, R0, 0, Label::Lost);
    a.store(R0, 0, START);
    a.op(Op::Add, LAST, 1);
    a.store(R0, 8, LAST);
    a.store(R0, 16, R9);
    a.op_reg(Op::Mov, R1, R0);
    a.op(Op::Mov, R2, 0);
    a.call(RINGBUF_SUBMIT);
    a.label(Label::Out);
    a.op(Op::Mov, R0, 0);
    a.push(0x95, R0, 0, 0, 0);
    a.label(Label::Lost);
    a.op(Op::Mov, R1, 1);
    a.atomic_add(HEADER, header::LOST, R1, false);
    a.goto(Label::Out);
}
