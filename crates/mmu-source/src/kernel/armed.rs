//! Ranges that are armed, and filling a cache with translations of them.

use super::layout::header;
use super::{Kernel, Settled, filter};
use crate::Error;
use mmu_notifier::VaRange;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// An armed range. Dropping it disarms, and waits for no thread.
#[derive(Debug)]
#[must_use = "the range is disarmed when this is dropped"]
pub struct Armed {
    pub(super) kernel: Arc<Kernel>,
    range: VaRange,
    level: Option<usize>,
}

/// A moment at which nothing was changing: what [`Armed::read_begin`] returned.
///
/// What [`settle`](Kernel::settle) returned is not one: there, changes may be under way.
/// ```compile_fail,E0308
/// # let kernel = mmu_source::kernel::Kernel::start().unwrap();
/// # let armed = kernel.arm(mmu_notifier::VaRange::ALL).unwrap();
/// let is_stale = armed.read_retry(kernel.settle().unwrap());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a fill that is not checked with `read_retry` may be stale"]
#[doc(alias = "mmu_interval_read_begin")]
pub struct ReadSeq(Settled);

impl ReadSeq {
    /// Returns the sequence as a number, for a caller in another language. It is never zero.
    #[must_use]
    pub const fn to_bits(self) -> u64 {
        self.0.0
    }

    /// Takes a number of [`to_bits`](Self::to_bits) back.
    pub const fn from_bits(bits: u64) -> Self {
        Self(Settled(bits))
    }
}

impl Kernel {
    /// Begins to fill a cache with translations of ranges that the caller has armed or watches,
    /// which no type proves here: for other languages. The same as [`Armed::read_begin`], whose
    /// wait is for changes of any armed range.
    ///
    /// # Blocking
    /// As [`Armed::read_begin`].
    /// # Errors
    /// As [`Armed::read_begin`].
    #[doc(hidden)]
    pub fn read_begin(&self) -> Result<ReadSeq, Error> {
        let settled = self.settle()?;
        self.wait_for(settled)?;
        Ok(ReadSeq(settled))
    }

    /// Tells whether what was translated since `seq` must be thrown away.
    #[doc(hidden)]
    #[must_use]
    #[inline]
    pub fn read_retry(&self, seq: ReadSeq) -> bool {
        !self.is_current(seq.0)
    }
}

impl Armed {
    /// Enters a range into the filter. Changes that are under way may have passed that.
    pub(super) fn enter(kernel: &Arc<Kernel>, range: VaRange) -> Result<Self, Error> {
        let inner = &kernel.inner;
        if inner.is_inherited() {
            return Err(Error::AfterFork { source: "kernel" });
        }
        let armed = Self {
            kernel: Arc::clone(kernel),
            range,
            level: filter::level(range),
        };
        let words = &inner.header;
        match armed.level {
            Some(level) => {
                filter::add(&inner.tables, range, level);
                words
                    .u64(header::RANGES + 8 * level)
                    .fetch_add(1, Ordering::Relaxed);
            }
            None => drop(words.u64(header::WIDE).fetch_add(1, Ordering::Relaxed)),
        }
        words.u64(header::ARMED).fetch_add(1, Ordering::Relaxed);
        // For good: until now no event has set `dirty`, which has been set from the beginning.
        words.u64(header::ON).store(1, Ordering::Relaxed);
        // ORDER(source-arm): full fence between the filter and the look at `dirty` in
        // `Waits::wait`. Partner: the program, which sets `dirty` (a full barrier) and then looks
        // at the filter. If weaker, an event could be in neither.
        fence(Ordering::SeqCst);
        Ok(armed)
    }

    /// Returns the pages.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.range
    }

    /// Begins to fill a cache with translations of this range: settles, and waits until every
    /// change under way is over.
    ///
    /// # Blocking
    /// As [`settle`](Kernel::settle). If an armed range was changed since the last wait of any
    /// thread, also for the changes under way: some two microseconds, if the kernel lets its count
    /// of them be read; else, and while others change this address space without a pause, for the
    /// making of a virtual machine, which takes from a hundred microseconds to some milliseconds.
    /// # Errors
    /// As [`settle`](Kernel::settle); [`Error::Kernel`] if no virtual machine can be made.
    /// # Source
    /// `mmu_interval_read_begin`.
    pub fn read_begin(&self) -> Result<ReadSeq, Error> {
        self.kernel.read_begin()
    }

    /// Tells whether what was translated since `seq` must be thrown away.
    ///
    /// # Source
    /// `mmu_interval_read_retry`.
    #[must_use]
    #[inline]
    pub fn read_retry(&self, seq: ReadSeq) -> bool {
        self.kernel.read_retry(seq)
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        let inner = &self.kernel.inner;
        if inner.is_inherited() {
            // The filter is the parent's, and the parent is still armed.
            return;
        }
        inner
            .header
            .u64(header::ARMED)
            .fetch_sub(1, Ordering::Relaxed);
        match self.level {
            Some(level) => {
                inner
                    .header
                    .u64(header::RANGES + 8 * level)
                    .fetch_sub(1, Ordering::Relaxed);
                filter::remove(&inner.tables, self.range, level);
            }
            None => drop(
                inner
                    .header
                    .u64(header::WIDE)
                    .fetch_sub(1, Ordering::Relaxed),
            ),
        }
    }
}
