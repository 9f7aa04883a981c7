//! Finds out whose address space an event changes, for the program of a broker's client.
//!
//! The tracepoint does not say which address space changes. A client must not learn of other
//! processes' changes: neither their addresses nor, by arming one page after the other, whether a
//! change occurred. But the kernel announces a change by a `struct mmu_notifier_range` on the stack
//! of the task that makes the change. In that struct the address space, the start and the end are
//! three consecutive words. The program searches that stack for the three words. The search begins
//! at the program's own context, which is also on the stack, and ends at the registers that were
//! saved at the entry into the kernel.
//!
//! ```text
//!   context ... frames of the notifiers ... [ mm | start | end | ... ] ... the caller's frames ... registers
//! ```
//!
//! If the client's address space changes, its three words are on the stack, and the search finds
//! them: the client misses no change. If another address space changes, its struct has another
//! `mm`, so the program does not count or record the event. There are two exceptions: a stale copy
//! of the client's three words, which an earlier change of the same range has left on that stack,
//! and a stack that is deeper than [`STACK`].
//!
//! The verifier follows every iteration of the loop, and a branch costs the verifier far more than
//! the instructions between branches. So the program compares a piece of the stack without
//! branches. First it checks whether the lower half of `mm` is among the words of the piece, and
//! only then whether all three words are.
//!
//! # Source
//! In Linux 5.15 to 6.18 every caller of `mmu_notifier_invalidate_range_start` has the range in a
//! local variable, and `bpf_trace_run2` has the context in a local variable.

use super::asm::{Assembler, If, Op, PEEKED, Reg};
use super::btf::Btf;
use super::layout::private;
use super::sys;
use Reg::{R0, R1, R2, R3, R4, R5, R8, R9, R10};
use std::fmt::Debug;
use std::hash::Hash;
use std::os::fd::BorrowedFd;

/// Where the address of the context is stored, relative to the end of the stack.
const CONTEXT: isize = PEEKED - 8;
/// Where the end of the search is stored, in bytes from the context: the last piece must begin
/// below it.
const LENGTH: isize = CONTEXT - 8;
/// The number of stack bytes that are compared as one piece.
const PIECE: isize = 256;
const BUFFER: isize = LENGTH - PIECE;
/// The distance between the starts of two pieces. The pieces overlap, because the three words may
/// cross the border.
const STEP: isize = PIECE - 16;
/// The largest number of stack bytes that are searched, because the verifier requires a bound. Only
/// on a kernel with KASAN can the three words be deeper on the stack. Then the change counts as the
/// client's.
const STACK: isize = 16 << 10;
/// How many bytes the last piece may extend into the saved registers. The piece must not extend
/// beyond the registers.
const REGISTERS: isize = 168;

/// Tells whether the three words are consecutive in this kernel, according to its BTF. False if
/// there is no BTF.
pub(super) fn can_be_told() -> bool {
    let Ok(vmlinux) = sys::Whole::of("/sys/kernel/btf/vmlinux") else {
        return false;
    };
    let Some(btf) = Btf::parse(vmlinux.bytes(), None) else {
        return false;
    };
    let [mm, start, end] =
        ["mm", "start", "end"].map(|member| btf.offset("mmu_notifier_range", member));
    mm.is_some_and(|mm| start == Some(mm + 8) && end == Some(mm + 16))
}

/// Stores the address of the context, which is in register 1 when the program starts.
pub(super) fn keep_context<L: Copy + Eq + Hash + Debug>(a: &mut Assembler<L>) {
    a.store(R10, CONTEXT, R1);
}

/// Falls through if the change belongs to the client's address space, or if the stack is too deep
/// to find out. Jumps to `others` otherwise. The change covers register `start` to register `last`,
/// inclusive. Preserves only registers 6 and 7.
pub(super) fn check<L: Copy + Eq + Hash + Debug>(
    a: &mut Assembler<L>,
    private: BorrowedFd<'_>,
    (start, last): (Reg, Reg),
    label: impl Fn(usize) -> L,
    others: L,
) {
    const GET_CURRENT_TASK_BTF: i32 = 158;
    const TASK_PT_REGS: i32 = 175;
    const PROBE_READ_KERNEL: i32 = 113;
    let [piece, next, ours] = [0, 1, 2].map(label);
    let words = || (0..PIECE / 8).map(|word| BUFFER + 8 * word);
    a.load(R9, R10, CONTEXT);
    a.call(GET_CURRENT_TASK_BTF);
    a.op_reg(Op::Mov, R1, R0);
    a.call(TASK_PT_REGS);
    a.op_reg(Op::Sub, R0, R9);
    a.op(Op::Sub, R0, (PIECE - REGISTERS) as i32);
    a.store(R10, LENGTH, R0);
    a.op(Op::Mov, R8, 0);
    a.label(piece);
    a.op_reg(Op::Mov, R1, R10);
    a.op(Op::Add, R1, BUFFER as i32);
    a.op(Op::Mov, R2, PIECE as i32);
    a.op_reg(Op::Mov, R3, R9);
    a.op_reg(Op::Add, R3, R8);
    a.call(PROBE_READ_KERNEL);
    a.jump(If::NotEqual, R0, 0, others);
    a.map_value(R1, private);
    a.load(R1, R1, private::SPACE as isize);
    a.jump(If::Equal, R1, 0, others);
    // If the lower half of a word differs from that of `mm`, the XOR is between 1 and 2^32 - 1, and
    // one less has a clear top bit. If the halves are equal, the XOR is zero, and one less has the
    // top bit set.
    let (mm, all) = (R1, R4);
    a.op_reg(Op::Mov, R0, mm);
    a.lower_half(R0);
    a.op(Op::Mov, all, 0);
    for word in words() {
        a.load_u32(R3, R10, word);
        a.op_reg(Op::Xor, R3, R0);
        a.op(Op::Sub, R3, 1);
        a.op_reg(Op::Or, all, R3);
    }
    a.op(Op::Shr, all, 63);
    a.jump(If::Equal, all, 0, next);
    // `one`, `two` and `three` collect the differing bits of the last one, two and three words. The
    // lowest bit is ignored: it is zero in all three words.
    let (end, one, two, three) = (R2, R0, R5, last);
    a.op_reg(Op::Mov, end, last);
    a.op(Op::Add, end, 1);
    a.op(Op::Mov, all, 0);
    for (number, word) in words().enumerate() {
        a.load(R3, R10, word);
        if number >= 2 {
            a.op_reg(Op::Mov, three, R3);
            a.op_reg(Op::Xor, three, end);
            a.op_reg(Op::Or, three, two);
        }
        if number >= 1 {
            a.op_reg(Op::Mov, two, R3);
            a.op_reg(Op::Xor, two, start);
            a.op_reg(Op::Or, two, one);
        }
        a.op_reg(Op::Mov, one, R3);
        a.op_reg(Op::Xor, one, mm);
        if number >= 2 {
            a.op(Op::Shr, three, 1);
            a.op(Op::Sub, three, 1);
            a.op_reg(Op::Or, all, three);
        }
    }
    a.op_reg(Op::Mov, last, end);
    a.op(Op::Sub, last, 1);
    a.op(Op::Shr, all, 63);
    a.jump(If::NotEqual, all, 0, ours);
    a.label(next);
    a.op(Op::Add, R8, STEP as i32);
    a.load(R3, R10, LENGTH);
    a.jump_reg(If::NotLess, R8, R3, others);
    a.jump(If::Less, R8, STACK as i32, piece);
    a.label(ours);
}
