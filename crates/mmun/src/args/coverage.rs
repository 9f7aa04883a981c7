//! `mmun coverage`, and the processes that it starts.

use clap::Args;

use crate::library::Library;
use crate::source::Source;

/// Runs every operation that changes an address translation under every event source, and says
/// which was told.
///
/// Each runs in a process of its own: it makes memory, arms the source, and makes the change.
/// 'before' says that the subscriber was called with the translation still in place, 'after' that
/// it was gone by then, 'missed' that no call came, 'n/a' that the operation or the source does not
/// work here; standard error says why. Whether a translation changed is read from
/// /proc/self/pagemap; what that does not show (mprotect, MADV_FREE) is found by a write and in
/// /proc/kpageflags. As root it shows more.
///
/// Exits 0 if every source told of what it says it sees, 1 if one did not, 2 if that could not be
/// found out.
#[derive(Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct CoverageArgs {
    /// Writes one JSON object a line
    #[arg(long)]
    pub(crate) json: bool,

    /// Asks this source only; may be repeated
    #[arg(long = "source", value_name = "NAME")]
    pub(crate) sources: Vec<Source>,

    /// Asks a registration cache instead, as shipped and with the drop-in
    ///
    /// Each operation changes a page that the library's own cache has registered; then the
    /// registration is looked up again, and data is sent through it. 'right' says that the data
    /// arrived in the page, 'stale' that it went elsewhere, 'shipped' is the library alone, 'hook'
    /// and 'both' are with libmmun_dropin.so and these sources. The device is an io_uring. UCX's
    /// cache is the one that libucs exports. libfabric's is the one of its verbs provider (1.13 or
    /// later), over a verbs device that this program plays: no network card is needed. Exits 1 if
    /// something was stale with both.
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "sources",
        verbatim_doc_comment
    )]
    pub(crate) library: Option<Library>,

    /// Looks the registration up so long after the change
    ///
    /// A UCX whose look-up cannot be asked (from 1.14 on) is told by a thread, some microseconds
    /// later.
    #[arg(
        long,
        value_name = "MICROSECONDS",
        default_value_t = 0,
        requires = "library",
        verbatim_doc_comment
    )]
    pub(crate) wait: u64,
}

#[derive(Args, Debug)]
pub(crate) struct CellArgs {
    pub(crate) operation: String,
    pub(crate) source: Source,
}

#[derive(Args, Debug)]
pub(crate) struct LibraryCellArgs {
    pub(crate) library: Library,
    pub(crate) operation: String,
    pub(crate) wait: u64,
}

#[derive(Args, Debug)]
pub(crate) struct TraceeArgs {
    pub(crate) operation: String,
}
