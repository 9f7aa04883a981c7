//! Waiting for tracees, and what the status word says.

use super::super::{ExitStatus, Pid, proc};
use super::this_thread;
use std::ffi::c_int;
use std::io;

/// What `wait` reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Wait {
    /// A tracee stopped.
    Stopped(Pid, Stop),
    /// A tracee has ended.
    Ended(Pid, ExitStatus),
    /// A signal handler ran.
    Interrupted,
    /// There is no child and no tracee.
    NoTracee,
}

/// Why a tracee stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Stop {
    /// Entry to a system call that the filter picked.
    Seccomp,
    /// Entry to or exit from a system call.
    Syscall,
    /// A child was made: the event's message is its tid.
    NewTask(NewTask),
    /// `execve` has succeeded: the message is the former tid.
    Exec,
    /// The task is about to end: the message is its wait status.
    Exit,
    /// A new tracee, or one that was interrupted, or one that a `SIGCONT` let go of.
    Trap,
    /// The process is stopped by this signal.
    Group,
    /// This signal is about to be delivered.
    Signal(i32),
    /// A stop that says nothing to us.
    Other,
}

/// How a task came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum NewTask {
    Fork,
    Vfork,
    Clone,
}

impl NewTask {
    /// The kernel's name for it, which need not be that of the call.
    pub(in super::super) fn name(self) -> &'static str {
        match self {
            NewTask::Fork => "fork",
            NewTask::Vfork => "vfork",
            NewTask::Clone => "clone",
        }
    }
}

/// Waits for the next event of any child or tracee of this thread.
pub(in super::super) fn wait() -> io::Result<Wait> {
    wait_for(-1)
}

/// Takes the next event of any child or tracee of this thread, if there is one; if not, that is an
/// interruption.
pub(in super::super) fn poll() -> io::Result<Wait> {
    wait_with(-1, libc::WNOHANG)
}

/// Waits for the next event of one child or tracee of this thread, or of any if `pid` is -1.
pub(in super::super) fn wait_for(pid: Pid) -> io::Result<Wait> {
    wait_with(pid, 0)
}

/// Waits for an event of a tracee that no table knows.
///
/// Such a tracee exists if a task made a child and was killed before its event could name the
/// child. Other children of this thread are not waited for, so that [`Wait::NoTracee`] means no
/// tracee. Where `/proc` does not say which children are tracees, all are waited for: this thread
/// must have no others.
pub(in super::super) fn wait_for_unknown() -> io::Result<Wait> {
    match wait_with(-1, libc::WNOHANG)? {
        // Nothing to report and no tracee: the children that there are are not ours to wait for.
        Wait::Interrupted if proc::has_tracees(this_thread()) == Some(false) => Ok(Wait::NoTracee),
        Wait::Interrupted => wait(),
        other => Ok(other),
    }
}

/// With `WNOHANG`, having nothing to report is answered like an interruption.
fn wait_with(pid: Pid, flags: c_int) -> io::Result<Wait> {
    let mut status: c_int = 0;
    // SAFETY: `waitpid` writes one int to `status`, which lives across the call.
    let tid = unsafe { libc::waitpid(pid, &mut status, libc::__WALL | libc::__WNOTHREAD | flags) };
    if tid == 0 {
        return Ok(Wait::Interrupted);
    }
    if tid > 0 {
        return Ok(decode(tid, status));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EINTR) => Ok(Wait::Interrupted),
        Some(libc::ECHILD) => Ok(Wait::NoTracee),
        _ => Err(error),
    }
}

/// Decodes the status word of `wait`; numbers of real-time signals included.
pub(super) fn decode(tid: Pid, status: c_int) -> Wait {
    if let Some(status) = exit_status(status) {
        return Wait::Ended(tid, status);
    }
    let signal = (status >> 8) & 0xff;
    let stop = match status >> 16 {
        0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(signal),
        libc::PTRACE_EVENT_SECCOMP => Stop::Seccomp,
        libc::PTRACE_EVENT_FORK => Stop::NewTask(NewTask::Fork),
        libc::PTRACE_EVENT_VFORK => Stop::NewTask(NewTask::Vfork),
        libc::PTRACE_EVENT_CLONE => Stop::NewTask(NewTask::Clone),
        libc::PTRACE_EVENT_EXEC => Stop::Exec,
        libc::PTRACE_EVENT_EXIT => Stop::Exit,
        PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Stop::Trap,
        PTRACE_EVENT_STOP => Stop::Group,
        _ => Stop::Other,
    };
    Wait::Stopped(tid, stop)
}

/// Decodes a status word of a task that has ended.
pub(in super::super) fn exit_status(status: c_int) -> Option<ExitStatus> {
    match status & 0x7f {
        0 => Some(ExitStatus::Code((status >> 8) & 0xff)),
        0x7f => None,
        signal => Some(ExitStatus::Signal(signal)),
    }
}

const PTRACE_EVENT_STOP: c_int = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_a_real_time_signal_is_decoded() {
        assert_eq!(
            decode(1, 64 << 8 | 0x7f),
            Wait::Stopped(1, Stop::Signal(64))
        );
        assert_eq!(decode(1, 40), Wait::Ended(1, ExitStatus::Signal(40)));
        assert_eq!(decode(1, 3 << 8), Wait::Ended(1, ExitStatus::Code(3)));
    }

    #[test]
    fn a_group_stop_and_a_trap_are_told_apart() {
        let stop = |signal: c_int| decode(1, PTRACE_EVENT_STOP << 16 | signal << 8 | 0x7f);
        assert_eq!(stop(libc::SIGTSTP), Wait::Stopped(1, Stop::Group));
        assert_eq!(stop(libc::SIGTRAP), Wait::Stopped(1, Stop::Trap));
        assert_eq!(
            decode(1, (libc::SIGTRAP | 0x80) << 8 | 0x7f),
            Wait::Stopped(1, Stop::Syscall)
        );
    }
}
