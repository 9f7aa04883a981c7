//! The registers of aarch64 tasks, including 32-bit ones, read by register sets.
//!
//! # Source
//! `user_aarch64_view` and `user_aarch32_ptrace_view`, arch/arm64/kernel/ptrace.c, Linux 6.12. For
//! a 32-bit task a 64-bit tracer gets the smaller 32-bit register set.

use std::ffi::c_int;
use std::io;
use std::mem::MaybeUninit;

use super::super::super::{Pid, Registers};
use super::super::{ptrace, unless_gone};

/// The register set that holds the number of the system call at whose entry a task is stopped.
const NT_ARM_SYSTEM_CALL: c_int = 0x404;
/// The register set that says which bits of a pointer hold its signature.
const NT_ARM_PAC_MASK: c_int = 0x406;
/// In `pstate`: the task runs 32-bit code.
const PSR_MODE32_BIT: u64 = 0x10;
/// A call number that names no call.
const NO_CALL: c_int = -1;

/// Makes the kernel read or write a register set, and returns how many bytes it transferred: the
/// size of the set or `length`, whichever is less.
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

/// Returns the registers of a stopped tracee of this thread. Returns `None` if `tid` is not such a
/// tracee or is not stopped.
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
    // SAFETY: the local was zeroed, which is a valid value, before the kernel wrote to it.
    let raw = unsafe { raw.assume_init() };
    if read < room || raw.pstate & PSR_MODE32_BIT != 0 {
        // The set holds 32-bit registers, so each 64-bit field here contains two. r11 is the frame
        // pointer, r13 the stack pointer, r15 the program counter.
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

/// Returns the bits of a code address that hold no signature. Without pointer authentication, that
/// is every bit.
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

/// Makes the kernel skip the call at whose entry a tracee is stopped, so that the call returns
/// `ENOSYS`.
///
/// Without a call number, the result of the call is the value of the first register. That register
/// still holds the first argument, so this function also stores `ENOSYS` in the register.
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
    // In a 32-bit set, the first register is the low half of the first 64-bit word.
    let length = if is_32bit { 4 } else { 8 };
    let at = (&raw const result).expose_provenance();
    unless_gone(set_of(libc::PTRACE_SETREGSET, tid, libc::NT_PRSTATUS, at, length).map(drop))
}
