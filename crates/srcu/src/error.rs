//! The one thing that can go wrong.

use std::error::Error;
use std::fmt;

/// The wait was refused, because what it would wait for is the calling thread itself.
///
/// Nothing was waited for and nothing was changed. Leave the read section first (drop its guard),
/// or, in a callback, hand the wait to another thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WouldDeadlock;

impl fmt::Display for WouldDeadlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "wait for a grace period or callback from inside a read section or callback: end the section or use another thread",
        )
    }
}

impl Error for WouldDeadlock {}
