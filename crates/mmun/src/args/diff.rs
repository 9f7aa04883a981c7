//! The options of `mmun diff`.

use std::path::PathBuf;

use clap::Args;

use crate::summary::Sort;

const EXAMPLES: &str = "\
Examples:
  mmun trace --json -k -o a.jsonl ./app                 records a run
  mmun trace --json -k -o b.jsonl ./app.new             and another one
  mmun diff a.jsonl b.jsonl                             the places whose time changed most
  mmun diff --sort resident --top 3 a.jsonl b.jsonl     the three whose returned memory changed most";

/// Says what changed between two recorded traces, by place in the code.
///
/// For each place it shows the totals of the second run, and how much more or less they are than in
/// the first run. A place is a function and its file; the program's own file may have another name
/// in the second run. Without stacks (-k) the place is the system call. A change of time below the
/// error of the measurement, half a microsecond a call, is shown as "~".
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

    /// Sorts by the change of this total, the largest first, whether more or less
    #[arg(long, value_name = "KEY", default_value = "time")]
    pub(crate) sort: Sort,

    /// Shows at most N places
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) top: usize,

    /// Shows elapsed time, the tracer's stops included, instead of the time in the call itself
    #[arg(long)]
    pub(crate) wall: bool,

    /// Writes one JSON object a place
    #[arg(long)]
    pub(crate) json: bool,
}
