//! The event sources by name, and whether they can be had here.

use clap::ValueEnum;

/// An event source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Source {
    Kernel,
    Hook,
    Uffd,
    Process,
}

impl Source {
    pub(crate) const ALL: [Source; 4] = [Source::Kernel, Source::Hook, Source::Uffd, Source::Process];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Source::Kernel => "kernel",
            Source::Hook => "hook",
            Source::Uffd => "uffd",
            Source::Process => "process",
        }
    }
}
