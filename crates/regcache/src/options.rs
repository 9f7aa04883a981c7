//! How a cache is to behave.

use crate::freshness::{NO_SOURCE, Source};
use mmu_notifier::VaRange;
#[cfg(feature = "kernel")]
use mmu_source::kernel::Kernel;
#[cfg(feature = "kernel")]
use std::sync::Arc;

/// Whether a request is registered together with what is registered beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Merge {
    /// Each request on its own. Registrations may overlap, but where 64 lie over each other, which
    /// all look-ups there have to go by, the next one is registered together with them.
    Never,
    /// With the regions that it overlaps, which the new region replaces.
    #[default]
    Overlapping,
    /// With the regions that it overlaps or touches.
    Adjacent,
}

/// The bytes of a range, exactly: the whole of an address space has one more than 64 bits count,
/// and sums have more.
pub(crate) fn size(range: VaRange) -> u128 {
    u128::from(range.last().get() - range.start().get()) + 1
}

/// Tells whether `bytes` are within a limit, of which the highest is none.
pub(crate) fn within(bytes: u128, limit: u64) -> bool {
    limit == u64::MAX || bytes <= limit.into()
}

/// What is said of a number of bytes where 64 bits have to do.
pub(crate) fn reported(bytes: u128) -> u64 {
    bytes.try_into().unwrap_or(u64::MAX)
}

/// The limits of a cache, and whether it merges.
///
/// # Examples
/// ```
/// use regcache::{Merge, Options};
///
/// let options = Options::new().merge(Merge::Adjacent).max_regions(1024).max_bytes(256 << 20);
/// # let _ = options;
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct Options {
    pub(crate) merge: Merge,
    pub(crate) max_regions: u32,
    pub(crate) max_bytes: u64,
    pub(crate) max_region_bytes: u64,
    pub(crate) kernel: Source,
}

impl Options {
    /// At most 65,536 regions, no limit on the bytes, regions that overlap are merged up to 1 GiB.
    pub const fn new() -> Self {
        Self {
            merge: Merge::Overlapping,
            max_regions: 1 << 16,
            max_bytes: u64::MAX,
            max_region_bytes: 1 << 30,
            kernel: NO_SOURCE,
        }
    }

    /// Whether requests are merged.
    pub const fn merge(mut self, merge: Merge) -> Self {
        self.merge = merge;
        self
    }

    /// The most regions that are registered at a time, those that are leased and no longer found
    /// included.
    ///
    /// Sets aside 80 bytes of address space for each; memory is taken when they are used. At least
    /// 1, at most 2^26.
    pub const fn max_regions(mut self, regions: u32) -> Self {
        self.max_regions = if regions == 0 {
            1
        } else if regions > 1 << 26 {
            // The largest table has room for as many, with all the granules that they may touch.
            1 << 26
        } else {
            regions
        };
        self
    }

    /// The most bytes that are registered at a time, counted for each region; `u64::MAX` is no
    /// limit.
    pub const fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// The most bytes that merging may make a region of, `u64::MAX` for no limit. A larger request
    /// is registered as it is.
    pub const fn max_region_bytes(mut self, bytes: u64) -> Self {
        self.max_region_bytes = bytes;
        self
    }

    /// Asks the kernel source in front of every look-up whether anything has changed that the cache
    /// does not know of yet.
    ///
    /// Without it, the cache knows what callbacks tell it. With it, no change of a translation goes
    /// unnoticed, whichever process or kernel thread makes it. Its caches must be opened for
    /// [`mmu_source::current`], the address space that the source feeds.
    #[cfg(feature = "kernel")]
    pub fn kernel(mut self, kernel: Arc<Kernel>) -> Self {
        self.kernel = Some(kernel);
        self
    }
}

impl Default for Options {
    fn default() -> Self {
        Self::new()
    }
}
