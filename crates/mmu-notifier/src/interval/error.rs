//! The errors of intervals.

use super::{IntervalNotifier, IntervalOps};
use crate::WouldDeadlock;
use std::fmt;

/// The range was invalidated since the sequence was read: retry from `read_begin`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry;

impl fmt::Display for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the range was invalidated meanwhile: begin the read again")
    }
}

impl std::error::Error for Retry {}

/// An interval that could not be inserted here, and the reason. `?` turns it into [`WouldDeadlock`]
/// and drops the state.
///
/// # Source
/// The errors of `mmu_interval_notifier_insert`. Differs: the state comes back; no EINTR, ENOMEM,
/// EINVAL and EOVERFLOW.
#[non_exhaustive]
pub struct InsertError<S> {
    /// The reason.
    pub error: WouldDeadlock,
    /// The state, for another try.
    pub state: S,
}

/// An interval that could not be removed here, and the reason. `?` turns it into [`WouldDeadlock`]
/// and drops the interval.
///
/// # Source
/// None: the kernel's `mmu_interval_notifier_remove` hangs in this case.
#[non_exhaustive]
pub struct RemoveError<S: IntervalOps> {
    /// The reason.
    pub error: WouldDeadlock,
    /// The interval, which is still inserted.
    pub interval: IntervalNotifier<S>,
}

crate::error::carries_a_value!(InsertError<S: IntervalOps>);
crate::error::carries_a_value!(RemoveError<S: IntervalOps>);
