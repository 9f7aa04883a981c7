//! Reads files of `/proc` only if `/proc` belongs to this process's pid namespace.
//!
//! A process in a pid namespace can see the `/proc` of an outer namespace: after `unshare --pid`
//! without `--mount-proc`, or after a mount that covered the outer `/proc` was removed. A thread id
//! then names another task there, or none. So the files say nothing about the task in question.

use std::path::Path;
use std::{fs, io};

/// Tells whether `/proc` belongs to another pid namespace than this process.
///
/// If so, the tracer reads no task's files there, because they describe other tasks.
pub fn proc_is_foreign() -> bool {
    match fs::read_link("/proc/self") {
        Ok(shown) => shown != Path::new(&std::process::id().to_string()),
        // `/proc` is not mounted, or belongs to an inner namespace that does not contain this
        // process.
        Err(_) => fs::exists("/proc/1").unwrap_or(false),
    }
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

/// Tells whether `error`, from opening an entry of `folder` (`fd` or `fdinfo`) of the task `tid`,
/// means that the task has no such descriptor.
///
/// Any other error means "not known". Before Linux 6.10 a tracer with `CAP_DAC_OVERRIDE` can search
/// the folder of a task that is not dumpable, but opening an entry fails with `EACCES`. The same
/// holds for the links in `fd` of every kernel.
pub(crate) fn lacks_descriptor(tid: libc::pid_t, folder: &str, error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        && of(tid, &format!("{folder}/.")).is_ok_and(|path| fs::exists(path).unwrap_or(false))
}
