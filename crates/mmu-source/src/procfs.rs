//! Files of `/proc`, if it numbers tasks as this process does.
//!
//! A process in a pid namespace of its own can see the `/proc` of an outer one: `unshare --pid`
//! without `--mount-proc`, or a mount over another that was taken away. There, the number of a task
//! is another task's, or no task's, so what its files say is not known of the task that is meant.

use std::sync::atomic::{AtomicI64, Ordering};
use std::{fs, io};

/// Tells whether `/proc` is of another pid namespace than this process.
///
/// The tracer then reads nothing there about a task, because the files are another task's.
pub fn proc_is_foreign() -> bool {
    /// The answer of the process that asked last: its number, negative if `/proc` is foreign.
    /// Relaxed: it hands nothing over. 0: no process has asked.
    static ANSWER: AtomicI64 = AtomicI64::new(0);
    let own = i64::from(std::process::id());
    // The child of a fork can be in another namespace, and has another number, or a new `/proc`.
    let before = ANSWER.load(Ordering::Relaxed);
    if before.abs() == own {
        return before < 0;
    }
    let Ok(shown) = fs::read_link("/proc/self") else {
        // Nothing is mounted there, or the `/proc` of an inner namespace, which this process is not
        // in. Something can be mounted later.
        return fs::exists("/proc/1").unwrap_or(false);
    };
    let is_foreign = shown.to_str().and_then(|shown| shown.parse().ok()) != Some(own);
    ANSWER.store(if is_foreign { -own } else { own }, Ordering::Relaxed);
    is_foreign
}

/// The name of a file that tells about the task `tid`.
///
/// # Errors
/// `ENOENT` if `/proc` numbers tasks otherwise.
pub(crate) fn of(tid: libc::pid_t, file: &str) -> io::Result<String> {
    if proc_is_foreign() {
        return Err(io::Error::from_raw_os_error(libc::ENOENT));
    }
    Ok(format!("/proc/{tid}/{file}"))
}
