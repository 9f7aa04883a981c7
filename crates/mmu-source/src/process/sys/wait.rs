//! Waiting for tracees, and decoding the status word.

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
    /// No event: a signal handler ran, or no event was pending and the function does not block.
    Interrupted,
    /// This thread has no child and no tracee. From [`wait_for_unknown`] also: it has only children
    /// that are not tracees.
    NoTracee,
}

/// Why a tracee stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Stop {
    /// The entry of a system call that the filter selected.
    Seccomp,
    /// The entry or the exit of a system call.
    Syscall,
    /// The task has made a child. The message of the event is the child's tid.
    NewTask(NewTask),
    /// `execve` has succeeded. The message is the tid that the task had before.
    Exec,
    /// The task is about to end. The message is its wait status.
    Exit,
    /// The task is a new tracee, was interrupted by the tracer, or has been continued by `SIGCONT`.
    Trap,
    /// This stop is a job-control stop of the process.
    Group,
    /// This signal is about to be delivered.
    Signal(i32),
    /// A stop that the tracer ignores.
    Other,
}

/// How a task was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum NewTask {
    Fork,
    Vfork,
    Clone,
}

impl NewTask {
    /// Returns the kernel's name for the event. The task may have made a call with another name.
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

/// Takes the next event of any child or tracee of this thread. If there is none, returns
/// [`Wait::Interrupted`].
pub(in super::super) fn poll() -> io::Result<Wait> {
    wait_with(-1, libc::WNOHANG)
}

/// Waits for the next event of the child or tracee `pid` of this thread, or of any of them if `pid`
/// is -1.
pub(in super::super) fn wait_for(pid: Pid) -> io::Result<Wait> {
    wait_with(pid, 0)
}

/// Waits for an event of a tracee that the tracer's table lacks.
///
/// If a task makes a child and is killed before its event can name the child, no event names that
/// child. So such a tracee may exist. If this thread has only children that are not tracees, and
/// none of them has ended, this function does not block and returns [`Wait::NoTracee`]. Like
/// [`wait`], it takes the event of any child. If `/proc` does not say which children are tracees,
/// it waits for all of them; then this thread must have no children that are not tracees.
pub(in super::super) fn wait_for_unknown() -> io::Result<Wait> {
    match wait_with(-1, libc::WNOHANG)? {
        // No event and no tracee: this source must not wait for the existing children.
        Wait::Interrupted if proc::has_tracees(this_thread()) == Some(false) => Ok(Wait::NoTracee),
        Wait::Interrupted => wait(),
        other => Ok(other),
    }
}

/// With `WNOHANG`, returns [`Wait::Interrupted`] if there is no event.
fn wait_with(pid: Pid, flags: c_int) -> io::Result<Wait> {
    let mut status: c_int = 0;
    // SAFETY: `waitpid` writes one int to `status`, which outlives the call.
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

/// Decodes the status word of `wait`, including the numbers of real-time signals.
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

/// Decodes the status word of a task that has ended. Returns `None` if the task has only stopped.
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
    fn a_group_stop_and_a_trap_are_distinguished() {
        let stop = |signal: c_int| decode(1, PTRACE_EVENT_STOP << 16 | signal << 8 | 0x7f);
        assert_eq!(stop(libc::SIGTSTP), Wait::Stopped(1, Stop::Group));
        assert_eq!(stop(libc::SIGTRAP), Wait::Stopped(1, Stop::Trap));
        assert_eq!(
            decode(1, (libc::SIGTRAP | 0x80) << 8 | 0x7f),
            Wait::Stopped(1, Stop::Syscall)
        );
    }
}
