//! The few lines that cannot wait for the report.

use std::fmt::Write as _;
use std::io::Write as _;

/// One line on standard error, in one call.
pub(crate) fn complain(line: &str) {
    let _ = std::io::stderr().write_all(format!("mmun: {line}\n").as_bytes());
}

/// An error of a source in one line: what, why, and what helps.
pub(crate) fn explain(error: &mmu_source::Error) -> String {
    let mut line = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        let _ = write!(line, ": {source}");
    }
    if let Some(hint) = error.hint() {
        let _ = write!(line, "; {hint}");
    }
    line
}
