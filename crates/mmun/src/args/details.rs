//! Options of `mmun trace` for further details and for summaries.

use clap::Args;

use crate::summary::{Sort, Tables, Wanted};

/// How records are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TraceFormat {
    /// Aligned lines for people, as the program runs
    Text,
    /// One JSON object a line, as the program runs
    Json,
    /// A trace for <https://ui.perfetto.dev>, written at the end; needs -o
    Perfetto,
    /// JSON for chrome://tracing and other viewers, written at the end; needs -o
    Chrome,
}

/// The tables of a summary.
#[derive(Args, Clone, Debug)]
pub(crate) struct SummaryArgs {
    /// Adds totals at the end, in these tables: event,where,what,task,cause [default:
    /// event,where,what]
    #[arg(long, value_name = "TABLES", groups = ["totals", "places"], num_args = 0..=1, require_equals = true, default_missing_value = Tables::DEFAULT)]
    pub(crate) summary: Option<Tables>,

    /// Sorts the tables by this total, the largest first
    #[arg(long, value_name = "KEY", default_value = "time", requires = "totals")]
    pub(crate) sort: Sort,

    /// Shows at most N rows of each table, except that of the events
    #[arg(long, value_name = "N", default_value_t = 10, requires = "totals")]
    pub(crate) top: usize,

    /// Shows elapsed time, the tracer's stops included, instead of the time in the call itself
    #[arg(long, requires = "totals")]
    pub(crate) wall: bool,
}

impl SummaryArgs {
    /// The requested tables. If none is requested: with `always` the default tables, else `None`.
    pub(crate) fn wanted(&self, always: bool) -> Option<Wanted> {
        let usual = || {
            always.then(|| {
                Tables::DEFAULT
                    .parse()
                    .expect("the usual tables are tables")
            })
        };
        let tables = self.summary.or_else(usual)?;
        Some(Wanted {
            tables,
            sort: self.sort,
            top: self.top,
            wall: self.wall,
        })
    }
}

/// The details to record of each call.
#[derive(Args, Clone, Debug)]
pub(crate) struct DetailArgs {
    /// Adds to each record the first mapping in the range, how much of the range was in memory, and
    /// the time in the call itself
    #[arg(long)]
    pub(crate) details: bool,

    /// Adds call stacks, whose functions are named at the end; implies --details
    #[arg(short = 'k', long, group = "places")]
    pub(crate) stacks: bool,

    /// Records new mappings as well as removed and changed ones
    ///
    /// Every mmap then stops the program, not only one that replaces a mapping: some 10 us a call,
    /// and 20 us with --details.
    #[arg(long, overrides_with = "no_births", verbatim_doc_comment)]
    pub(crate) births: bool,

    /// Does not record new mappings; the default without --report
    #[arg(long, overrides_with = "births")]
    pub(crate) no_births: bool,

    /// Treats this function as an allocator, which is never the place of a call; may be repeated
    #[arg(long = "not-place", value_name = "FUNCTION", requires = "places")]
    pub(crate) not_place: Vec<String>,

    /// Adds a table of the get, put and free of each process at the end
    #[arg(long)]
    pub(crate) lifecycle: bool,
}
