//! Chooses the regions to evict when there is no room.

use super::State;
use crate::index::Index;
use crate::options::{Options, size, within};
use crate::raw::table::Table;

impl State {
    /// Evicts regions that have not been used lately, to make room for `size` more bytes and a few
    /// future regions.
    ///
    /// SIEVE: the hand moves from the oldest region to the newest, and then starts again. The hand
    /// spares a region that was used since its last pass, and evicts a region that was not. After
    /// an eviction the hand keeps its position.
    pub(crate) fn evict(&mut self, index: &Index, options: &Options, size: u128) -> u64 {
        let Some(table) = index.page.tables().newest() else {
            return 0;
        };
        let (more_regions, more_bytes) = (options.max_regions / 64, options.max_bytes / 64);
        let wanted_regions = (self.regions + 1).saturating_sub(options.max_regions);
        let too_many = (self.bytes + size).saturating_sub(options.max_bytes.into());
        let wanted_bytes = if within(self.bytes + size, options.max_bytes) {
            0
        } else {
            too_many
        };
        let wanted_regions = if wanted_regions == 0 {
            0
        } else {
            wanted_regions.max(more_regions)
        };
        let wanted_bytes = if wanted_bytes == 0 {
            0
        } else {
            wanted_bytes.max(more_bytes.into())
        };
        self.evict_some(index, table, wanted_regions.into(), wanted_bytes)
    }

    /// Evicts regions until they have `wanted` bytes together, and at least one region.
    pub(crate) fn evict_bytes(&mut self, index: &Index, wanted: u128) -> u64 {
        let Some(table) = index.page.tables().newest() else {
            return 0;
        };
        self.evict_some(index, table, 1, wanted)
    }

    fn evict_some(
        &mut self,
        index: &Index,
        table: &Table,
        wanted_regions: u64,
        wanted_bytes: u128,
    ) -> u64 {
        // This scan is only a hint, so it needs no fence: it avoids the eviction of leased regions,
        // which would free nothing.
        self.scan_leases(index);
        let (mut regions, mut freed) = (0, 0);
        // Twice around the list, because the first round may only clear the marks of uses.
        for _ in 0..2 * u64::from(self.live_regions) {
            if regions >= wanted_regions && freed >= wanted_bytes {
                break;
            }
            let at = if self.hand != 0 {
                self.hand
            } else {
                self.live.tail
            };
            let Some(region) = at.checked_sub(1) else {
                break;
            };
            if self.is_leased(index, region) || index.region(region).forget_visits() {
                self.hand = self.entry(region).prev;
                continue;
            }
            freed += size(index.region(region).range());
            self.hand = at;
            self.kill(index, table, region);
            regions += 1;
        }
        if regions != 0 {
            self.tell_levels(index);
        }
        self.counts.evicted += regions;
        regions
    }
}
