//! Reads files of `/proc` only if `/proc` belongs to this process's pid namespace.
//!
//! A process in a pid namespace can see the `/proc` of an outer namespace: after `unshare --pid`
//! without `--mount-proc`, or after a mount that covered the outer `/proc` was removed. The number
//! of a task then names another task there, or none. So the files say nothing about the task in
//! question.

use std::sync::atomic::{AtomicI64, Ordering};
use std::{fs, io};

/// Tells whether `/proc` belongs to another pid namespace than this process.
///
/// If so, the tracer reads no task's files there, because they describe other tasks.
pub fn proc_is_foreign() -> bool {
    /// The pid of the process that asked last, negative if `/proc` is foreign; 0 if none has asked.
    /// Relaxed: it publishes no other data.
    static ANSWER: AtomicI64 = AtomicI64::new(0);
    let own = i64::from(std::process::id());
    // The child of a fork may be in another pid namespace. Then its pid differs from the cached
    // one, or `/proc` is a new one.
    let before = ANSWER.load(Ordering::Relaxed);
    if before.abs() == own {
        return before < 0;
    }
    let Ok(shown) = fs::read_link("/proc/self") else {
        // `/proc` is not mounted, or belongs to an inner namespace that does not contain this
        // process. Do not cache the answer: `/proc` may be mounted later.
        return fs::exists("/proc/1").unwrap_or(false);
    };
    let is_foreign = shown.to_str().and_then(|shown| shown.parse().ok()) != Some(own);
    ANSWER.store(if is_foreign { -own } else { own }, Ordering::Relaxed);
    is_foreign
}

/// Returns the path of a file about the task `tid`.
///
/// # Errors
/// `ENOENT` if `/proc` belongs to another pid namespace.
pub(crate) fn of(tid: libc::pid_t, file: &str) -> io::Result<String> {
    if proc_is_foreign() {
        return Err(io::Error::from_raw_os_error(libc::ENOENT));
    }
    Ok(format!("/proc/{tid}/{file}"))
}
