//! The sources of this process, each armed for one range if the source needs a range.

use std::sync::Arc;

use mmu_notifier::{MmWithUser, VaRange};
use mmu_source::hook::Hook;
use mmu_source::kernel::{self, Kernel};
use mmu_source::uffd::{self, Uffd};

use super::operation::Unavailable;
use crate::source::Source;

/// A running source, which reports to the subscribers of [`Armed::mm`].
#[derive(Debug)]
pub(crate) enum Armed {
    Kernel(Arc<Kernel>, kernel::Armed),
    Hook(#[expect(dead_code, reason = "it only has to live")] Hook),
    Uffd(
        Arc<Uffd>,
        #[expect(dead_code, reason = "its drop disarms")] uffd::Armed,
    ),
}

impl Armed {
    /// Starts `source`, armed for `range` if the source needs a range.
    pub(crate) fn new(source: Source, range: VaRange) -> Result<Armed, Unavailable> {
        let refused = |error: mmu_source::Error| Unavailable(crate::explain(&error));
        match source {
            Source::Kernel => {
                let kernel = Kernel::start().map_err(refused)?;
                let armed = kernel.arm(range).map_err(refused)?;
                Ok(Armed::Kernel(kernel, armed))
            }
            Source::Hook => Hook::install().map(Armed::Hook).map_err(refused),
            Source::Uffd => {
                let uffd = Uffd::start().map_err(refused)?;
                let armed = uffd.arm(range).map_err(refused)?;
                Ok(Armed::Uffd(uffd, armed))
            }
            Source::Process => Err("it watches other processes".into()),
        }
    }

    /// The address space to which the source reports.
    pub(crate) fn mm(&self) -> MmWithUser {
        mmu_source::current()
    }

    /// Waits until the source has reported every change that it has seen.
    ///
    /// # Errors
    /// The error of the source.
    pub(crate) fn settle(&self) -> Result<(), Unavailable> {
        let settled = match self {
            Armed::Kernel(kernel, _) => kernel.settle().map(drop),
            Armed::Uffd(uffd, _) => uffd.settle(),
            Armed::Hook(_) => Ok(()),
        };
        settled.map_err(|error| Unavailable(crate::explain(&error)))
    }

    /// Waits until no change of an armed range is under way. Only the source `kernel` knows that;
    /// for the other sources this returns at once.
    ///
    /// # Errors
    /// The error of the source.
    pub(crate) fn quiesce(&self) -> Result<(), Unavailable> {
        match self {
            Armed::Kernel(_, armed) => armed
                .read_begin()
                .map(drop)
                .map_err(|error| Unavailable(crate::explain(&error))),
            Armed::Hook(_) | Armed::Uffd(..) => Ok(()),
        }
    }

    /// The counter that moves before a translation changes, if the source has one.
    pub(crate) fn generation(&self) -> Option<u64> {
        match self {
            Armed::Kernel(kernel, _) => Some(kernel.generation()),
            Armed::Hook(_) | Armed::Uffd(..) => None,
        }
    }
}
