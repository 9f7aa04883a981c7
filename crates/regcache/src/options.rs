//! The options of a cache.

use crate::freshness::{NO_SOURCE, Source};
use mmu_notifier::VaRange;
#[cfg(feature = "kernel")]
use mmu_source::kernel::Kernel;
#[cfg(feature = "kernel")]
use std::sync::Arc;

/// Whether a request is registered together with neighbouring regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Merge {
    /// Each request alone. Registrations may overlap. But a look-up may have to examine every
    /// region that overlaps its first address. So if 64 regions overlap there, the next request is
    /// registered together with them.
    Never,
    /// Together with the regions that the request overlaps. The new region replaces them.
    #[default]
    Overlapping,
    /// Together with the regions that the request overlaps or touches.
    Adjacent,
}

/// Returns the exact size of a range in bytes. The whole address space has 2^64 bytes, and the sum
/// of several regions can be larger, so 64 bits do not suffice.
pub(crate) fn size(range: VaRange) -> u128 {
    u128::from(range.last().get() - range.start().get()) + 1
}

/// Tells whether `bytes` are within a limit. `u64::MAX` means no limit.
pub(crate) fn within(bytes: u128, limit: u64) -> bool {
    limit == u64::MAX || bytes <= limit.into()
}

/// Returns a size in bytes for a report, capped at 64 bits.
pub(crate) fn reported(bytes: u128) -> u64 {
    bytes.try_into().unwrap_or(u64::MAX)
}

/// The limits of a cache, how it merges requests, and whether it uses the kernel source.
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
    /// Makes options with these defaults: at most 65,536 regions, no limit on bytes, and
    /// overlapping regions are merged up to 1 GiB.
    pub const fn new() -> Self {
        Self {
            merge: Merge::Overlapping,
            max_regions: 1 << 16,
            max_bytes: u64::MAX,
            max_region_bytes: 1 << 30,
            kernel: NO_SOURCE,
        }
    }

    /// Sets whether requests are merged.
    pub const fn merge(mut self, merge: Merge) -> Self {
        self.merge = merge;
        self
    }

    /// Sets the largest number of registered regions. Leased regions that look-ups no longer find
    /// count too. The value is clamped to the range from 1 to 2^26.
    ///
    /// For each region the cache reserves 48 bytes of address space, and room for the registrar's
    /// handle. The kernel allocates memory for it only when the region is used for the first time.
    pub const fn max_regions(mut self, regions: u32) -> Self {
        self.max_regions = if regions == 0 {
            1
        } else if regions > 1 << 26 {
            // The largest table has room for this many regions, with all granules that they may
            // touch.
            1 << 26
        } else {
            regions
        };
        self
    }

    /// Sets the largest number of registered bytes. Bytes in which regions overlap count once for
    /// each region. `u64::MAX` means no limit.
    pub const fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Sets the largest region in bytes that merging may make. `u64::MAX` means no limit. A larger
    /// request is registered alone.
    pub const fn max_region_bytes(mut self, bytes: u64) -> Self {
        self.max_region_bytes = bytes;
        self
    }

    /// Makes every look-up first ask the kernel source whether memory has changed without a
    /// callback so far.
    ///
    /// Without a kernel source, the cache knows only the changes for which other sources run its
    /// callbacks. With it, the cache misses no change of a translation, whichever process or kernel
    /// thread makes the change. Such caches must be opened for [`mmu_source::current`], the address
    /// space that the kernel source reports on.
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
