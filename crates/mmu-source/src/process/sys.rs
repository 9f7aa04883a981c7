//! The system calls of the tracer: ptrace, wait, fork and exec, and reading a tracee's memory.
//!
//! # Safety
//! This is the one module of the source with unsafe code. ptrace and wait only take integers and
//! pointers to local buffers of the size the kernel is told, so most calls are safe for any
//! caller; the functions here are safe. The child between `fork` and `execve` runs
//! [`Child::run`], which makes system calls on memory laid out before the fork and nothing else: no
//! allocation, no lock, no unwinding.

#![allow(
    unsafe_code,
    reason = "the one module of this source that makes raw system calls; see its Safety section"
)]

use std::ffi::{CStr, c_int};
use std::io;
use std::mem::MaybeUninit;

use super::Pid;
use crate::ranges;
use requests::{ptrace, unless_gone};

mod child;
mod memory;
mod registers;
mod requests;
mod status;
mod wait;

pub(super) use child::{Child, Step, above_stdio, fork, pipe, read_report, say_go};
pub(super) use memory::read_memory;
pub(super) use registers::{registers, skip_call};
pub(super) use requests::{
    Place, RawCall, Resume, SyscallInfo, event_message, interrupt, resume, seize, set_options,
    syscall_info,
};
pub(super) use status::take_status;
pub(super) use wait::{NewTask, Stop, Wait, exit_status, poll, wait, wait_for, wait_for_unknown};

/// The size of the pages of the file at `path`, if they are huge.
pub(super) fn huge_page(path: &CStr) -> io::Result<Option<u64>> {
    let mut info = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the path ends in a zero byte, and the call writes one `statfs` to a local one.
    if unsafe { libc::statfs(path.as_ptr(), info.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was zeroed, which is a valid value, and then written by the kernel.
    let info = unsafe { info.assume_init() };
    Ok(ranges::huge_page(info.f_type, info.f_bsize))
}

/// Tells whether two tasks share their memory, or `None` if the kernel does not say.
pub(super) fn same_memory(a: Pid, b: Pid) -> Option<bool> {
    const KCMP_VM: c_int = 1;
    // SAFETY: `kcmp` takes integers only.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0_usize, 0_usize) };
    (order >= 0).then_some(order == 0)
}

/// Tells whether `tid` is a thread of process `pid`. It asks the kernel directly and needs no right
/// and no `/proc`.
pub(super) fn is_thread_of(pid: Pid, tid: Pid) -> bool {
    // SAFETY: `tgkill` takes integers only; signal 0 is not sent.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, 0) };
    // Being forbidden to send one comes after finding the thread. Numbers that are none are
    // invalid.
    result == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
}

/// The identifier of this thread.
pub(super) fn this_thread() -> Pid {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::gettid() }
}
