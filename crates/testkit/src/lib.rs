//! What the tests of several crates share: probes for what this machine can do, forked children,
//! programs to execute, a counting allocator, and the reference model of the core. Not published.
//!
//! A test that needs more than a Rust toolchain begins like this:
//!
//! ```
//! use testkit::{Cap, require};
//!
//! if !require(Cap::Ptrace) {
//!     return;
//! }
//! ```

mod alloc;
mod cap;
mod cgroup;
mod child;
pub mod model;
mod program;
mod refuse;
mod signals;
mod within;

pub use alloc::Counting;
pub use cap::{Cap, PYTHON, edu, has_optional_program, is_guest, require, rounds};
pub use cgroup::Cgroup;
pub use child::in_child;
pub use program::{copy_program, write_program};
pub use refuse::{refuse_calls, refuse_threads};
pub use signals::{has_timers, signal_every};
pub use within::within;

/// The examples of the front page must run. Here, because no published crate brings the front page.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
