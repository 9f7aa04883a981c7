//! The system calls of the tracer: ptrace, wait, fork and exec, and reading a tracee's memory.
//!
//! # Safety
//! This is the one module of the source with unsafe code. ptrace and wait only take integers and
//! pointers to local buffers of the size the kernel is told, so most calls are safe for whoever
//! makes them; the functions here are safe. The child between `fork` and `execve` runs
//! [`Child::run`], which makes system calls on memory laid out before the fork and nothing else: no
//! allocation, no lock, no unwinding.

#![allow(unsafe_code, reason = "the one module of this source that makes raw system calls; see its Safety section")]

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::{ExitStatus, Pid, proc};
use crate::ranges;

mod memory;
mod registers;
mod status;

pub(super) use memory::read_memory;
pub(super) use registers::{registers, skip_call};
pub(super) use status::take_status;

/// What `wait` reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// A tracee stopped.
    Stopped(Pid, Stop),
    /// A tracee has ended.
    Ended(Pid, ExitStatus),
    /// A signal handler ran.
    Interrupted,
    /// There is no child and no tracee.
    Nobody,
}

/// Why a tracee stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
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
pub(super) enum NewTask {
    Fork,
    Vfork,
    Clone,
}

impl NewTask {
    /// The kernel's name for it, which need not be that of the call.
    pub(super) fn name(self) -> &'static str {
        match self {
            NewTask::Fork => "fork",
            NewTask::Vfork => "vfork",
            NewTask::Clone => "clone",
        }
    }
}

/// How a stopped tracee goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resume {
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
pub(super) enum SyscallInfo {
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
pub(super) struct RawCall {
    pub(super) arch: u32,
    pub(super) number: u64,
    pub(super) args: [u64; 6],
    pub(super) place: Place,
}

/// Where in its program a task makes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Behind the instruction that makes the call.
    pub(super) instruction: u64,
    pub(super) stack: u64,
}

/// Waits for the next event of any child or tracee of this thread.
pub(super) fn wait() -> io::Result<Wait> {
    wait_for(-1)
}

/// Takes the next event of any child or tracee of this thread, if there is one; if not, that is an
/// interruption.
pub(super) fn poll() -> io::Result<Wait> {
    wait_with(-1, libc::WNOHANG)
}

/// Waits for the next event of one child or tracee of this thread, or of any if `pid` is -1.
pub(super) fn wait_for(pid: Pid) -> io::Result<Wait> {
    wait_with(pid, 0)
}

/// Waits for an event of a tracee that no table knows.
///
/// There is one if a task was killed when it had made a child and before its event could name it.
/// Other children of this thread are not waited for, so that [`Wait::Nobody`] means no tracee.
/// Where `/proc` does not say which children are tracees, all are waited for: this thread must have
/// no others.
pub(super) fn wait_for_unknown() -> io::Result<Wait> {
    match wait_with(-1, libc::WNOHANG)? {
        // Nothing to report and no tracee: the children that there are are not ours to wait for.
        Wait::Interrupted if proc::has_tracees(this_thread()) == Some(false) => Ok(Wait::Nobody),
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
        Some(libc::ECHILD) => Ok(Wait::Nobody),
        _ => Err(error),
    }
}

/// Decodes the status word of `wait`; numbers of real-time signals included.
fn decode(tid: Pid, status: c_int) -> Wait {
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
pub(super) fn exit_status(status: c_int) -> Option<ExitStatus> {
    match status & 0x7f {
        0 => Some(ExitStatus::Code((status >> 8) & 0xff)),
        0x7f => None,
        signal => Some(ExitStatus::Signal(signal)),
    }
}

/// Turns "no such process" into `None`: a tracee can be killed at any time, and its end is reported
/// by `wait`.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        other => other.map(Some),
    }
}

