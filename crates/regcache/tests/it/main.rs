//! The public interface, one module for each promise.
#![cfg(not(mmun_loom))]

mod errors;
mod evict;
mod fork;
mod invalidate;
#[cfg(feature = "kernel")]
mod kernel;
mod lease;
mod merge;
mod mlock;
mod signals;
mod support;
mod threads;
#[cfg(feature = "uring")]
mod uring;

/// No callback of these tests may use the heap, and neither may a holder of a lock that callbacks
/// take.
#[global_allocator]
static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
