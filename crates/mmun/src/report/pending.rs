//! The page of `mmun trace --report`, while the trace is being made.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::page;
use crate::output::Output;
use crate::recording::Recording;
use crate::{complain, reason};

/// A page that can be written, and the file that keeps the records until it is.
#[derive(Debug)]
pub(crate) struct Pending {
    path: PathBuf,
    page: File,
    /// There was no such file.
    is_new: bool,
    spool: PathBuf,
}

impl Pending {
    /// A page, and where the records for it go, as JSON.
    ///
    /// # Errors
    /// The page or the file of records cannot be made: a line for the user.
    pub(crate) fn open(path: &Path) -> Result<(Pending, Output), String> {
        let fail = |path: &Path, error: &io::Error, hint: &str| {
            format!("open on {}: {}; {hint}", path.display(), reason(error))
        };
        let is_new = !path.exists();
        let page = File::options().write(true).create(true).truncate(false).open(path);
        let page = page.map_err(|error| fail(path, &error, "the file of --report must be writable"))?;
        let spool = spool().and_then(|spool| Ok((Output::open(Some(&spool))?, spool)));
        let (output, spool) = spool.map_err(|error| {
            if is_new {
                let _ = fs::remove_file(path);
            }
            fail(&std::env::temp_dir(), &error, "records are kept there for the page; TMPDIR names another folder")
        })?;
        Ok((Pending { path: path.to_owned(), page, is_new, spool }, output))
    }

    /// There was nothing to trace.
    pub(crate) fn discard(self) {
        let _ = fs::remove_file(&self.spool);
        if self.is_new {
            let _ = fs::remove_file(&self.path);
        }
    }

    /// Makes the page of the records. If that fails, says why, and where the records are.
    pub(crate) fn finish(mut self) -> bool {
        let written =
            Recording::open(&self.spool).map_err(|error| format!("read on {}: {error}", self.spool.display()));
        let written = written.and_then(|recording| {
            let text = page::make(&recording);
            let emptied =
                if self.page.metadata().is_ok_and(|about| about.is_file()) { self.page.set_len(0) } else { Ok(()) };
            let written = emptied.and_then(|()| self.page.write_all(&text));
            written.map_err(|error| format!("write on {}: {}", self.path.display(), reason(&error)))
        });
        match written {
            Ok(()) => {
                let _ = fs::remove_file(&self.spool);
                true
            }
            Err(why) => {
                let spool = self.spool.display();
                complain(&format!("{why}; the records are kept: 'mmun report -o FILE.html {spool}' makes the page"));
                false
            }
        }
    }
}

/// A new file that only its owner may read: a trace tells what programs do.
fn spool() -> io::Result<PathBuf> {
    let folder = std::env::temp_dir();
    for attempt in 0..100_u32 {
        let path = folder.join(format!("mmun-trace-{}-{attempt}.jsonl", std::process::id()));
        match File::options().write(true).create_new(true).mode(0o600).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other.map(|_| path),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}
