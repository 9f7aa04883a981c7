//! The one error of this crate.

use std::error::Error;
use std::fmt;

/// The call would have waited for its own thread.
///
/// The call did not wait and changed nothing. Leave the read section first (drop its guard). In a
/// callback, let another thread wait.
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
