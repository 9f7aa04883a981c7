//! Sources of address-space changes for [`mmu_notifier`].
//!
//! A source watches somebody's system calls and opens an invalidation bracket on the right [`mmu_notifier::Mm`] around
//! each one that changes a translation. What each source sees, when it tells and what it misses stands in
//! `docs/sources.md`.
//!
//! * [`process`]: other processes, through ptrace and a seccomp filter.

#![deny(unsafe_code)]

mod error;
pub mod process;

pub use error::Error;
