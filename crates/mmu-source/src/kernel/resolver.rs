//! The BPF program that finds a virtual machine's count of changes under way.
//!
//! The program runs on request (`BPF_PROG_TYPE_SYSCALL`, Linux 5.14), on the thread that has the
//! machine's descriptor. In C, with the member offsets of the running kernel:
//!
//! ```c
//! if (descriptor == NONE) {
//!     count = 0;
//!     if (role != B) space = 0;
//!     return 0;
//! }
//! table = current->files->fdt;
//! if (descriptor >= table->max_fds || !(file = table->fd[descriptor])) return 1;
//! if (!file_ops) file_ops = file->f_op;              // The first file is our own, and is a machine.
//! if (file->f_op != file_ops) return 1;              // So this one is a machine too.
//! kvm = file->private_data;
//! if (role != B) {
//!     space = kvm->mm;
//!     if (role == OWN) process = pid_tgid >> 32;     // Not in a broker, which is another process.
//!     return 0;
//! }
//! if (kvm->mm != space) return 1;                    // It must be of the source's address space.
//! count = &kvm->mn_active_invalidate_count;
//! return 0;
//! ```
//!
//! `count`, `space` and `file_ops` are in a map whose descriptor a broker does not send, so the
//! client of a broker learns no kernel address.

use super::asm::{Assembler, If, Op, PEEKED, Reg};
use super::btf::Btf;
use super::layout::private;
use super::sys;
use Reg::{R0, R1, R3, R6, R7, R8, R9, R10};
use std::os::fd::BorrowedFd;

/// The descriptor that means "no machine".
pub(super) const NONE: u64 = u64::MAX;

/// What the resolver does with a machine. With [`NONE`] it forgets machines instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The machine becomes B: the tracepoint's program reads its count. With [`NONE`], the program
    /// reads no count any more.
    B = 0,
    /// The machine defines the source's address space. With [`NONE`], the program forgets the count
    /// and the address space.
    Space = 1,
    /// Like `Space`, and the calling process, to which the machine belongs, is the source's.
    Own = 2,
}

/// Where the role is stored, relative to the end of the stack.
const ROLE: isize = PEEKED - 8;

/// The offsets of the members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offsets {
    task_files: u32,
    files_table: u32,
    table_size: u32,
    table_files: u32,
    file_ops: u32,
    file_data: u32,
    kvm_mm: u32,
    kvm_count: u32,
}

impl Offsets {
    /// Reads the offsets from the running kernel's BTF and, if KVM is a module, from that of the
    /// module. Returns `None` if the kernel has no BTF, or if a member is missing.
    pub(super) fn of_this_kernel() -> Option<Self> {
        let vmlinux = sys::Whole::of("/sys/kernel/btf/vmlinux").ok()?;
        let module = sys::Whole::of("/sys/kernel/btf/kvm").ok();
        let btf = Btf::parse(vmlinux.bytes(), module.as_ref().map(sys::Whole::bytes))?;
        Some(Self {
            task_files: btf.offset("task_struct", "files")?,
            files_table: btf.offset("files_struct", "fdt")?,
            table_size: btf.offset("fdtable", "max_fds")?,
            table_files: btf.offset("fdtable", "fd")?,
            file_ops: btf.offset("file", "f_op")?,
            file_data: btf.offset("file", "private_data")?,
            kvm_mm: btf.offset("kvm", "mm")?,
            kvm_count: btf.offset("kvm", "mn_active_invalidate_count")?,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Label {
    Find,
    Forgotten,
    Known,
    Space,
    Done,
    Refuse,
}

/// Builds the program. `map` holds the words that only programs see.
pub(super) fn build(map: BorrowedFd<'_>, at: Offsets) -> Vec<u64> {
    const GET_CURRENT_TASK: i32 = 35;
    const GET_CURRENT_PID_TGID: i32 = 14;
    let mut a = Assembler::new();
    let (descriptor, kept, table, words) = (R6, R7, R8, R9);
    a.load(descriptor, R1, 0);
    a.load(R0, R1, 8);
    a.store(R10, ROLE, R0);
    a.map_value(words, map);
    a.jump(If::NotEqual, descriptor, -1, Label::Find);
    // ORDER(source-forgotten): this store comes before the close of B, which removes B from the
    // kernel's list of notifiers. Partner: the fence at the beginning of the tracepoint's program.
    a.store_immediate(words, private::COUNT as isize, 0);
    a.jump(If::Equal, R0, Role::B as i32, Label::Forgotten);
    a.store_immediate(words, private::SPACE as isize, 0);
    a.label(Label::Forgotten);
    a.op(Op::Mov, R0, 0);
    a.exit();
    a.label(Label::Find);
    // Loads a value of `bytes` bytes from address register 0 + offset into register 0.
    let follow = |a: &mut Assembler<Label>, offset: u32, bytes: i32| {
        a.op_reg(Op::Mov, R3, R0);
        a.op(Op::Add, R3, offset as i32);
        a.peek(bytes);
        a.jump(If::NotEqual, R0, 0, Label::Refuse);
        a.load(R0, R10, PEEKED);
    };
    a.call(GET_CURRENT_TASK);
    follow(&mut a, at.task_files, 8);
    follow(&mut a, at.files_table, 8);
    a.op_reg(Op::Mov, table, R0);
    follow(&mut a, at.table_size, 4);
    a.jump_reg(If::NotLess, descriptor, R0, Label::Refuse);
    a.op_reg(Op::Mov, R0, table);
    follow(&mut a, at.table_files, 8);
    a.op(Op::Shl, descriptor, 3);
    a.op_reg(Op::Add, R0, descriptor);
    follow(&mut a, 0, 8);
    a.jump(If::Equal, R0, 0, Label::Refuse);
    a.op_reg(Op::Mov, kept, R0);
    follow(&mut a, at.file_ops, 8);
    a.load(R1, words, private::FILE_OPS as isize);
    a.jump(If::NotEqual, R1, 0, Label::Known);
    a.store(words, private::FILE_OPS as isize, R0);
    a.op_reg(Op::Mov, R1, R0);
    a.label(Label::Known);
    a.jump_reg(If::NotEqual, R0, R1, Label::Refuse);
    a.op_reg(Op::Mov, R0, kept);
    follow(&mut a, at.file_data, 8);
    a.op_reg(Op::Mov, kept, R0);
    follow(&mut a, at.kvm_mm, 8);
    a.load(R1, R10, ROLE);
    a.jump(If::NotEqual, R1, Role::B as i32, Label::Space);
    a.load(R1, words, private::SPACE as isize);
    a.jump_reg(If::NotEqual, R0, R1, Label::Refuse);
    a.op(Op::Add, kept, at.kvm_count as i32);
    a.store(words, private::COUNT as isize, kept);
    a.op(Op::Mov, R0, 0);
    a.exit();
    a.label(Label::Space);
    a.store(words, private::SPACE as isize, R0);
    a.jump(If::NotEqual, R1, Role::Own as i32, Label::Done);
    a.call(GET_CURRENT_PID_TGID);
    a.op(Op::Shr, R0, 32);
    a.store(words, private::PROCESS as isize, R0);
    a.label(Label::Done);
    a.op(Op::Mov, R0, 0);
    a.exit();
    a.label(Label::Refuse);
    a.op(Op::Mov, R0, 1);
    a.exit();
    a.finish()
}
