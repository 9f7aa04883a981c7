//! The system calls of the tracer: ptrace, wait, fork and exec, and reading a tracee's memory.
//!
//! # Safety
//! Of this source only this module and its submodules have unsafe code. ptrace and wait take
//! integers, and pointers to local buffers together with their sizes, so the functions here are
//! safe for any caller. Between `fork` and `execve` the child runs [`Child::run`]. `run` makes only
//! system calls on memory prepared before the fork: no allocation, no lock, no unwinding.

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
mod mappings;
mod memory;
mod registers;
mod requests;
mod status;
mod wait;

pub(super) use child::{Child, Step, above_stdio, fork, pipe, read_report, say_go};
pub(super) use mappings::writable_at_or_after;
pub(super) use memory::read_memory;
pub(super) use registers::{registers, skip_call};
pub(super) use requests::{
    Place, RawCall, Resume, SyscallInfo, event_message, interrupt, resume, seize, set_options,
    syscall_info,
};
pub(super) use status::take_status;
pub(super) use wait::{NewTask, Stop, Wait, exit_status, poll, wait, wait_for, wait_for_unknown};

/// Returns the page size of the file at `path`, if the file is on hugetlbfs.
pub(super) fn huge_page(path: &CStr) -> io::Result<Option<u64>> {
    let mut info = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the path ends in a zero byte, and the call writes one `statfs` into a local.
    if unsafe { libc::statfs(path.as_ptr(), info.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the local was zeroed, which is a valid value, before the kernel wrote to it.
    let info = unsafe { info.assume_init() };
    Ok(ranges::huge_page(info.f_type, info.f_bsize))
}

/// Tells whether two tasks share their memory. Returns `None` if the kernel does not say.
pub(super) fn same_memory(a: Pid, b: Pid) -> Option<bool> {
    const KCMP_VM: c_int = 1;
    // SAFETY: `kcmp` takes integers only.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0_usize, 0_usize) };
    (order >= 0).then_some(order == 0)
}

/// Tells whether `tid` is a thread of process `pid`. Asks the kernel by a signal of number 0, which
/// needs no privilege and no `/proc`.
pub(super) fn is_thread_of(pid: Pid, tid: Pid) -> bool {
    // SAFETY: `tgkill` takes integers, and signal 0 is not delivered.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, 0) };
    // The kernel checks the permission after it has found the thread, so `EPERM` means that the
    // thread exists. A number that is no valid pid gives `EINVAL`.
    result == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
}

/// Returns the identifier of this thread.
pub(super) fn this_thread() -> Pid {
    // SAFETY: takes no arguments and cannot fail.
    unsafe { libc::gettid() }
}
