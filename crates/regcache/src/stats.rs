//! The counters of a cache.

use std::fmt;

/// Counters since the cache was opened, and its present content. From
/// [`RegCache::stats`](crate::RegCache::stats).
///
/// Other threads continue while the counters are read. Each counter is right at some moment, but
/// the counters may be of different moments, so their sums may be inconsistent.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Requests that found a region.
    pub hits: u64,
    /// Requests that found no region, and tried to register one.
    pub misses: u64,
    /// How often a request waited for another request's registration.
    pub waits: u64,
    /// Registrations that the registrar made.
    pub registered: u64,
    /// Registrations that the registrar undid.
    pub deregistered: u64,
    /// Registrations that failed: the registrar returned an error or panicked, or the kernel source
    /// could not arm the range.
    pub failed: u64,
    /// Regions removed from the look-up because their memory was about to change.
    pub invalidated: u64,
    /// Regions removed from the look-up because a larger one replaced them.
    pub replaced: u64,
    /// Regions removed from the look-up to make room.
    pub evicted: u64,
    /// Regions removed from the look-up by `flush`.
    pub flushed: u64,
    /// Registrations that an invalidation overlapped, and that did not enter the look-up.
    pub collisions: u64,
    /// Records that the kernel source has lost. After each loss the cache removes every region
    /// from the look-up once.
    pub lost: u64,
    /// Registered regions, including those that look-ups no longer find.
    pub regions: u64,
    /// The bytes of these regions.
    pub bytes: u64,
    /// Regions that look-ups find.
    pub live_regions: u64,
    /// The bytes of these regions.
    pub live_bytes: u64,
}

impl Stats {
    /// Returns each counter and gauge with its name, in the form that metrics exporters use.
    ///
    /// # Examples
    /// ```
    /// let stats = regcache::Stats::default();
    /// for (name, value) in stats.metrics() {
    ///     println!("regcache_{name} {value}");
    /// }
    /// ```
    #[must_use]
    pub fn metrics(&self) -> [(&'static str, u64); 16] {
        [
            ("hits_total", self.hits),
            ("misses_total", self.misses),
            ("waits_total", self.waits),
            ("registered_total", self.registered),
            ("deregistered_total", self.deregistered),
            ("failed_total", self.failed),
            ("invalidated_total", self.invalidated),
            ("replaced_total", self.replaced),
            ("evicted_total", self.evicted),
            ("flushed_total", self.flushed),
            ("collisions_total", self.collisions),
            ("lost_total", self.lost),
            ("regions", self.regions),
            ("bytes", self.bytes),
            ("live_regions", self.live_regions),
            ("live_bytes", self.live_bytes),
        ]
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (name, value)) in self.metrics().iter().enumerate() {
            write!(f, "{}{name} {value}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
