//! The registers of x86-64.

use std::io;
use std::mem::MaybeUninit;

use super::super::super::{Pid, Registers};
use super::super::{ptrace, unless_gone};

/// Returns the registers of a stopped tracee of this thread. Returns `None` if `tid` is not such a
/// tracee or is not stopped.
pub(in super::super::super) fn registers(tid: Pid) -> Option<Registers> {
    /// The code segment selector of 64-bit user code, asm/segment.h.
    const USER_CS: u64 = 0x33;
    let mut raw = MaybeUninit::<libc::user_regs_struct>::zeroed();
    ptrace(libc::PTRACE_GETREGS, tid, 0, raw.as_mut_ptr().addr()).ok()?;
    // SAFETY: the local was zeroed, which is a valid value, before the kernel wrote to it.
    let raw = unsafe { raw.assume_init() };
    let is_32bit = raw.cs != USER_CS;
    Some(Registers {
        ip: raw.rip,
        sp: raw.rsp,
        bp: raw.rbp,
        link: None,
        code_mask: u64::MAX,
        is_32bit,
    })
}

/// Makes the kernel skip the call at whose entry a tracee is stopped, so that the call returns
/// `ENOSYS`.
///
/// Without a call number, the result of the call is the value of `rax`, and at a system call entry
/// `rax` is already `ENOSYS`.
pub(in super::super::super) fn skip_call(tid: Pid) -> io::Result<Option<()>> {
    let number = 8 * libc::ORIG_RAX as usize;
    unless_gone(ptrace(libc::PTRACE_POKEUSER, tid, number, usize::MAX).map(drop))
}
