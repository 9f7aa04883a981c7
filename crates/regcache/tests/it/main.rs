//! The public interface, one module for each promise.
#![cfg(not(mmun_loom))]

mod errors;
mod evict;
mod fork;
mod invalidate;
mod kernel;
mod lease;
mod merge;
mod mlock;
mod support;
mod threads;
mod uring;
