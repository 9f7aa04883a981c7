//! One way to change a translation.

use std::fmt;
use std::io;

use mmu_notifier::{Va, VaRange};

use super::page::Judge;
use super::region::{Region, page_size};
use crate::source::Source;

/// An operation of the table.
#[derive(Debug)]
pub(crate) struct Operation {
    pub(crate) name: &'static str,
    pub(crate) judge: Judge,
    /// The sources besides `kernel` that claim to see the operation. `kernel` claims to see every
    /// operation.
    pub(crate) claimed: &'static [Source],
    /// Makes the memory, before the source is armed.
    pub(crate) prepare: fn() -> Result<Prepared, Unavailable>,
}

impl Operation {
    /// Whether it is a fault if `source` misses the operation.
    pub(crate) fn is_claimed_by(&self, source: Source) -> bool {
        source == Source::Kernel || self.claimed.contains(&source)
    }
}

/// Memory ready for the change.
pub(crate) struct Prepared {
    /// The page whose translation will change.
    pub(crate) watched: usize,
    /// The range for which the source is armed.
    pub(crate) armed: VaRange,
    pub(crate) change: Box<dyn FnOnce() -> io::Result<()>>,
}

impl Prepared {
    /// Arms all of `region` and watches its page `page`.
    pub(crate) fn new(
        region: &Region,
        page: usize,
        change: impl FnOnce() -> io::Result<()> + 'static,
    ) -> Prepared {
        let armed = covering(region.start(), region.len());
        Prepared {
            watched: region.page(page),
            armed,
            change: Box::new(change),
        }
    }

    /// Arms and watches the page around `address`, which libc has mapped.
    pub(crate) fn at(
        address: usize,
        change: impl FnOnce() -> io::Result<()> + 'static,
    ) -> Prepared {
        let watched = address / page_size() * page_size();
        Prepared {
            watched,
            armed: covering(watched, page_size()),
            change: Box::new(change),
        }
    }
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared")
            .field("watched", &self.watched)
            .field("armed", &self.armed)
            .finish_non_exhaustive()
    }
}

pub(crate) fn covering(start: usize, len: usize) -> VaRange {
    VaRange::covering(Va::new(start as u64), len as u64)
        .expect("memory that is mapped has a start and a length")
}

/// Why an operation or a source does not work here, in one line.
#[derive(Debug)]
pub(crate) struct Unavailable(pub(crate) String);

impl From<io::Error> for Unavailable {
    fn from(error: io::Error) -> Unavailable {
        Unavailable(crate::reason(&error))
    }
}

impl From<rustix::io::Errno> for Unavailable {
    fn from(error: rustix::io::Errno) -> Unavailable {
        io::Error::from(error).into()
    }
}

impl From<&str> for Unavailable {
    fn from(reason: &str) -> Unavailable {
        Unavailable(reason.to_owned())
    }
}
