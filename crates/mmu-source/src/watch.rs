//! One question about one range: has it been touched since?
//!
//! A cache that looks an entry up under its own lock, perhaps inside of `free`, wants to know
//! whether that entry can be trusted, and nothing else. [`Watch::is_valid`] answers without a
//! callback, a lock, an allocation, or a wait for another thread.
//!
//! | made by | is marked by | misses |
//! | --- | --- | --- |
//! | [`Kernel::watch`](crate::kernel::Kernel::watch) | the kernel, before the change, by any process | nothing |
//! | [`Watch::new`] | each bracket on [`current`](crate::current): what [`hook`](crate::hook) or another source sees | what they miss |
//!
//! ```
//! use mmu_notifier::{Event, Va, VaRange};
//! use mmu_source::Watch;
//!
//! let buffer = VaRange::covering(Va::new(0x7000_0000), 1 << 20)?;
//! let watch = Watch::new(buffer)?; // First the watch, then the translation that it stands for.
//! assert!(watch.is_valid());
//! drop(mmu_source::current().invalidate(VaRange::covering(Va::new(0x7000_5000), 1)?, Event::Unmap));
//! assert!(!watch.is_valid(), "for ever: make another, or `renew` it");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bracketed;

use crate::Error;
#[cfg(feature = "kernel")]
use crate::kernel::{Kernel, Watching};
use bracketed::Bracketed;
use mmu_notifier::VaRange;
use std::fmt;
#[cfg(feature = "kernel")]
use std::sync::Arc;

/// A range of this process, and whether anything has touched it since the watch was made.
pub struct Watch {
    range: VaRange,
    by: By,
}

/// The source that marks a watch.
enum By {
    #[cfg(feature = "kernel")]
    Kernel(Watching),
    Brackets(Bracketed),
}

impl Watch {
    /// Watches `range` for the brackets that sources open on [`current`](crate::current), and the
    /// program itself.
    ///
    /// Such a bracket marks the watch before the change, in the thread that makes it. Without a
    /// source it hears nothing. What begins after this returns is not missed; a bracket that is
    /// open then marks the watch or ends first.
    ///
    /// # Blocking
    /// The first one of a process waits for brackets that are open.
    /// # Errors
    /// [`Error::InCallback`] for the first one of a process, inside of a bracket of the same
    /// thread.
    pub fn new(range: VaRange) -> Result<Self, Error> {
        Ok(Self {
            range,
            by: By::Brackets(Bracketed::new(range)?),
        })
    }

    /// Tells whether nothing has touched the range: neither before this call nor while the caller
    /// used what it has read.
    ///
    /// Once it is false it stays so, with one exception: a watch of the kernel source whose records
    /// another thread is just sorting, or this very thread if a signal handler asks, answers false
    /// where it cannot know. In the child of a fork it is false.
    ///
    /// Call it before an entry is used, and again afterwards if another thread could have changed
    /// the memory meanwhile.
    ///
    /// # Blocking
    /// No. No callback runs, nothing is allocated; it may be called in a callback, under any lock,
    /// inside of `free` and in a signal handler. Some nanoseconds if nothing has happened; else it
    /// sorts the records of what has, a few tens of nanoseconds for each.
    #[must_use]
    #[inline]
    pub fn is_valid(&self) -> bool {
        match &self.by {
            #[cfg(feature = "kernel")]
            By::Kernel(watching) => watching.is_valid(),
            By::Brackets(bracketed) => bracketed.is_valid(),
        }
    }

    /// Begins anew: what has happened so far counts no more, and what is under way is over when it
    /// returns.
    ///
    /// Cheaper than another watch. Translate the range again afterwards.
    ///
    /// # Blocking
    /// As what made the watch.
    /// # Errors
    /// As what made the watch; then it is not valid.
    pub fn renew(&mut self) -> Result<(), Error> {
        match &mut self.by {
            #[cfg(feature = "kernel")]
            By::Kernel(watching) => watching.renew(),
            By::Brackets(bracketed) => bracketed.renew(),
        }
    }

    /// Returns the pages.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.range
    }
}

#[cfg(feature = "kernel")]
impl Kernel {
    /// Watches `range` until the returned value is dropped: [`Watch::is_valid`] says whether
    /// anything has touched it since.
    ///
    /// When it returns, no change that began before is under way, and every later one is counted
    /// before it happens. So translate the range after it; no
    /// [`read_begin`](crate::kernel::Armed::read_begin) is needed.
    ///
    /// # Blocking
    /// As [`arm`](Kernel::arm).
    /// # Errors
    /// As [`arm`](Kernel::arm); [`Error::InCallback`] in a signal handler that has interrupted the
    /// source.
    pub fn watch(self: &Arc<Self>, range: VaRange) -> Result<Watch, Error> {
        Ok(Watch {
            range,
            by: By::Kernel(Watching::new(self, range)?),
        })
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("range", &self.range)
            .field("is_valid", &self.is_valid())
            .finish_non_exhaustive()
    }
}
