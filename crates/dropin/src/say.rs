//! Messages that cannot wait for the report.

#![allow(unsafe_code, reason = "writes to a descriptor that it does not own")]

use mmu_source::Error;
use std::fmt::Write as _;
use std::io;

/// Writes one line to standard error, in one system call if the kernel takes all of it.
pub(crate) fn complain(line: &str) {
    let _ = print(&format!("mmun: {line}\n"));
}

/// Writes `text` to standard error.
///
/// Does not use `std::io::stderr`, whose lock stays locked in the child of a fork if another thread
/// of the parent is writing.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        // SAFETY: `write` reads `rest.len()` bytes, and `rest` has that many.
        let written = unsafe { libc::write(libc::STDERR_FILENO, rest.as_ptr().cast(), rest.len()) };
        match usize::try_from(written) {
            Ok(written) => rest = &rest[written..],
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Formats an error of a source as one line: the failure, its cause, and the remedy.
///
/// No capability for the program's file is proposed: the loader ignores `LD_PRELOAD` in a program
/// that has one, so the program would lose the drop-in.
pub(crate) fn explain(error: &Error) -> String {
    let mut line = match error {
        Error::Unavailable {
            source,
            missing,
            remedy,
        } if remedy.starts_with("sudo setcap") => format!("source {source} lacks {missing}"),
        error => error.to_string(),
    };
    if let Some(source) = std::error::Error::source(error) {
        let _ = write!(line, ": {source}");
    }
    if let Some(hint) = error.hint() {
        let _ = write!(line, "; {hint}");
    }
    line
}