fn ptrace(request: Request, tid: Pid, addr: usize, data: usize) -> io::Result<c_long> {
    // SAFETY: `addr` and `data` are integers, or an address and a size that the callers below take
    // from a live buffer of theirs; the requests used here write nowhere else in this process.
    let result = unsafe { libc::ptrace(request, tid, addr as *mut c_void, data as *mut c_void) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes `tid` a tracee of this thread without stopping it.
pub(super) fn seize(tid: Pid, options: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

/// Changes what a stopped tracee reports.
pub(super) fn set_options(tid: Pid, options: i32) -> io::Result<Option<()>> {
    unless_gone(ptrace(libc::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop))
}

/// Makes a running tracee stop.
pub(super) fn interrupt(tid: Pid) -> io::Result<Option<()>> {
    unless_gone(ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop))
}

/// Lets a stopped tracee go on, and delivers `signal` if it is not zero.
pub(super) fn resume(tid: Pid, how: Resume, signal: i32) -> io::Result<Option<()>> {
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
pub(super) fn event_message(tid: Pid, event: Stop) -> io::Result<Option<u64>> {
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
pub(super) fn syscall_info(tid: Pid) -> io::Result<Option<SyscallInfo>> {
    let mut raw = RawInfo::default();
    let asked = ptrace(PTRACE_GET_SYSCALL_INFO, tid, size_of::<RawInfo>(), (&raw mut raw).addr());
    if unless_gone(asked)?.is_none() {
        return Ok(None);
    }
    let [number, a, b, c, d, e, f, datum] = raw.words;
    let place = Place { instruction: raw.instruction_pointer, stack: raw.stack_pointer };
    let call = RawCall { arch: raw.arch, number, args: [a, b, c, d, e, f], place };
    Ok(Some(match raw.op {
        1 => SyscallInfo::Entry { call, datum: None },
        2 => SyscallInfo::Exit { result: number as i64, place },
        3 => SyscallInfo::Entry { call, datum: Some(datum as u16) },
        _ => SyscallInfo::None,
    }))
}

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

/// Makes a pipe that programs do not inherit: its read end, which does not block if asked so, and
/// its write end.
pub(super) fn pipe(flags: c_int) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `pipe2` writes two descriptors to the array.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | flags) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `pipe2` has just made this descriptor, and nobody else owns it.
    let read = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    // SAFETY: as above.
    let write = unsafe { OwnedFd::from_raw_fd(fds[1]) };
    Ok((read, write))
}

/// What a new process does between `fork` and its program, laid out before the fork.
#[derive(Debug)]
pub(super) struct Child<'a> {
    /// A pipe, read until the tracer says go. Its write end is the tracer's, and closed in the
    /// child.
    pub(super) go: (RawFd, RawFd),
    /// Takes a [`Report`] of what failed. Closed by `execve`.
    pub(super) report: RawFd,
    pub(super) stdio: [Option<RawFd>; 3],
    pub(super) dir: Option<&'a CString>,
    pub(super) filter: Option<&'a [libc::sock_filter]>,
    pub(super) candidates: &'a [CString],
    /// Null-terminated.
    pub(super) argv: Vec<*const c_char>,
    /// Null-terminated.
    pub(super) envp: Vec<*const c_char>,
}

/// The step of the new process that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Step {
    Stdio = 1,
    Dir = 2,
    /// It goes on without a filter.
    Filter = 3,
    Exec = 4,
}

/// A step and its errno, as they pass through the pipe.
pub(super) type Report = [u8; 5];

/// Forks, and lets the child do what `child` says.
pub(super) fn fork(child: &Child<'_>) -> io::Result<Pid> {
    // SAFETY: the child of a process with threads may only make async-signal-safe calls:
    // `Child::run` keeps to that and does not return.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => child.run(),
        pid => Ok(pid),
    }
}

impl Child<'_> {
    fn run(&self) -> ! {
        // SAFETY: the child's copy of a descriptor that nothing in the child uses. Without this the
        // read could not see that the tracer is gone.
        unsafe { libc::close(self.go.1) };
        let mut byte = 0_u8;
        loop {
            // SAFETY: reads one byte into a local.
            match unsafe { libc::read(self.go.0, (&raw mut byte).cast(), 1) } {
                1 => break,
                -1 if errno() == libc::EINTR => {}
                // The tracer is gone, or could not trace us.
                _ => quit(),
            }
        }
        for (to, from) in (0..).zip(self.stdio) {
            if let Some(from) = from {
                // SAFETY: `dup2` takes integers. The descriptors were chosen above 2, so no step
                // overwrites a later one.
                if unsafe { libc::dup2(from, to) } == -1 {
                    self.fail(Step::Stdio);
                }
            }
        }
        if let Some(dir) = self.dir {
            // SAFETY: a string that lives as long as `self`.
            if unsafe { libc::chdir(dir.as_ptr()) } == -1 {
                self.fail(Step::Dir);
            }
        }
        // SAFETY: `SIG_DFL` is a valid disposition.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        if self.filter.is_some_and(|filter| !install(filter)) {
            self.report(Step::Filter, errno());
        }
        let mut refused = libc::ENOENT;
        for candidate in self.candidates {
            // SAFETY: a string and two null-terminated arrays of strings, all laid out before the
            // fork and alive in the frames that called `fork`.
            unsafe { libc::execve(candidate.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
            match errno() {
                // As the shell does: look on, but remember that one was found and refused. In a
                // folder that may not be searched, none was found.
                libc::EACCES if self.candidates.len() == 1 || is_there(candidate) => refused = libc::EACCES,
                libc::EACCES | libc::ENOENT | libc::ENOTDIR => {}
                other => {
                    refused = other;
                    break;
                }
            }
        }
        self.report(Step::Exec, refused);
        quit()
    }

    fn fail(&self, step: Step) -> ! {
        self.report(step, errno());
        quit()
    }

    fn report(&self, step: Step, errno: c_int) {
        let [a, b, c, d] = errno.to_le_bytes();
        let report: Report = [step as u8, a, b, c, d];
        // SAFETY: writes a local array of that length.
        unsafe { libc::write(self.report, report.as_ptr().cast(), report.len()) };
    }
}

