//! The unsafe part: memory that readers access without a lock.
//!
//! # Safety
//! Everything that a look-up follows (the header page, the tables, the regions, the blocks of
//! slots) is freed only when the cache is dropped. So a reader may see outdated data, but never
//! freed memory. `Region::is_live`, called after a lease was published, decides whether the data is
//! current. A region's handle is written before the region becomes live, and taken when no lease is
//! left.

pub(crate) mod barrier;
pub(crate) mod handles;
pub(crate) mod held;
pub(crate) mod memory;
mod number;
pub(crate) mod page;
pub(crate) mod region;
pub(crate) mod table;
pub(crate) mod threads;
