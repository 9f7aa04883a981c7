//! The destination of the report. It is opened before the program starts, and written when the
//! program has ended.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Access;

use crate::output::{STDOUT, is_standard, replace, stdout};
use crate::reason;

/// How long a write waits for room in a full FIFO.
const PATIENCE: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};

/// A standard stream, or a file that can be written.
#[derive(Debug)]
pub(super) struct Destination<'a> {
    path: Option<&'a Path>,
    /// Open since before the program started; `None` for a standard stream and for a FIFO.
    file: Option<File>,
    /// Whether the file did not exist before.
    is_new: bool,
}

impl Destination<'_> {
    /// Opens the destination. An existing file keeps its content until the report is written.
    ///
    /// # Errors
    /// One line: why the destination cannot be written.
    pub(super) fn open(path: Option<&Path>) -> Result<Destination<'_>, String> {
        let mut destination = Destination {
            path,
            file: None,
            is_new: false,
        };
        let Some(path) = path.filter(|path| !is_standard(path)) else {
            return Ok(destination);
        };
        let opened = match fs::metadata(path) {
            // Opening a FIFO waits for a reader, and the reader may wait for the program.
            Ok(file) if file.file_type().is_fifo() => {
                let access = rustix::fs::access(path, Access::WRITE_OK);
                access.map(|()| None).map_err(io::Error::from)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                destination.is_new = true;
                let file = File::options()
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(path);
                file.map(Some)
            }
            _ => File::options().write(true).open(path).map(Some),
        };
        destination.file = opened.map_err(|error| {
            format!(
                "open on {}: {}; the -o file must be writable",
                path.display(),
                reason(&error)
            )
        })?;
        Ok(destination)
    }

    /// Removes the file if it is new, because no program has run.
    pub(super) fn discard(self) {
        if let (Some(path), true) = (self.path, self.is_new) {
            let _ = fs::remove_file(path);
        }
    }

    /// # Errors
    /// One line: why the report could not be written.
    pub(super) fn write(self, text: &str) -> Result<(), String> {
        let Some(path) = self.path else {
            // If standard error is closed, the report is lost.
            let _ = io::stderr().write_all(text.as_bytes());
            return Ok(());
        };
        let (written, name) = match self.file {
            None if is_standard(path) => (
                stdout().and_then(|mut stdout| stdout.write_all(text.as_bytes())),
                STDOUT.to_owned(),
            ),
            None => (write_fifo(path, text), path.display().to_string()),
            Some(mut file) => (
                replace(&mut file, text.as_bytes()),
                path.display().to_string(),
            ),
        };
        written.map_err(|error| format!("write on {name}: {}", reason(&error)))
    }
}

/// Writes to a FIFO. Neither the opening nor the writing waits for a reader for long.
fn write_fifo(path: &Path, text: &str) -> io::Result<()> {
    let mut options = File::options();
    let opened = options
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let mut fifo = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) => io::Error::other("no process reads this FIFO"),
        _ => error,
    })?;
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        match fifo.write(rest) {
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match poll(&mut [PollFd::new(&fifo, PollFlags::OUT)], Some(&PATIENCE)) {
                    Ok(0) => return Err(io::Error::other("its reader reads nothing")),
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
