//! The options of `mmun report`.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};

use super::SummaryArgs;

const EXAMPLES: &str = "\
Examples:
  mmun trace --json -k --births -o app.jsonl ./app      records everything a report can show
  mmun report -o app.html app.jsonl                     a page with pictures, for a browser
  mmun report app.jsonl                                 the tables of a summary
  mmun report --format perfetto -o app.pftrace app.jsonl
                                                        a trace for https://ui.perfetto.dev
  mmun report --summary=where --sort resident app.jsonl
                                                        the places that give most memory back";

/// Makes a report from a recorded trace.
///
/// 'mmun trace --json -o FILE' writes such a trace. The report shows how much memory was removed if
/// the trace was made with --details, and by which code if it was made with -k.
///
/// Exits 0 if the report was made, 2 if not.
#[derive(Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = EXAMPLES,
    group(ArgGroup::new("totals").multiple(true)),
    group(ArgGroup::new("places").multiple(true))
)]
pub(crate) struct ReportArgs {
    /// The recorded trace; - is standard input
    #[arg(value_name = "FILE", groups = ["totals"])]
    pub(crate) trace: PathBuf,

    /// Writes to OUT; - is standard output, as without this option
    #[arg(short, long, value_name = "OUT")]
    pub(crate) output: Option<PathBuf>,

    /// The form of the report [default: a page if OUT ends in .html, else a summary]
    #[arg(long, value_name = "FORMAT")]
    format: Option<ReportFormat>,

    #[command(flatten)]
    pub(crate) summary: SummaryArgs,
}

/// The forms of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ReportFormat {
    /// Tables of totals, as text
    Summary,
    /// A trace for <https://ui.perfetto.dev>
    Perfetto,
    /// JSON for chrome://tracing and other viewers
    Chrome,
    /// A page for a browser, in one file that needs no other
    Html,
}

impl ReportArgs {
    pub(crate) fn format(&self) -> ReportFormat {
        let is_page = self
            .output
            .as_deref()
            .and_then(Path::extension)
            .is_some_and(|ending| ending == "html");
        self.format.unwrap_or(if is_page {
            ReportFormat::Html
        } else {
            ReportFormat::Summary
        })
    }
}
