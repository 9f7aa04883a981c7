//! The requests of ptrace.

use super::super::Pid;
use super::wait::{Stop, Wait, decode};
use std::ffi::{c_long, c_void};
use std::io;
use std::mem::MaybeUninit;

/// How a stopped tracee continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Resume {
    /// Runs until the next event.
    Cont,
    /// Runs until the next event, system call entry or system call exit.
    Syscall,
    /// Stays in its job-control stop, and reports when that stop ends.
    Listen,
    /// Runs without a tracer.
    Detach,
}

/// The system call at whose entry or exit a tracee is stopped. `None` if it is stopped elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum SyscallInfo {
    /// If a filter caused the stop, `datum` is the low half of the filter's return value.
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

/// A call that a task is about to make. After a signal, the kernel may restart the interrupted
/// call. If the task's next call is equal in all fields, it counts as that call, restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct RawCall {
    pub(in super::super) arch: u32,
    pub(in super::super) number: u64,
    pub(in super::super) args: [u64; 6],
    pub(in super::super) place: Place,
}

/// The place in its program where a task makes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Place {
    /// The address behind the instruction that makes the call.
    pub(in super::super) instruction: u64,
    pub(in super::super) stack: u64,
}

/// Turns `ESRCH` into `None`. A tracee can be killed at any time, and `wait` reports its end.
pub(super) fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        other => other.map(Some),
    }
}

pub(super) fn ptrace(request: Request, tid: Pid, addr: usize, data: usize) -> io::Result<c_long> {
    // SAFETY: `data` is an integer, or the address of a live buffer of the caller. `addr` is an
    // integer, for some requests the buffer's size. The requests that this folder uses write
    // nowhere else in this process.
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

/// Sets the ptrace options of a stopped tracee.
pub(in super::super) fn set_options(tid: Pid, options: i32) -> io::Result<Option<()>> {
    unless_gone(ptrace(libc::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop))
}

/// Makes a running tracee stop.
pub(in super::super) fn interrupt(tid: Pid) -> io::Result<Option<()>> {
    unless_gone(ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop))
}

/// Continues a stopped tracee. Delivers `signal` if it is not zero.
pub(in super::super) fn resume(tid: Pid, how: Resume, signal: i32) -> io::Result<Option<()>> {
    let request = match how {
        Resume::Cont => libc::PTRACE_CONT,
        Resume::Syscall => libc::PTRACE_SYSCALL,
        Resume::Listen => libc::PTRACE_LISTEN,
        Resume::Detach => libc::PTRACE_DETACH,
    };
    unless_gone(ptrace(request, tid, 0, signal as usize).map(drop))
}

/// Returns the message of `event`, the stop that `wait` reported of a tracee.
///
/// Returns `None` if the tracee has left that stop: a tracee that was killed meanwhile is at its
/// exit stop, which has a different message.
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
    // SAFETY: the local was zeroed, which is a valid value, before the kernel wrote to it.
    let info = unsafe { info.assume_init() };
    // `si_code` holds the same value as the high bits of the status word of `wait`.
    let stands_at = decode(tid, info.si_code << 8 | 0x7f);
    Ok((stands_at == Wait::Stopped(tid, event)).then_some(message as u64))
}

/// `struct ptrace_syscall_info`, with its union as words.
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

/// Returns which system call a tracee is stopped at, and whether at its entry or its exit. Needs
/// Linux 5.3.
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

/// The type of the first argument of `ptrace`, which differs between the C libraries.
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
        // SAFETY: the child makes only system calls.
        let child = unsafe { libc::fork() };
        if child == 0 {
            loop {
                // SAFETY: takes no arguments.
                unsafe { libc::pause() };
            }
        }
        seize(child, libc::PTRACE_O_TRACEEXIT).expect("it can be traced");
        // SAFETY: takes integers, and the process is this test's child.
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
