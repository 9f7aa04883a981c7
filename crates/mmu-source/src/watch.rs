//! A watch answers one question: has this range changed since the watch was made or renewed?
//!
//! A cache that looks up an entry under its own lock, perhaps inside `free`, needs only this
//! answer. [`Watch::is_valid`] gives this answer without a callback or an allocation, and without
//! waiting for a lock or for another thread.
//!
//! | made by | marked by | misses |
//! | --- | --- | --- |
//! | [`Kernel::watch`] | the source `kernel`, before the change by any process | nothing |
//! | [`Watch::new`] | each bracket on [`current`](crate::current), from [`hook`](crate::hook) or another source | what those sources miss |
//!
//! Since Linux 7.0 the kernel can skip the program of the source `kernel`. Then a watch of that
//! source is marked up to a second late.
//!
//! ```
//! use mmu_notifier::{Event, Va, VaRange};
//! use mmu_source::Watch;
//!
//! let buffer = VaRange::covering(Va::new(0x7000_0000), 1 << 20)?;
//! let watch = Watch::new(buffer)?; // Make the watch before the translation.
//! assert!(watch.is_valid());
//! drop(mmu_source::current().invalidate(VaRange::covering(Va::new(0x7000_5000), 1)?, Event::Unmap));
//! assert!(!watch.is_valid(), "it stays invalid until `renew`");
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

/// A range of this process, and whether it has changed since the watch was made or renewed.
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
    /// Watches `range` for brackets on [`current`](crate::current), from sources or from the
    /// program itself.
    ///
    /// A bracket marks the watch before the change, in the thread that makes the change. Without a
    /// source, only the program's own brackets mark it. A bracket that begins after this call has
    /// returned is never missed. A bracket that is open during this call either marks the watch or
    /// ends before the call returns.
    ///
    /// # Blocking
    /// The first call in a process waits for open brackets.
    /// # Errors
    /// [`Error::InCallback`] if the first call in a process is made inside a bracket of the same
    /// thread.
    pub fn new(range: VaRange) -> Result<Self, Error> {
        Ok(Self {
            range,
            by: By::Brackets(Bracketed::new(range)?),
        })
    }

    /// Returns true if the range has not changed since the watch was made or renewed. Then the
    /// entry was current while the caller used it before this call.
    ///
    /// An invalid watch stays invalid until it is renewed, with one exception. A watch of the
    /// source `kernel` also returns false when it cannot know: while another thread takes in the
    /// source's records, while another processor writes a record, or in a signal handler that has
    /// interrupted this thread while it took records in. A later call can then return true. In the
    /// child of a fork the result is always false.
    ///
    /// Call `is_valid` before using an entry. If another thread can change the memory meanwhile,
    /// call it again afterwards.
    ///
    /// # Blocking
    /// No. The call runs no callback and allocates nothing. It may be made in a callback, under any
    /// lock, inside `free` and in a signal handler. If no change has happened, the call takes some
    /// nanoseconds. Otherwise it examines the new records, which takes some tens of nanoseconds
    /// each.
    #[must_use]
    #[inline]
    pub fn is_valid(&self) -> bool {
        match &self.by {
            #[cfg(feature = "kernel")]
            By::Kernel(watching) => watching.is_valid(),
            By::Brackets(bracketed) => bracketed.is_valid(),
        }
    }

    /// Makes the watch valid again: changes that are over no longer count.
    ///
    /// For a watch of the source `kernel`, no change that began before this call is still under way
    /// when the call returns. Any other watch is marked again at the end of each bracket of its
    /// range that is open during this call.
    ///
    /// A renewal is cheaper than another watch. Translate the range again afterwards.
    ///
    /// # Blocking
    /// A watch of the source `kernel` blocks as its constructor does. Other watches do not block.
    /// # Errors
    /// [`Error::AfterFork`] in the child of a fork. For a watch of the source `kernel`, also the
    /// errors of its constructor. An invalid watch stays invalid after an error.
    pub fn renew(&mut self) -> Result<(), Error> {
        match &mut self.by {
            #[cfg(feature = "kernel")]
            By::Kernel(watching) => watching.renew(),
            By::Brackets(bracketed) => bracketed.renew(),
        }
    }

    /// Returns the watched pages.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.range
    }
}

#[cfg(feature = "kernel")]
impl Kernel {
    /// Watches `range` until the returned value is dropped. [`Watch::is_valid`] says whether the
    /// range has changed since.
    ///
    /// When this returns, no change that began before the call is still under way, and every later
    /// change is counted before it happens. So translate the range after this call;
    /// [`read_begin`](crate::kernel::Armed::read_begin) is not needed.
    ///
    /// # Blocking
    /// Blocks as [`arm`](Kernel::arm) does.
    /// # Errors
    /// The errors of [`arm`](Kernel::arm). [`Error::InCallback`] in a signal handler that has
    /// interrupted the source.
    pub fn watch(self: &Arc<Self>, range: VaRange) -> Result<Watch, Error> {
        Ok(Watch {
            range,
            by: By::Kernel(Watching::new(self, range)?),
        })
    }

    /// Like [`watch`](Self::watch), but does not wait for the changes under way. So a change that
    /// began before the call is missed, even if it ends after the call. For a caller that made its
    /// translation before the call: a wait would not help such a caller, because the watch misses a
    /// change that ends during the wait as well.
    ///
    /// # Errors
    /// The errors of [`watch`](Self::watch).
    #[doc(hidden)]
    pub fn watch_at_once(self: &Arc<Self>, range: VaRange) -> Result<Watch, Error> {
        Ok(Watch {
            range,
            by: By::Kernel(Watching::enter(self, range)?),
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
