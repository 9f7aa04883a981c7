//! The requests of ptrace.

use super::super::Pid;
use super::wait::{Stop, Wait, decode};
use std::ffi::{c_long, c_void};
use std::io;
use std::mem::MaybeUninit;

/// How a stopped tracee continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Resume {
    /// To the next event.
    Cont,
    /// To the next event, entry or exit of a system call.
    Syscall,
    /// Stays stopped as a process of job control, and reports when that is over.
    Listen,
    /// Without us.
    Detach,
}

/// Entry to or exit from a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum SyscallInfo {
    /// At the stop of a filter, `datum` is the low half of what the filter returned.
    Entry {
        call: RawCall,
        datum: Option<u16>,
    },
    Exit {
        result: i64,
        place: Place,
    },
    None,
}

/// A call as the task is about to make it. Two equal ones are the same call, made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct RawCall {
    pub(in super::super) arch: u32,
    pub(in super::super) number: u64,
    pub(in super::super) args: [u64; 6],
    pub(in super::super) place: Place,
}

/// Where in its program a task makes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Place {
    /// Behind the instruction that makes the call.
    pub(in super::super) instruction: u64,
    pub(in super::super) stack: u64,
}

/// Turns "no such process" into `None`: a tracee can be killed at any time, and its end is reported
/// by `wait`.
pub(super) fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        other => other.map(Some),
    }
}

pub(super) fn ptrace(request: Request, tid: Pid, addr: usize, data: usize) -> io::Result<c_long> {
    // SAFETY: `addr` and `data` are integers, or an address and a size that the callers below take
    // from a live buffer of theirs; the requests used here write nowhere else in this process.
    let result = unsafe { libc::ptrace(request, tid, addr as *mut c_void, data as *mut c_void) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Makes `tid` a tracee of this thread without stopping it.
pub(in super::super) fn seize(tid: Pid, options: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

/// Changes what a stopped tracee reports.
pub(in super::super) fn set_options(tid: Pid, options: i32) -> io::Result<Option<()>> {
    unless_gone(ptrace(libc::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop))
}

/// Makes a running tracee stop.
pub(in super::super) fn interrupt(tid: Pid) -> io::Result<Option<()>> {
    unless_gone(ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop))
}

/// Lets a stopped tracee go on, and delivers `signal` if it is not zero.
pub(in super::super) fn resume(tid: Pid, how: Resume, signal: i32) -> io::Result<Option<()>> {
    let request = match how {
        Resume::Cont => libc::PTRACE_CONT,
        Resume::Syscall => libc::PTRACE_SYSCALL,
        Resume::Listen => libc::PTRACE_LISTEN,
        Resume::Detach => libc::PTRACE_DETACH,
    };
    unless_gone(ptrace(request, tid, 0, signal as usize).map(drop))
}

/// The message of `event`, at which a tracee was reported to stop.
///
/// `None` if it is there no more: a tracee that was killed meanwhile stands at its exit, whose
/// message is another.
pub(in super::super) fn event_message(tid: Pid, event: Stop) -> io::Result<Option<u64>> {
    let mut message: libc::c_ulong = 0;
    let asked = ptrace(libc::PTRACE_GETEVENTMSG, tid, 0, (&raw mut message).addr());
    if unless_gone(asked)?.is_none() {
        return Ok(None);
    }
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let asked = ptrace(libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr().addr());
    if unless_gone(asked)?.is_none() {
        return Ok(None);
    }
    // SAFETY: it was zeroed, which is a valid value, and then written by the kernel.
    let info = unsafe { info.assume_init() };
    // What `wait` reports of a stop holds the same.
    let stands_at = decode(tid, info.si_code << 8 | 0x7f);
    Ok((stands_at == Wait::Stopped(tid, event)).then_some(message as u64))
}

/// `struct ptrace_syscall_info`, its union as words.
#[repr(C)]
#[derive(Default)]
struct RawInfo {
    op: u8,
    pad: [u8; 3],
    arch: u32,
    instruction_pointer: u64,
    stack_pointer: u64,
    words: [u64; 8],
}

/// What the system call stop of a tracee is about. Linux 5.3.
pub(in super::super) fn syscall_info(tid: Pid) -> io::Result<Option<SyscallInfo>> {
    let mut raw = RawInfo::default();
    let asked = ptrace(
        PTRACE_GET_SYSCALL_INFO,
        tid,
        size_of::<RawInfo>(),
        (&raw mut raw).addr(),
    );
    if unless_gone(asked)?.is_none() {
        return Ok(None);
    }
    let [number, a, b, c, d, e, f, datum] = raw.words;
    let place = Place {
        instruction: raw.instruction_pointer,
        stack: raw.stack_pointer,
    };
    let call = RawCall {
        arch: raw.arch,
        number,
        args: [a, b, c, d, e, f],
        place,
    };
    Ok(Some(match raw.op {
        1 => SyscallInfo::Entry { call, datum: None },
        2 => SyscallInfo::Exit {
            result: number as i64,
            place,
        },
        3 => SyscallInfo::Entry {
            call,
            datum: Some(datum as u16),
        },
        _ => SyscallInfo::None,
    }))
}

/// The type that the libraries declare the first argument of `ptrace` with.
#[cfg(target_env = "musl")]
pub(super) type Request = std::ffi::c_int;
#[cfg(not(target_env = "musl"))]
pub(super) type Request = std::ffi::c_uint;

const PTRACE_GET_SYSCALL_INFO: Request = 0x420e;

#[cfg(test)]
mod tests {
    use super::super::super::ExitStatus;
    use super::super::wait::{NewTask, wait_for};
    use super::*;

    #[test]
    fn a_tracee_that_was_killed_at_an_event_has_no_message_of_it() {
        if !crate::testkit::require(crate::testkit::Cap::Ptrace) {
            return;
        }
        // SAFETY: the child makes system calls only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            loop {
                // SAFETY: takes nothing.
                unsafe { libc::pause() };
            }
        }
        seize(child, libc::PTRACE_O_TRACEEXIT).expect("it can be traced");
        // SAFETY: takes integers; the process is this test's own.
        unsafe { libc::kill(child, libc::SIGKILL) };
        assert_eq!(
            wait_for(child).expect("it stops"),
            Wait::Stopped(child, Stop::Exit)
        );
        let message = |event| event_message(child, event).expect("it can be asked");
        assert_eq!(message(Stop::Exit), Some(libc::SIGKILL as u64));
        assert_eq!(
            message(Stop::NewTask(NewTask::Clone)),
            None,
            "the number of a signal is no task"
        );
        resume(child, Resume::Cont, 0).expect("it continues");
        assert_eq!(
            wait_for(child).expect("it ends"),
            Wait::Ended(child, ExitStatus::Signal(libc::SIGKILL))
        );
        assert_eq!(message(Stop::Exit), None);
    }
}
