//! The registers of aarch64, and of 32-bit programs on it, by sets.
//!
//! # Source
//! `user_aarch64_view` and `user_aarch32_ptrace_view`, arch/arm64/kernel/ptrace.c, Linux 6.12: a
//! 64-bit tracer is given the registers of a 32-bit task as that task has them, which are fewer.

use std::ffi::c_int;
use std::io;
use std::mem::MaybeUninit;

use super::super::super::{Pid, Registers};
use super::super::{ptrace, unless_gone};

/// The number of the call that a task stands before.
const NT_ARM_SYSTEM_CALL: c_int = 0x404;
/// Which bits of an address the signature of a pointer takes.
const NT_ARM_PAC_MASK: c_int = 0x406;
/// In `pstate`: the task runs 32-bit code.
const PSR_MODE32_BIT: u64 = 0x10;
/// What a call finds for its number that is none.
const NO_CALL: c_int = -1;

/// Has the kernel read or write a set, as far as it and the buffer go, and returns how many bytes.
fn set_of(
    request: super::super::requests::Request,
    tid: Pid,
    set: c_int,
    at: usize,
    length: usize,
) -> io::Result<usize> {
    let mut vector = libc::iovec {
        iov_base: std::ptr::without_provenance_mut(at),
        iov_len: length,
    };
    ptrace(request, tid, set as usize, (&raw mut vector).addr())?;
    Ok(vector.iov_len)
}

/// Where a stopped tracee of this thread is; `None` if it is none, or not stopped.
pub(in super::super::super) fn registers(tid: Pid) -> Option<Registers> {
    let mut raw = MaybeUninit::<libc::user_regs_struct>::zeroed();
    let room = size_of::<libc::user_regs_struct>();
    let read = set_of(
        libc::PTRACE_GETREGSET,
        tid,
        libc::NT_PRSTATUS,
        raw.as_mut_ptr().expose_provenance(),
        room,
    )
    .ok()?;
    // SAFETY: it was zeroed, which is a valid value, and then written by the kernel.
    let raw = unsafe { raw.assume_init() };
    if read < room || raw.pstate & PSR_MODE32_BIT != 0 {
        // Of 32 bits each, two in a word here: r11 is the frame pointer, r13 the stack pointer, r15
        // the program counter.
        let narrow =
            |number: usize| raw.regs[number / 2] >> (32 * (number % 2)) & u64::from(u32::MAX);
        let (ip, sp, bp) = (narrow(15), narrow(13), narrow(11));
        return Some(Registers {
            ip,
            sp,
            bp,
            link: Some(narrow(14)),
            code_mask: u64::MAX,
            is_32bit: true,
        });
    }
    let code_mask = code_mask(tid);
    Some(Registers {
        ip: raw.pc,
        sp: raw.sp,
        bp: raw.regs[29],
        link: Some(raw.regs[30]),
        code_mask,
        is_32bit: false,
    })
}

/// What is left of an address of code without its signature. Without such, all.
fn code_mask(tid: Pid) -> u64 {
    let mut masks = [0_u64; 2];
    let at = (&raw mut masks).expose_provenance();
    match set_of(
        libc::PTRACE_GETREGSET,
        tid,
        NT_ARM_PAC_MASK,
        at,
        size_of_val(&masks),
    ) {
        Ok(_) => !masks[1],
        Err(_) => u64::MAX,
    }
}

/// Makes the kernel skip the call that a tracee stands before: it fails with `ENOSYS`.
///
/// Without a call number the result is what stands in the first register, which holds the first
/// argument.
pub(in super::super::super) fn skip_call(tid: Pid) -> io::Result<Option<()>> {
    let number = NO_CALL;
    let at = (&raw const number).expose_provenance();
    let skipped = set_of(
        libc::PTRACE_SETREGSET,
        tid,
        NT_ARM_SYSTEM_CALL,
        at,
        size_of_val(&number),
    );
    if unless_gone(skipped)?.is_none() {
        return Ok(None);
    }
    let is_32bit = registers(tid).is_some_and(|registers| registers.is_32bit);
    let result = -i64::from(libc::ENOSYS);
    // The first register is the low half of the first word there.
    let length = if is_32bit { 4 } else { 8 };
    let at = (&raw const result).expose_provenance();
    unless_gone(set_of(libc::PTRACE_SETREGSET, tid, libc::NT_PRSTATUS, at, length).map(drop))
}
