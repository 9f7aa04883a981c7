//! What `mmun diff` is asked for.

use std::path::PathBuf;

use clap::Args;

use crate::summary::Sort;

const EXAMPLES: &str = "\
Examples:
  mmun trace --json -k -o a.jsonl ./app                 records a run
  mmun trace --json -k -o b.jsonl ./app.new             and another one
  mmun diff a.jsonl b.jsonl                             the places whose time changed most
  mmun diff --sort resident --top 3 a.jsonl b.jsonl     the three that give more or less memory back";

/// Says what changed between two recorded traces, by place in the code.
///
/// For each place: what the second run took, and how much more or less than the first. A place is a
/// function and its file; that of the program itself may have another name in the second run. Of
/// traces without stacks (-k) the system call is the place. A change of time that is smaller than
/// the error of the measurement, half a microsecond a call, is shown as "~".
///
/// Exits 0 if both traces could be read, 2 if not.
#[derive(Args, Debug)]
#[command(verbatim_doc_comment, after_help = EXAMPLES)]
pub(crate) struct DiffArgs {
    /// The trace of the first run; - is standard input
    #[arg(value_name = "BEFORE")]
    pub(crate) before: PathBuf,

    /// The trace of the second run; - is standard input
    #[arg(value_name = "AFTER")]
    pub(crate) after: PathBuf,

    /// Sorts by the change of this, the largest first, be it more or less
    #[arg(long, value_name = "KEY", default_value = "time")]
    pub(crate) sort: Sort,

    /// Shows so many places
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) top: usize,

    /// Shows the time on the clock, the tracer's stops included, instead of the time in the call
    /// itself
    #[arg(long)]
    pub(crate) wall: bool,

    /// Writes one JSON object a place
    #[arg(long)]
    pub(crate) json: bool,
}
