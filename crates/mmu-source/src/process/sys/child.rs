//! The new process between `fork` and its program, and the pipes to that process.

use super::super::Pid;
use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// What the new process does between `fork` and its program. Prepared before the fork.
#[derive(Debug)]
pub(in super::super) struct Child<'a> {
    /// A pipe. The child blocks on the read end until the tracer writes to it. The write end is the
    /// tracer's; the child closes its copy.
    pub(in super::super) go: (RawFd, RawFd),
    /// The write end of a pipe for the [`Report`] of a failure. `execve` closes it.
    pub(in super::super) report: RawFd,
    pub(in super::super) stdio: [Option<RawFd>; 3],
    pub(in super::super) ignores_sigpipe: bool,
    pub(in super::super) dir: Option<&'a CString>,
    pub(in super::super) filter: Option<&'a [libc::sock_filter]>,
    pub(in super::super) candidates: &'a [CString],
    /// Null-terminated.
    pub(in super::super) argv: Vec<*const c_char>,
    /// Null-terminated.
    pub(in super::super) envp: Vec<*const c_char>,
}

/// The step of the new process that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(in super::super) enum Step {
    Stdio = 1,
    Dir = 2,
    /// A failure here does not stop the child: it continues without a filter.
    Filter = 3,
    Exec = 4,
}

/// A step and its errno, in the form that goes through the pipe.
pub(in super::super) type Report = [u8; 5];

/// Forks. The child does what `child` describes.
pub(in super::super) fn fork(child: &Child<'_>) -> io::Result<Pid> {
    // SAFETY: after a fork, the child of a process with threads may only make async-signal-safe
    // calls. `Child::run` makes no others, and does not return.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => child.run(),
        pid => Ok(pid),
    }
}

impl Child<'_> {
    fn run(&self) -> ! {
        // SAFETY: closes the child's copy of a descriptor that nothing in the child uses. If it
        // stayed open, the read below could not see that the tracer is gone.
        unsafe { libc::close(self.go.1) };
        let mut byte = 0_u8;
        loop {
            // SAFETY: `read` writes one byte to a local.
            match unsafe { libc::read(self.go.0, (&raw mut byte).cast(), 1) } {
                1 => break,
                -1 if errno() == libc::EINTR => {}
                // The tracer is gone, or failed to trace this process.
                _ => quit(),
            }
        }
        for (to, from) in (0..).zip(self.stdio) {
            if let Some(from) = from {
                // SAFETY: `dup2` takes integers. All source descriptors are above 2, so no step
                // overwrites the source of a later one.
                if unsafe { libc::dup2(from, to) } == -1 {
                    self.fail(Step::Stdio);
                }
            }
        }
        if let Some(dir) = self.dir {
            // SAFETY: the string lives as long as `self`.
            if unsafe { libc::chdir(dir.as_ptr()) } == -1 {
                self.fail(Step::Dir);
            }
        }
        let disposition = match self.ignores_sigpipe {
            true => libc::SIG_IGN,
            false => libc::SIG_DFL,
        };
        // SAFETY: both are valid dispositions.
        unsafe { libc::signal(libc::SIGPIPE, disposition) };
        if self.filter.is_some_and(|filter| !install(filter)) {
            self.report(Step::Filter, errno());
        }
        let mut refused = libc::ENOENT;
        for candidate in self.candidates {
            // SAFETY: the string and the two null-terminated arrays were prepared before the fork,
            // and are alive in the frames that called `fork`.
            unsafe { libc::execve(candidate.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
            match errno() {
                // As a shell does, continue the search, but remember that a file exists and may not
                // be executed. An `EACCES` that only means that a directory may not be searched
                // does not count.
                libc::EACCES if self.candidates.len() == 1 || is_there(candidate) => {
                    refused = libc::EACCES
                }
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
        // SAFETY: writes from a local array of that length.
        unsafe { libc::write(self.report, report.as_ptr().cast(), report.len()) };
    }
}

/// Ends the child without running any code of the parent, such as exit handlers.
fn quit() -> ! {
    // SAFETY: `_exit` takes an integer and does not return.
    unsafe { libc::_exit(127) }
}

fn errno() -> c_int {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Tells whether a file exists at `path`, in a directory that may be searched.
fn is_there(path: &CStr) -> bool {
    let mut status = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the path ends in a zero byte, and the call writes to a local that is never read.
    unsafe { libc::stat(path.as_ptr(), status.as_mut_ptr()) == 0 }
}

/// Installs the filter. If that needs a privilege that the process lacks, sets
/// `PR_SET_NO_NEW_PRIVS` first.
fn install(filter: &[libc::sock_filter]) -> bool {
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    let set = || {
        // Without this flag the kernel restricts the tracee's speculative execution. Only a filter
        // that confines a program needs that restriction.
        let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        // SAFETY: the kernel reads `len` instructions from `filter` and writes nothing.
        unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                flags,
                &raw const program,
            ) == 0
        }
    };
    if set() {
        return true;
    }
    // SAFETY: `PR_SET_NO_NEW_PRIVS` takes integers.
    let promised =
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1_u64, 0_u64, 0_u64, 0_u64) } == 0;
    promised && set()
}

/// Reads what the child has reported so far. The read end must be non-blocking.
pub(in super::super) fn read_report(fd: &OwnedFd) -> Option<(u8, io::Error)> {
    let mut report: Report = [0; 5];
    // SAFETY: `read` writes at most the length of the local array to it.
    let read = unsafe { libc::read(fd.as_raw_fd(), report.as_mut_ptr().cast(), report.len()) };
    let [step, errno @ ..] = report;
    (read == 5).then(|| {
        (
            step,
            io::Error::from_raw_os_error(i32::from_le_bytes(errno)),
        )
    })
}

/// Tells the child to continue. The caller still has the read end open, so the write cannot raise
/// `SIGPIPE`.
pub(in super::super) fn say_go(fd: &OwnedFd) {
    // SAFETY: writes one byte of a static. If the child has died, no process reads the byte.
    unsafe { libc::write(fd.as_raw_fd(), [1_u8].as_ptr().cast(), 1) };
}

/// Copies a descriptor to a close-on-exec one above 2.
pub(in super::super) fn above_stdio(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: `fcntl` with this command takes integers.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fcntl` has just made this descriptor, and it has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Makes a close-on-exec pipe, with further `flags` for `pipe2`. Returns its read end and its write
/// end.
pub(in super::super) fn pipe(flags: c_int) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `pipe2` writes two descriptors to the array.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | flags) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `pipe2` has just made this descriptor, and it has no other owner.
    let read = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    // SAFETY: `pipe2` has just made this descriptor, and it has no other owner.
    let write = unsafe { OwnedFd::from_raw_fd(fds[1]) };
    Ok((read, write))
}
