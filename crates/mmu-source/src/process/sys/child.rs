//! The new process between `fork` and its program, and the pipes to it.

use super::super::Pid;
use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// What a new process does between `fork` and its program, laid out before the fork.
#[derive(Debug)]
pub(in super::super) struct Child<'a> {
    /// A pipe, read until the tracer says go. Its write end is the tracer's, and closed in the
    /// child.
    pub(in super::super) go: (RawFd, RawFd),
    /// Takes a [`Report`] of what failed. Closed by `execve`.
    pub(in super::super) report: RawFd,
    pub(in super::super) stdio: [Option<RawFd>; 3],
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
    /// It continues without a filter.
    Filter = 3,
    Exec = 4,
}

/// A step and its errno, as they pass through the pipe.
pub(in super::super) type Report = [u8; 5];

/// Forks, and lets the child do what `child` says.
pub(in super::super) fn fork(child: &Child<'_>) -> io::Result<Pid> {
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
                // As a shell does: continue the search, but remember that a file was found and may
                // not be executed. In a folder that may not be searched, no file was found.
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

/// Installs the filter. Where that needs a privilege that the process lacks, first promises to gain
/// no privileges (`PR_SET_NO_NEW_PRIVS`).
fn install(filter: &[libc::sock_filter]) -> bool {
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    let set = || {
        // Without this flag, the kernel restricts the tracee's speculative execution, which only a
        // filter that confines a program needs.
        let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        // SAFETY: the kernel reads `len` instructions, which `filter` holds, and writes nothing.
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
    // SAFETY: this option takes integers.
    let promised =
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1_u64, 0_u64, 0_u64, 0_u64) } == 0;
    promised && set()
}

/// Reads what the child reported so far. The read end must not block.
pub(in super::super) fn read_report(fd: &OwnedFd) -> Option<(u8, io::Error)> {
    let mut report: Report = [0; 5];
    // SAFETY: reads at most the length of the local array into it.
    let read = unsafe { libc::read(fd.as_raw_fd(), report.as_mut_ptr().cast(), report.len()) };
    let [step, errno @ ..] = report;
    (read == 5).then(|| {
        (
            step,
            io::Error::from_raw_os_error(i32::from_le_bytes(errno)),
        )
    })
}

/// Tells the child to go on. The caller still has the read end open, so that this cannot raise
/// `SIGPIPE`.
pub(in super::super) fn say_go(fd: &OwnedFd) {
    // SAFETY: writes one byte of a static. If the child has died meanwhile it is never read.
    unsafe { libc::write(fd.as_raw_fd(), [1_u8].as_ptr().cast(), 1) };
}

/// Copies a descriptor to one above the standard ones, not inherited by programs.
pub(in super::super) fn above_stdio(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: `fcntl` with this command takes integers.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fcntl` has just made this descriptor, and it has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Makes a pipe that programs do not inherit: its read end, which does not block if asked so, and
/// its write end.
pub(in super::super) fn pipe(flags: c_int) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `pipe2` writes two descriptors to the array.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | flags) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `pipe2` has just made this descriptor, and it has no other owner.
    let read = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    // SAFETY: as above.
    let write = unsafe { OwnedFd::from_raw_fd(fds[1]) };
    Ok((read, write))
}
