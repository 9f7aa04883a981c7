//! `mmun coverage`, and the processes that it starts.

use clap::Args;

use crate::library::Library;
use crate::source::Source;

/// Runs many operations, each of which changes an address translation, under every event source,
/// and says which source saw which change.
///
/// Each operation runs in a new process: the process makes memory, arms the source, and makes the
/// change. 'before' means that the source reported the change before the translation changed
/// (kernel: that its counter moved before), 'after' that it reported the change later, 'missed'
/// that it did not, 'n/a' that the operation or the source does not work here; standard error says
/// why. /proc/self/pagemap shows whether a translation changed; for mprotect, a write shows it, and
/// for MADV_FREE, /proc/kpageflags. Some operations can be checked as root only.
///
/// Exits 0 if every source saw all changes that it claims to see, 1 if one missed a change or (uffd
/// excepted) reported a change too late, 2 if mmun could not find out.
#[derive(Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct CoverageArgs {
    /// Writes one JSON object a line
    #[arg(long)]
    pub(crate) json: bool,

    /// Measures this source only; may be repeated
    #[arg(long = "source", value_name = "NAME")]
    pub(crate) sources: Vec<Source>,

    /// Measures a registration cache instead, as shipped and with the drop-in
    ///
    /// Each operation changes a page that the library's own cache has registered. Then mmun looks
    /// the registration up again and sends data through it. 'right' means that the data arrived in
    /// the page, or that the library refused to register the page again; 'stale' means that the
    /// data went elsewhere. 'shipped' is the library alone, 'hook' the library with
    /// libmmun_dropin.so and the source hook, 'both' with the source kernel as well. No network
    /// card is needed: an io_uring plays the device. UCX's cache is the one that libucs exports.
    /// libfabric's is the cache of its verbs provider (1.13 or later), which sees the io_uring as a
    /// verbs device. Exits 1 if a registration was stale in the column 'both', 2 if mmun could not
    /// find out.
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "sources",
        verbatim_doc_comment
    )]
    pub(crate) library: Option<Library>,

    /// Waits so long between the change and the look-up
    ///
    /// The drop-in checks each look-up. Without that check, a change that only the source kernel
    /// sees reaches UCX from a thread, microseconds to milliseconds after the change.
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
