//! The error of every source.

use mmu_notifier::VaRange;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::Path;

/// The error of a source.
///
/// [`Error::hint`] returns a hint for the user.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The program could not be executed: `ENOENT` if it was not found, `EACCES` if it may not be
    /// executed.
    Exec {
        /// The program as it was given.
        program: OsString,
        /// The error of `execve`.
        source: io::Error,
    },
    /// The new process could not be set up before its program ran: `EAGAIN` if the limit of
    /// processes is reached, `EPERM` if tracing is refused, `ENOENT` if the working directory does
    /// not exist.
    Spawn {
        /// The call that failed.
        call: &'static str,
        /// The error of that call.
        source: io::Error,
    },
    /// Attaching to a process failed: `ESRCH` if the process does not exist, `EPERM` if tracing is
    /// refused or the process already has a tracer.
    Attach {
        /// The process as it was given.
        pid: i32,
        /// The kernel's error.
        source: io::Error,
    },
    /// A system call failed, on a tracee or for the source itself. A tracee's death is not reported
    /// as this error.
    Kernel {
        /// The call that failed.
        call: &'static str,
        /// The task that the call was made on, if any.
        tid: Option<i32>,
        /// The kernel's error.
        source: io::Error,
    },
    /// The source cannot start, because the machine or this process's privileges lack something.
    Unavailable {
        /// The source: `kernel`, `uffd`, `hook`.
        source: &'static str,
        /// What is missing.
        missing: String,
        /// A command that provides what is missing.
        remedy: String,
        /// Another such command, which gives a right to this program or user. If there is one,
        /// `remedy` starts a broker, which lends the program nothing but the source.
        instead: Option<String>,
    },
    /// A range could not be armed.
    Arm {
        /// The call that failed.
        call: &'static str,
        /// The range as it was given.
        range: VaRange,
        /// The kernel's error.
        source: io::Error,
    },
    /// The handle was made before a fork, and the caller is the child. The source watches the
    /// parent; the child must start a source of its own.
    AfterFork {
        /// The source.
        source: &'static str,
    },
    /// The call would wait for its own thread: it was made in a callback, in a bracket, or in a
    /// signal handler that has interrupted the source.
    InCallback {
        /// The source.
        source: &'static str,
    },
    /// The source cannot work here, because the kernel or the processor lacks something.
    Unsupported {
        /// What is missing.
        what: &'static str,
    },
}

