//! Files that `mmun trace` makes at the end from all records: the page of `--report`, and the files
//! of viewers. During the trace the records go to a temporary file.

use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::page;
use crate::output::{Output, STDOUT, is_standard, open_or_make, replace, stdout};
use crate::recording::Recording;
use crate::{complain, formats, reason};

/// The kind of file that is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Product {
    Page,
    Perfetto,
    Chrome,
}

impl Product {
    fn make(self, recording: &Recording) -> Vec<u8> {
        match self {
            Product::Page => page::make(recording),
            Product::Perfetto => formats::perfetto(recording),
            Product::Chrome => formats::chrome(recording),
        }
    }

    fn is_binary(self) -> bool {
        self == Product::Perfetto
    }

    /// The option that names the file.
    fn option(self) -> &'static str {
        if self == Product::Page {
            "--report"
        } else {
            "-o"
        }
    }

    /// The command that makes the product from kept records.
    fn command(self) -> &'static str {
        match self {
            Product::Page => "mmun report -o FILE.html",
            Product::Perfetto => "mmun report --format perfetto -o FILE",
            Product::Chrome => "mmun report --format chrome -o FILE",
        }
    }
}

/// The product's file, and the temporary file of the records.
#[derive(Debug)]
pub(crate) struct Pending {
    product: Product,
    path: PathBuf,
    file: File,
    /// Whether the product's file is new.
    is_new: bool,
    spool: PathBuf,
}

impl Pending {
    /// Opens the product's file and the output for its records, as JSON.
    ///
    /// # Errors
    /// One of the two files cannot be made: a line for the user.
    pub(crate) fn open(path: &Path, product: Product) -> Result<(Pending, Output), String> {
        let fail = |path: &Path, error: &io::Error, hint: &str| {
            format!("open on {}: {}; {hint}", path.display(), reason(error))
        };
        if is_standard(path) && product.is_binary() && io::stdout().is_terminal() {
            return Err(
                "trace on standard output: a perfetto trace is no text; name a file with -o".into(),
            );
        }
        let file = match is_standard(path) {
            true => stdout().map(|file| (file, false)),
            false => open_or_make(path),
        };
        let hint = format!("the file of {} must be writable", product.option());
        let (file, is_new) = file.map_err(|error| fail(path, &error, &hint))?;
        let spool = spool().and_then(|spool| Ok((Output::open(Some(&spool))?, spool)));
        let (output, spool) = spool.map_err(|error| {
            if is_new {
                let _ = fs::remove_file(path);
            }
            fail(
                &std::env::temp_dir(),
                &error,
                "records are kept there until the end; TMPDIR names another folder",
            )
        })?;
        Ok((
            Pending {
                product,
                path: path.to_owned(),
                file,
                is_new,
                spool,
            },
            output,
        ))
    }

    /// Removes the temporary file, and the product's file if it is new, because there was no trace.
    pub(crate) fn discard(self) {
        let _ = fs::remove_file(&self.spool);
        if self.is_new {
            let _ = fs::remove_file(&self.path);
        }
    }

    /// Makes the product from the records. If that fails, prints the reason and the path of the
    /// records, and returns `false`.
    pub(crate) fn finish(mut self) -> bool {
        let written = Recording::open(&self.spool)
            .map_err(|error| format!("read on {}: {error}", self.spool.display()));
        let written = written.and_then(|recording| {
            let text = self.product.make(&recording);
            let (written, name) = if is_standard(&self.path) {
                (self.file.write_all(&text), STDOUT.into())
            } else {
                let name = self.path.display().to_string();
                (replace(&mut self.file, &text), name)
            };
            written.map_err(|error| format!("write on {name}: {}", reason(&error)))
        });
        match written {
            Ok(()) => {
                let _ = fs::remove_file(&self.spool);
                true
            }
            Err(why) => {
                let spool = self.spool.display();
                let command = self.product.command();
                complain(&format!(
                    "{why}; the records are kept: '{command} {spool}' makes it of them"
                ));
                false
            }
        }
    }
}

/// Makes a new file and returns its path. Only its owner may read it, because a trace shows what
/// programs do.
fn spool() -> io::Result<PathBuf> {
    let folder = std::env::temp_dir();
    for attempt in 0..100_u32 {
        let path = folder.join(format!("mmun-trace-{}-{attempt}.jsonl", std::process::id()));
        match File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
        {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other.map(|_| path),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}
