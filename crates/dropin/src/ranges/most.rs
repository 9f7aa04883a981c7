//! The bound of the table.
//!
//! Up to 2.0, libfabric's caches evict registrations without a call of `unsubscribe`. The entries
//! of evicted registrations would stay for ever, each with a watch. So if there are too many valid
//! ranges, the half whose last subscription is older becomes stale, and the thread that drops stale
//! ranges removes these entries. If a registration of that half is still cached, libfabric drops it
//! and registers the range anew at its next use.

use super::{Ranges, Table, covering};
use crate::counts::Change;
use mmu_notifier::VaRange;
use std::sync::atomic::Ordering;

/// The most valid ranges. Each time this limit drops 4,096 ranges, at least as many were entered
/// since the time before. A cache holds at most 1,024 registrations, unless the user sets
/// `FI_MR_CACHE_MAX_COUNT`. So with one cache at most 1,024 of the dropped ranges were still in
/// use: at most every fourth registration is made a second time because of the limit.
pub(super) const MOST: usize = 8192;

impl Ranges {
    /// Makes the older half of the valid ranges stale if there are too many and libfabric has never
    /// unsubscribed. Returns whether it did.
    pub(super) fn limit(&self, table: &mut Table) -> bool {
        let (mut entries, mut used) = (0, table.used);
        while used != 0 {
            entries += table.classes[used.trailing_zeros() as usize].len();
            used &= used - 1;
        }
        // ORDER(dropin-dirty): Relaxed suffices, because every change holds the lock.
        let stale = self.dirty.load(Ordering::Relaxed);
        if table.has_unsubscribed || entries <= MOST + stale {
            return false;
        }
        let Table { classes, marks, .. } = table;
        let valid = classes.iter().flatten().map(|(_, entry)| entry);
        let mut numbers: Vec<u64> = valid
            .filter(|entry| entry.has_valid())
            .map(|entry| entry.number)
            .collect();
        numbers.sort_unstable();
        let Some(middle) = numbers.get(numbers.len() / 2) else {
            return false;
        };
        for ((start, len, _), entry) in classes.iter_mut().flatten() {
            if entry.has_valid() && entry.number < *middle {
                let change = Change {
                    event: "no change, but too many ranges",
                    range: covering(*start, *len).unwrap_or(VaRange::ALL),
                };
                self.add_dirty(entry.meet(change, marks));
            }
        }
        true
    }
}
