//! Everything that the library writes: messages that cannot wait for the report, and the report.
//!
//! A write never ends the program by a signal (SIGPIPE, SIGXFSZ), and waits for a slow reader of a
//! FIFO for a limited time only.

#![allow(
    unsafe_code,
    reason = "writes to a descriptor that it does not own, and changes the signal mask"
)]

use mmu_source::Error;
use mmu_source::kernel::BROKER;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;
use std::time::{Duration, Instant};

/// How long a write waits for room in a full FIFO. A blocking descriptor waits as long as it takes.
const PATIENCE_MS: libc::c_int = 2_000;

/// The signals that the kernel sends to a thread whose write fails.
const FATAL: [libc::c_int; 2] = [libc::SIGPIPE, libc::SIGXFSZ];

/// A wait that does not wait.
const NOW: libc::timespec = libc::timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// Writes one line to standard error, in one system call if the kernel takes all of it.
pub(crate) fn complain(line: &str) {
    let _ = print(&format!("mmun: {line}\n"));
}

/// Writes `text` to standard error.
///
/// Does not use `std::io::stderr`, whose lock stays locked in the child of a fork if another thread
/// of the parent is writing.
pub(crate) fn print(text: &str) -> io::Result<()> {
    without_signals(|| write_all(libc::STDERR_FILENO, text.as_bytes()))
}

/// Replaces the content of `file` by `text`.
pub(crate) fn replace(file: &str, text: &str) -> io::Result<()> {
    write_to(file, text, File::options().write(true).truncate(true))
}

/// Appends `text` to `file`, in one system call if the kernel takes all of it: reports of several
/// processes do not mix.
pub(crate) fn append(file: &str, text: &str) -> io::Result<()> {
    write_to(file, text, File::options().append(true))
}

fn write_to(file: &str, text: &str, options: &mut std::fs::OpenOptions) -> io::Result<()> {
    // The flags keep the opening of a FIFO without a reader, or of a terminal, from having an
    // effect on the program.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = options.create(true).custom_flags(flags).open(file);
    let file = file.map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) => io::Error::other("no process reads this FIFO"),
        _ => error,
    })?;
    without_signals(|| write_all(file.as_raw_fd(), text.as_bytes()))
}

fn write_all(descriptor: libc::c_int, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        // SAFETY: `write` reads `rest.len()` bytes, and `rest` has that many.
        let written = unsafe { libc::write(descriptor, rest.as_ptr().cast(), rest.len()) };
        match usize::try_from(written) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => rest = &rest[written..],
            Err(_) => {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock if has_room(descriptor) => {}
                    io::ErrorKind::WouldBlock => {
                        return Err(io::Error::other("its reader reads nothing"));
                    }
                    _ => return Err(error),
                }
            }
        }
    }
    Ok(())
}

/// Waits until a write would not block. Returns false if the wait takes too long.
fn has_room(descriptor: libc::c_int) -> bool {
    let mut poll = libc::pollfd {
        fd: descriptor,
        events: libc::POLLOUT,
        revents: 0,
    };
    let end = Instant::now() + Duration::from_millis(PATIENCE_MS as u64);
    loop {
        let left = end.saturating_duration_since(Instant::now()).as_millis();
        // SAFETY: `poll` reads and writes one `pollfd`, a local variable.
        match unsafe { libc::poll(&raw mut poll, 1, left as libc::c_int) } {
            // A signal handler ran.
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            ready => return ready > 0,
        }
    }
}

/// Runs `write` so that it cannot end the program: into a pipe without a reader, or beyond
/// `RLIMIT_FSIZE`, a write fails with an error, but the kernel sends the thread a signal as well.
/// The signal is blocked meanwhile, and taken back. A signal that was pending before stays pending.
fn without_signals(write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let (mut before, mut pending) = (set_of(&[]), set_of(&[]));
    let fatal = set_of(&FATAL);
    // SAFETY: reads one local set, and writes another.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const fatal, &raw mut before) };
    // SAFETY: writes a local set.
    unsafe { libc::sigpending(&raw mut pending) };
    let written = write();
    for signal in FATAL.iter().filter(|_| written.is_err()) {
        // SAFETY: reads a local set.
        if unsafe { libc::sigismember(&raw const pending, *signal) } == 1 {
            continue;
        }
        let (one, at_once) = (set_of(&[*signal]), NOW);
        // SAFETY: reads a local set and a local time; a null pointer requests no information.
        unsafe { libc::sigtimedwait(&raw const one, ptr::null_mut(), &raw const at_once) };
    }
    // SAFETY: reads a local set; a null pointer requests no old mask.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) };
    written
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: a set is an array of integers, for which zeros are valid.
    let mut set = unsafe { MaybeUninit::<libc::sigset_t>::zeroed().assume_init() };
    for signal in signals {
        // SAFETY: changes a local set; the signals are valid.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    set
}

/// Formats an error of a source as one line: the failure, its cause, and the remedy.
///
/// No capability for the program's file is proposed: the loader ignores `LD_PRELOAD` in a program
/// that has one, so the program would lose the drop-in. Neither is another command beside the
/// broker.
pub(crate) fn explain(error: &Error) -> String {
    let mut line = match error {
        Error::Unavailable {
            source,
            missing,
            remedy,
            ..
        } => match remedy.starts_with("sudo setcap") {
            true => format!("source {source} lacks {missing}"),
            false => format!("source {source} lacks {missing} (try: {remedy})"),
        },
        error => error.to_string(),
    };
    if let Some(source) = std::error::Error::source(error) {
        let _ = write!(line, ": {source}");
    }
    if let Some(hint) = error.hint() {
        let _ = write!(line, "; {hint}");
    }
    // The source reports the first missing thing only: behind the device, it needs capabilities.
    if line.contains("/dev/kvm") && !line.contains(BROKER) {
        line.push_str("; 'mmun doctor' names everything that is missing, or start the broker");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_to_the_device_is_not_shown_as_all_that_is_missing() {
        let of = |missing: &str| {
            explain(&Error::Unavailable {
                source: "kernel",
                missing: missing.to_owned(),
                remedy: "sudo true".to_owned(),
                instead: None,
            })
        };
        let line = of("the right to open /dev/kvm");
        assert!(line.contains("'mmun doctor'"), "{line}");
        assert!(!of("CAP_BPF").contains("doctor"));
    }
}
