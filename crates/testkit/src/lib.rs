//! Shared by the tests of several crates: probes for the capabilities of this machine, forked
//! children, programs to execute, a counting allocator, and the reference model of the core. Not
//! published.
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
pub use child::{in_child, in_raw_child};
pub use program::{copy_program, example_library, write_program};
pub use refuse::{refuse_calls, refuse_threads};
pub use signals::{has_timers, signal_every};
pub use within::within;

/// Runs the examples of the workspace's README as doc tests. They are in this crate, because the
/// packages of the published crates do not contain that file.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