/// Ends the child without running anything of the parent's.
fn quit() -> ! {
    // SAFETY: `_exit` takes an integer and does not return.
    unsafe { libc::_exit(127) }
}

fn errno() -> c_int {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Tells whether there is a file of this name, in a folder that may be searched.
fn is_there(path: &CStr) -> bool {
    let mut status = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: a string, and a place for the answer, which is not read.
    unsafe { libc::stat(path.as_ptr(), status.as_mut_ptr()) == 0 }
}

/// Installs the filter: as it is where that is allowed, or else with the promise to gain no
/// privileges.
fn install(filter: &[libc::sock_filter]) -> bool {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    let set = || {
        // A filter that only watches need not cost the tracee its speculation.
        let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        // SAFETY: the kernel reads `len` instructions, which `filter` holds, and writes nothing.
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) == 0 }
    };
    if set() {
        return true;
    }
    // SAFETY: this option takes integers.
    let promised = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1_u64, 0_u64, 0_u64, 0_u64) } == 0;
    promised && set()
}

/// Reads what the child reported so far. The read end must not block.
pub(super) fn read_report(fd: &OwnedFd) -> Option<(u8, io::Error)> {
    let mut report: Report = [0; 5];
    // SAFETY: reads at most the length of the local array into it.
    let read = unsafe { libc::read(fd.as_raw_fd(), report.as_mut_ptr().cast(), report.len()) };
    let [step, errno @ ..] = report;
    (read == 5).then(|| (step, io::Error::from_raw_os_error(i32::from_le_bytes(errno))))
}

/// Tells the child to go on. The caller still has the read end open, so that this cannot raise
/// `SIGPIPE`.
pub(super) fn say_go(fd: &OwnedFd) {
    // SAFETY: writes one byte of a static. If the child has died meanwhile nobody reads it.
    unsafe { libc::write(fd.as_raw_fd(), [1_u8].as_ptr().cast(), 1) };
}

/// Copies a descriptor to one above the standard ones, not inherited by programs.
pub(super) fn above_stdio(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: `fcntl` with this command takes integers.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fcntl` has just made this descriptor, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// The type that the libraries declare the first argument of `ptrace` with.
#[cfg(target_env = "musl")]
type Request = c_int;
#[cfg(not(target_env = "musl"))]
type Request = std::ffi::c_uint;

const PTRACE_EVENT_STOP: c_int = 128;
const PTRACE_GET_SYSCALL_INFO: Request = 0x420e;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_a_real_time_signal_is_decoded() {
        assert_eq!(decode(1, 64 << 8 | 0x7f), Wait::Stopped(1, Stop::Signal(64)));
        assert_eq!(decode(1, 40), Wait::Ended(1, ExitStatus::Signal(40)));
        assert_eq!(decode(1, 3 << 8), Wait::Ended(1, ExitStatus::Code(3)));
    }

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
        assert_eq!(wait_for(child).expect("it stops"), Wait::Stopped(child, Stop::Exit));
        let message = |event| event_message(child, event).expect("it can be asked");
        assert_eq!(message(Stop::Exit), Some(libc::SIGKILL as u64));
        assert_eq!(message(Stop::NewTask(NewTask::Clone)), None, "the number of a signal is no task");
        resume(child, Resume::Cont, 0).expect("it goes on");
        assert_eq!(wait_for(child).expect("it ends"), Wait::Ended(child, ExitStatus::Signal(libc::SIGKILL)));
        assert_eq!(message(Stop::Exit), None);
    }

    #[test]
    fn a_group_stop_and_a_trap_are_told_apart() {
        let stop = |signal: c_int| decode(1, PTRACE_EVENT_STOP << 16 | signal << 8 | 0x7f);
        assert_eq!(stop(libc::SIGTSTP), Wait::Stopped(1, Stop::Group));
        assert_eq!(stop(libc::SIGTRAP), Wait::Stopped(1, Stop::Trap));
        assert_eq!(decode(1, (libc::SIGTRAP | 0x80) << 8 | 0x7f), Wait::Stopped(1, Stop::Syscall));
    }
}
