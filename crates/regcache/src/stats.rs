//! What a cache did and holds.

use std::fmt;

/// What a cache did so far and what it holds now. From [`RegCache::stats`](crate::RegCache::stats).
///
/// Counters are taken one after the other while others go on: each is right at some moment, their
/// sums need not be.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Requests that found a region.
    pub hits: u64,
    /// Requests that did not, and tried to register one.
    pub misses: u64,
    /// Times that a request waited for another one's registration.
    pub waits: u64,
    /// Registrations that the registrar made.
    pub registered: u64,
    /// Registrations that it undid.
    pub deregistered: u64,
    /// Registrations that it refused.
    pub failed: u64,
    /// Regions taken out because their memory was about to change.
    pub invalidated: u64,
    /// Regions taken out because a larger one replaced them.
    pub replaced: u64,
    /// Regions taken out to make room.
    pub evicted: u64,
    /// Regions taken out by `flush`.
    pub flushed: u64,
    /// Registrations that an invalidation met half-way, and that were not put into the look-up.
    pub collisions: u64,
    /// Records that a source has lost. For all that were lost since the last time, everything was
    /// taken out once.
    pub lost: u64,
    /// Regions that are registered, those out of the look-up included.
    pub regions: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Regions that look-ups find.
    pub live_regions: u64,
    /// Bytes in those.
    pub live_bytes: u64,
}

impl Stats {
    /// Each counter and gauge with its name, as metrics exporters want them.
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
