//! The sources of this process, each armed for one range.

use mmu_notifier::{MmWithUser, VaRange};

use super::operation::Unavailable;
use crate::source::Source;

/// A source at work. What it tells arrives at the subscribers of [`Armed::mm`].
#[derive(Debug)]
pub(crate) enum Armed {}

impl Armed {
    pub(crate) fn new(source: Source, _range: VaRange) -> Result<Armed, Unavailable> {
        Err(Unavailable(format!("{} is not part of this build", source.name())))
    }

    /// The address space it feeds.
    pub(crate) fn mm(&self) -> MmWithUser {
        match *self {}
    }

    /// Has it tell what it knows by now.
    pub(crate) fn drain(&self) {
        match *self {}
    }

    /// The counter that moves before a translation does, of the source that has one.
    pub(crate) fn generation(&self) -> Option<u64> {
        match *self {}
    }

    /// Whether it tells from a thread of its own, which may lag.
    pub(crate) fn lags(&self) -> bool {
        match *self {}
    }
}
