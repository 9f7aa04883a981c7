//! The bound of the table.
//!
//! Up to 2.0, libfabric's caches evict registrations without a call of `unsubscribe`. The entries
//! of evicted registrations would stay for ever, each with a watch. So if there are too many valid
//! ranges, the older half becomes stale, and the thread that drops stale ranges removes them. If a
//! registration of that half is still cached, its next look-up registers it anew.

use super::{Ranges, Table, covering};
use crate::counts::Change;
use mmu_notifier::VaRange;
use std::sync::atomic::Ordering;

/// The most valid ranges. A cache holds at most 1,024 registrations, unless the user sets
/// `FI_MR_CACHE_MAX_COUNT`. Nothing is dropped before this many, so at most every fourth
/// registration that is entered costs another one.
pub(super) const MOST: usize = 8192;

impl Ranges {
    /// Makes the older half of the ranges stale if there are too many. Returns whether it did.
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
