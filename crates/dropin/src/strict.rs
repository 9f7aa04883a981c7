//! `MMUN_STRICT=1`: ends a process at its first use of a library if that use is not protected.

#![allow(unsafe_code, reason = "`_exit`")]

use crate::place;
use crate::say::complain;
use crate::settings::{Choice, settings};

/// Ends the process if it is strict and `protected` has the reason why registrations can become
/// stale.
pub(crate) fn require(protected: Result<(), &str>) {
    if let (true, Err(reason)) = (settings().strict, protected) {
        refuse(reason);
    }
}

/// Whether the library does nothing, because of `MMUN=off`. Ends the process if it is strict.
pub(crate) fn is_off() -> bool {
    let is_off = settings().choice == Choice::Off;
    if is_off {
        require(Err("MMUN=off protects no process"));
    }
    is_off
}

#[cold]
fn refuse(reason: &str) -> ! {
    complain(&format!("MMUN_STRICT=1 and {reason}"));
    place::refused(reason);
    // SAFETY: `_exit` takes an integer. It runs no exit handlers of the program, which has not
    // begun to communicate.
    unsafe { libc::_exit(125) }
}
