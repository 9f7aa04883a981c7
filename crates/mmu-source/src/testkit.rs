//! The probes and helpers of the unit tests: links to files of the crate `testkit`, which is not
//! published. With the links, the published crate still runs its unit tests.
#![allow(
    unsafe_code,
    dead_code,
    unreachable_pub,
    reason = "files of another crate, with that crate's rules"
)]

mod cap;
mod child;

pub(crate) use cap::{Cap, require};
pub(crate) use child::in_child;
