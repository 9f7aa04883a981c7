//! The registers of a stopped task.

use std::io;

use super::super::{Pid, Registers};

/// Where a stopped tracee of this thread is; `None` if it is none, or not stopped.
#[cfg(target_arch = "x86_64")]
pub(in super::super) fn registers(tid: Pid) -> Option<Registers> {
    use std::mem::MaybeUninit;

    /// The selector of 64-bit user code, asm/segment.h.
    const USER_CS: u64 = 0x33;
    let mut raw = MaybeUninit::<libc::user_regs_struct>::zeroed();
    super::ptrace(libc::PTRACE_GETREGS, tid, 0, raw.as_mut_ptr().addr()).ok()?;
    // SAFETY: it was zeroed, which is a valid value, and then written by the kernel.
    let raw = unsafe { raw.assume_init() };
    Some(Registers { ip: raw.rip, sp: raw.rsp, bp: raw.rbp, is_32bit: raw.cs != USER_CS })
}

#[cfg(not(target_arch = "x86_64"))]
pub(in super::super) fn registers(_: Pid) -> Option<Registers> {
    None
}

/// Makes the kernel skip the call that a tracee stands before: it fails with `ENOSYS`.
///
/// Without a call number the result is what stands there already, `ENOSYS`.
#[cfg(target_arch = "x86_64")]
pub(in super::super) fn skip_call(tid: Pid) -> io::Result<Option<()>> {
    let number = 8 * libc::ORIG_RAX as usize;
    super::unless_gone(super::ptrace(libc::PTRACE_POKEUSER, tid, number, usize::MAX).map(drop))
}

#[cfg(not(target_arch = "x86_64"))]
pub(in super::super) fn skip_call(_: Pid) -> io::Result<Option<()>> {
    Err(io::ErrorKind::Unsupported.into())
}
