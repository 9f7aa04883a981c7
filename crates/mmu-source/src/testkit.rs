//! The probes and helpers of the unit tests. The files are links into the crate `testkit`, which is
//! not published. Because of the links, the published crate contains the helpers and can run its
//! unit tests.
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
