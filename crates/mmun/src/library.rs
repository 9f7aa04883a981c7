//! Libraries that have a registration cache.

/// A library with a registration cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Library {
    Ucx,
    Libfabric,
}

impl Library {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Library::Ucx => "ucx",
            Library::Libfabric => "libfabric",
        }
    }
}
