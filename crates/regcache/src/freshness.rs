//! Decides whether the result of a look-up can be trusted.
//!
//! For a source that runs callbacks before the memory changes, no check is needed. The kernel
//! source counts a change before the change happens, and reports its range later, on request. So a
//! look-up is trusted only if the callbacks of all changes so far have run.
//!
//! The count is loaded before the table is read. If a change is counted after the load, the change
//! is ordered after the look-up. If a change was counted before the load and its callbacks have
//! run, these callbacks have removed the changed regions from the look-up.

use crate::Error;
use crate::sync::is_locking;
use mmu_notifier::{Mm, VaRange};
pub(crate) use mmu_source::kernel::Armed;
use mmu_source::kernel::Kernel;
use std::io;
use std::sync::Arc;

/// The kernel source of a cache, if it has one.
pub(crate) type Source = Option<Arc<Kernel>>;

pub(crate) const NO_SOURCE: Source = None;

/// The check before every look-up.
#[derive(Debug)]
pub(crate) struct Freshness {
    kernel: Source,
    lost_before: u64,
}

impl Freshness {
    pub(crate) fn new(kernel: Source) -> Self {
        let lost_before = kernel.as_ref().map_or(0, |kernel| kernel.lost());
        Self {
            kernel,
            lost_before,
        }
    }

    /// Refuses an address space on which the source opens no brackets.
    pub(crate) fn check(kernel: &Source, mm: &Mm) -> io::Result<()> {
        if kernel.is_none() || *mm == **mmu_source::current_ref() {
            return Ok(());
        }
        let why = "the kernel source tells of changes of `mmu_source::current()`, and the cache is for another address space";
        Err(io::Error::new(io::ErrorKind::InvalidInput, why))
    }

    /// Tells whether the cache knows of all changes so far.
    #[inline(always)]
    pub(crate) fn is_current(&self) -> bool {
        match &self.kernel {
            None => true,
            Some(kernel) => kernel.is_settled(),
        }
    }

    /// Runs the callbacks of all changes so far, so that the cache knows of them. The callbacks
    /// take the lock of the cache. So if this thread may hold that lock, this function runs no
    /// callback, and refuses if there is one to run.
    #[inline]
    pub(crate) fn settle<E>(&self) -> Result<(), Error<E>> {
        match &self.kernel {
            None => Ok(()),
            Some(kernel) if is_locking() => {
                let is_known = kernel.is_settled();
                is_known.then_some(()).ok_or(Error::WouldDeadlock)
            }
            Some(kernel) => kernel.settle().map(drop).map_err(failed),
        }
    }

    /// Checks whether the caller may sleep until another thread has registered a region. A caller
    /// inside a callback of the kernel source must not sleep, because the other thread may wait for
    /// that callback. The caller must not hold the lock of the cache, because this function runs
    /// callbacks, which take the lock.
    pub(crate) fn may_sleep<E>(&self) -> Result<(), Error<E>> {
        match &self.kernel {
            // `drain` also runs the callbacks of changes that have not been reported yet.
            Some(kernel) if kernel.drain().refused => {
                Err(failed(mmu_source::Error::InCallback { source: "kernel" }))
            }
            _ => Ok(()),
        }
    }

    /// Arms `range`. When this function returns, every change that began before it has ended.
    pub(crate) fn arm<E>(&self, range: VaRange) -> Result<Option<Armed>, Error<E>> {
        self.kernel
            .as_ref()
            .map(|kernel| kernel.arm(range))
            .transpose()
            .map_err(failed)
    }

    /// Returns how many records the source has lost since the cache was opened.
    pub(crate) fn lost(&self) -> u64 {
        self.kernel
            .as_ref()
            .map_or(0, |kernel| kernel.lost().saturating_sub(self.lost_before))
    }
}

fn failed<E>(source: mmu_source::Error) -> Error<E> {
    match source {
        mmu_source::Error::AfterFork { .. } => Error::Forked,
        source => Error::Source { source },
    }
}
