//! What needs unsafe code: memory that readers look at without a lock.
//!
//! # Safety
//! Everything that a look-up follows (the page of the header, the tables, the regions, the blocks
//! of slots) is freed when the cache is dropped and not before, so a reader can at worst look at
//! something out of date, never at something freed. What is up to date is decided by
//! `Region::is_live` after a lease was published. A region's handle is written before it goes live
//! and taken when no lease is left.

pub(crate) mod barrier;
pub(crate) mod handles;
pub(crate) mod held;
pub(crate) mod memory;
mod number;
pub(crate) mod page;
pub(crate) mod region;
pub(crate) mod table;
pub(crate) mod threads;
