//! What the tests of several crates share: probes for what this machine can do. Not published.
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

mod cap;

pub use cap::{Cap, require};
