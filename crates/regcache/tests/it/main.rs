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

/// Ends the program if a callback of these tests uses the heap, or code that holds a lock that
/// callbacks take.
#[global_allocator]
static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