impl Error {
    /// Returns a hint that usually helps the user, in one line without a full stop.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::Attach { source, .. } => match source.raw_os_error() {
                Some(libc::EPERM) => Some(
                    "another tracer may hold it, or tracing needs CAP_SYS_PTRACE (see /proc/sys/kernel/yama/ptrace_scope)",
                ),
                Some(libc::ESRCH) => Some("it may have ended: `ps -e` lists what runs"),
                _ => None,
            },
            Error::Spawn { source, .. } if source.raw_os_error() == Some(libc::EPERM) => {
                Some(if is_traced() {
                    "this process is itself traced, and a task can have one tracer only: start it without the outer one"
                } else {
                    "ptrace may be forbidden here, as in some containers"
                })
            }
            Error::Spawn { source, .. }
            | Error::Kernel {
                call: START,
                source,
                ..
            } if source.raw_os_error() == Some(libc::EAGAIN) => Some(
                "the limit of processes and threads is reached (ulimit -u, or pids.max of the control group)",
            ),
            Error::Kernel {
                call: "mmap" | "mremap" | "mprotect",
                source,
                ..
            } if source.raw_os_error() == Some(libc::ENOMEM) => Some(
                "a limit of memory or mappings is reached (ulimit -v, sysctl vm.max_map_count)",
            ),
            Error::Unsupported { .. } => Some("Linux 5.3 or later on x86-64 or aarch64 is needed"),
            Error::Spawn { source, .. }
            | Error::Kernel { source, .. }
            | Error::Arm { source, .. } => match source.raw_os_error() {
                Some(libc::EMFILE) => {
                    Some("the limit of open files is reached (ulimit -n), also for a source's own")
                }
                Some(libc::ENFILE) => {
                    Some("the system's limit of open files is reached (sysctl fs.file-max)")
                }
                _ => None,
            },
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Exec { program, .. } => write!(f, "execve on {}", Path::new(program).display()),
            Error::Spawn { call, .. } => write!(f, "{call} on the new process"),
            Error::Attach { pid, .. } => write!(f, "PTRACE_SEIZE on pid {pid}"),
            Error::Kernel {
                call,
                tid: Some(tid),
                ..
            } => write!(f, "{call} on task {tid}"),
            Error::Kernel {
                call, tid: None, ..
            } => f.write_str(call),
            Error::Unavailable {
                source,
                missing,
                remedy,
                instead,
            } => {
                write!(f, "source {source} lacks {missing} (try: {remedy}")?;
                if let Some(instead) = instead {
                    write!(f, "; or: {instead}")?;
                }
                f.write_str(")")
            }
            Error::Arm { call, range, .. } => write!(f, "{call} on {range}"),
            Error::AfterFork { source } => {
                write!(
                    f,
                    "source {source} was started before a fork: start it again in the child"
                )
            }
            Error::InCallback { source } => {
                write!(
                    f,
                    "source {source} was asked to wait inside one of its own callbacks"
                )
            }
            Error::Unsupported { what } => write!(f, "{what} is not available"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Exec { source, .. }
            | Error::Spawn { source, .. }
            | Error::Attach { source, .. }
            | Error::Arm { source, .. }
            | Error::Kernel { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// The call of [`Error::Kernel`] if the system gives no thread.
pub(crate) const START: &str = "start of a thread";

/// Tells whether this thread is traced. If `/proc` cannot be read, returns false.
fn is_traced() -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    status.lines().any(|line| {
        line.strip_prefix("TracerPid:")
            .is_some_and(|pid| pid.trim() != "0")
    })
}

/// If a call failed because descriptors or memory ran out, returns what is missing and the command
/// that helps. Such a failure says nothing about the kernel's version or the process's privileges.
pub(crate) fn exhausted(error: &io::Error) -> Option<(String, String)> {
    let (missing, remedy) = match error.raw_os_error()? {
        libc::EMFILE => (
            "descriptors, of which it needs some twenty",
            "ulimit -n \"$(ulimit -Hn)\"",
        ),
        libc::ENFILE => (
            "descriptors of the whole system",
            "sysctl fs.file-nr fs.file-max",
        ),
        libc::ENOMEM => ("memory of the kernel, or of this control group", "free -h"),
        _ => return None,
    };
    Some((format!("{missing}: {error}"), remedy.to_owned()))
}

/// Returns the shell command that grants capabilities to the running program.
pub(crate) fn setcap(capabilities: &str) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| "PROGRAM".into());
    let quoted = program.to_string_lossy().replace('\'', r"'\''");
    format!("sudo setcap {capabilities}+ep '{quoted}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remedy_names_this_program() {
        let own = std::env::current_exe().expect("this program has a name");
        assert_eq!(
            setcap("cap_bpf"),
            format!("sudo setcap cap_bpf+ep '{}'", own.display())
        );
    }

    #[test]
    fn lack_of_descriptors_or_memory_is_not_taken_for_an_old_kernel() {
        let exhausted = |errno| exhausted(&io::Error::from_raw_os_error(errno));
        let (missing, remedy) = exhausted(libc::EMFILE).expect("it is known");
        assert!(
            missing.starts_with("descriptors") && remedy.starts_with("ulimit -n"),
            "{missing} {remedy}"
        );
        assert!(exhausted(libc::ENFILE).is_some_and(|(_, remedy)| remedy.contains("fs.file-max")));
        assert!(exhausted(libc::ENOMEM).is_some_and(|(_, remedy)| remedy == "free -h"));
        assert!(
            [libc::EPERM, libc::EINVAL, libc::ENOSYS]
                .map(exhausted)
                .iter()
                .all(Option::is_none)
        );
        let error = Error::Kernel {
            call: "eventfd",
            tid: None,
            source: io::Error::from_raw_os_error(libc::EMFILE),
        };
        assert!(error.hint().is_some_and(|hint| hint.contains("ulimit -n")));
        for (call, errno, advice) in [
            (START, libc::EAGAIN, "ulimit -u"),
            ("mmap", libc::ENOMEM, "vm.max_map_count"),
        ] {
            let source = io::Error::from_raw_os_error(errno);
            let error = Error::Kernel {
                call,
                tid: None,
                source,
            };
            assert!(error.hint().is_some_and(|hint| hint.contains(advice)));
        }
    }

    #[test]
    fn an_error_names_the_call_and_the_object_and_does_not_repeat_its_source() {
        let error = Error::Attach {
            pid: 7,
            source: io::Error::from_raw_os_error(libc::EPERM),
        };
        assert_eq!(error.to_string(), "PTRACE_SEIZE on pid 7");
        assert!(
            error
                .hint()
                .expect("EPERM has a hint")
                .contains("ptrace_scope")
        );
    }
}
