//! Armed ranges, and how to fill a cache with their translations.

use super::layout::header;
use super::{Kernel, Settled, filter};
use crate::Error;
use mmu_notifier::VaRange;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// An armed range. Dropping this value disarms the range. If the value also holds the last handle
/// of the source, dropping it stops the source.
#[derive(Debug)]
#[must_use = "the range is disarmed when this is dropped"]
pub struct Armed {
    pub(super) kernel: Arc<Kernel>,
    range: VaRange,
    level: Option<usize>,
}

/// The result of [`Armed::read_begin`]: a generation. Every change of an armed range that was
/// counted up to this generation is over, and subscribers know of it.
///
/// The result of [`settle`](Kernel::settle) is no `ReadSeq`, because changes may be under way when
/// `settle` returns.
/// ```compile_fail,E0308
/// # let kernel = mmu_source::kernel::Kernel::start().unwrap();
/// # let armed = kernel.arm(mmu_notifier::VaRange::ALL).unwrap();
/// let is_stale = armed.read_retry(kernel.settle().unwrap());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a fill that is not checked with `read_retry` may be stale"]
#[doc(alias = "mmu_interval_read_begin")]
pub struct ReadSeq(Settled);

impl Kernel {
    /// Begins to fill a cache with translations of ranges that the caller has armed or watches. For
    /// callers in other languages: no type here proves that the ranges are armed.
    /// [`Armed::read_begin`] does the same, because it waits for changes of every armed range.
    ///
    /// # Blocking
    /// Blocks as [`Armed::read_begin`] does.
    /// # Errors
    /// The errors of [`Armed::read_begin`].
    #[doc(hidden)]
    pub fn read_begin(&self) -> Result<ReadSeq, Error> {
        let settled = self.settle()?;
        self.wait_for(settled)?;
        Ok(ReadSeq(settled))
    }

    /// Waits until every change of an armed range is over that was counted before the call. Runs no
    /// callback, so subscribers may not know of these changes yet. For a caller that holds a lock
    /// for which callbacks do not wait, and that finds the later changes by its callbacks.
    ///
    /// # Blocking
    /// Blocks as [`Armed::read_begin`] does, except that it never settles.
    /// # Errors
    /// The errors of [`Armed::read_begin`]. Changes may be under way then.
    #[doc(hidden)]
    pub fn wait_for_changes(&self) -> Result<(), Error> {
        if self.is_inherited() {
            return Err(Error::AfterFork { source: "kernel" });
        }
        self.wait_for(Settled(self.generation()))
    }
}

impl Armed {
    /// Adds a range to the filter. A change under way may have passed the filter already.
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
        // `ON` stays set for ever. Before this store no event sets `dirty`, but none is missed:
        // `dirty` is set from the start of the source, and a wait that begins before this store
        // leaves it set.
        words.u64(header::ON).store(1, Ordering::Relaxed);
        // ORDER(source-arm): full fence between the filter and the load of `dirty` in
        // `Waits::wait`. Partner: the program, which sets `dirty` (a full barrier) and then reads
        // the filter. If the program reads the filter first, the load of `dirty` in `Waits::wait`
        // sees that an event has happened. If the store to the filter comes first, the event is a
        // hit. Without the fence, both sides could miss the other's store.
        fence(Ordering::SeqCst);
        Ok(armed)
    }

    /// Returns the armed pages.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.range
    }

    /// Begins to fill a cache with translations of this range: settles, then waits until every
    /// change of an armed range that subscribers know of is over.
    ///
    /// # Blocking
    /// Blocks as [`settle`](Kernel::settle) does. If an armed range was changed since the last wait
    /// of any thread, also waits for the changes under way. This wait takes some two microseconds
    /// if the source's BPF program can read the kernel's count of changes under way. If it cannot,
    /// or while other threads change this address space without a pause, the source makes a virtual
    /// machine, which takes from a hundred microseconds to some milliseconds.
    /// # Errors
    /// The errors of [`settle`](Kernel::settle). [`Error::InCallback`] also in a signal handler
    /// that has interrupted such a wait. [`Error::Kernel`] if no virtual machine can be made.
    /// # Source
    /// `mmu_interval_read_begin`.
    pub fn read_begin(&self) -> Result<ReadSeq, Error> {
        self.kernel.read_begin()
    }

    /// Tells whether the caller must discard the translations that it has made since `seq`.
    ///
    /// # Source
    /// `mmu_interval_read_retry`.
    #[must_use]
    #[inline]
    pub fn read_retry(&self, seq: ReadSeq) -> bool {
        !self.kernel.is_current(seq.0)
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        let inner = &self.kernel.inner;
        if inner.is_inherited() {
            // The filter belongs to the parent, which still has the range armed.
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
