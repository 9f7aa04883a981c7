//! A registrar that only counts, for tests and measurements.

use crate::Registrar;
use mmu_notifier::VaRange;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};

/// A registrar that registers nothing and only counts. It can deregister in callbacks. The handle
/// of a registration is its ordinal, from 1.
#[derive(Debug, Default)]
pub struct Counting {
    registered: AtomicU64,
    deregistered: AtomicU64,
}

impl Counting {
    /// Returns the number of registrations.
    #[must_use]
    pub fn registered(&self) -> u64 {
        self.registered.load(Ordering::Relaxed)
    }

    /// Returns the number of deregistrations.
    #[must_use]
    pub fn deregistered(&self) -> u64 {
        self.deregistered.load(Ordering::Relaxed)
    }
}

impl Registrar for Counting {
    type Handle = u64;
    type Error = Infallible;

    fn register(&self, _range: VaRange) -> Result<u64, Infallible> {
        Ok(self.registered.fetch_add(1, Ordering::Relaxed) + 1)
    }

    fn deregister(&self, _handle: u64) {
        self.deregistered.fetch_add(1, Ordering::Relaxed);
    }

    fn deregisters_in_callbacks(&self) -> bool {
        true
    }
}
