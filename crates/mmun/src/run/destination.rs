//! The destination of the report. It is opened before the program starts, and written when the
//! program has ended.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::Access;

use crate::output::replace;
use crate::reason;

/// Standard error, or a file that can be written.
#[derive(Debug)]
pub(super) struct Destination<'a> {
    path: Option<&'a Path>,
    /// Open since before the program started; `None` for standard error and for a FIFO.
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
        let Some(path) = path else {
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
        let written = match self.file {
            None => fs::write(path, text),
            Some(mut file) => replace(&mut file, text.as_bytes()),
        };
        written.map_err(|error| format!("write on {}: {}", path.display(), reason(&error)))
    }
}
