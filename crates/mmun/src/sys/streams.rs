//! Standard streams that the caller has closed stay closed in the programs that `mmun` starts, and
//! `SIGPIPE` stays ignored if the caller ignored it.
//!
//! Before `main`, Rust's runtime opens `/dev/null` for each closed stream, so that no other file
//! gets its number, and ignores `SIGPIPE`. A program that `mmun` starts must find both as the
//! caller left them.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};

use super::{is_ignored, set_handler};

/// A bit for each stream that was closed.
static CLOSED: AtomicU8 = AtomicU8::new(0);
/// Whether SIGPIPE was ignored when this process was started.
static IGNORES_PIPE: AtomicBool = AtomicBool::new(false);

/// Runs before the runtime does: the loader calls each function that this section points to.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

extern "C" fn look() {
    for stream in 0..3 {
        // SAFETY: `F_GETFD` takes integers and changes nothing.
        if unsafe { libc::fcntl(stream, libc::F_GETFD) } == -1 {
            // Relaxed: there is one thread.
            CLOSED.fetch_or(1 << stream, Relaxed);
        }
    }
    // Relaxed: see above.
    IGNORES_PIPE.store(is_ignored(libc::SIGPIPE), Relaxed);
}

/// Makes `execve` close each `/dev/null` that the runtime opened, so that no program inherits
/// one.
pub(crate) fn keep_closed_in_programs() {
    for stream in 0..3 {
        if CLOSED.load(Relaxed) & (1 << stream) != 0 {
            // SAFETY: `F_SETFD` takes integers, and changes only whether `execve` closes the file.
            unsafe { libc::fcntl(stream, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
}

/// Whether `SIGPIPE` was ignored when this process was started.
pub(crate) fn ignores_sigpipe() -> bool {
    IGNORES_PIPE.load(Relaxed)
}

/// Makes `command` start with `SIGPIPE` ignored, if this process was started so. The standard
/// library sets the default before.
pub(crate) fn inherit_sigpipe(command: &mut Command) {
    if !ignores_sigpipe() {
        return;
    }
    let ignore = || {
        set_handler(libc::SIGPIPE, libc::SIG_IGN);
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, or before exec, and makes one system call.
    unsafe { command.pre_exec(ignore) };
}
