//! Signals from a timer.

use std::time::Duration;
use std::{io, mem, ptr, thread};

fn timer(signal: i32) -> io::Result<libc::timer_t> {
    // SAFETY: zeroes are a valid `sigevent`.
    let mut event: libc::sigevent = unsafe { mem::zeroed() };
    (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_SIGNAL, signal);
    let mut timer = ptr::null_mut();
    // SAFETY: the call reads `event` and writes `timer`, which are local variables.
    match unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) } {
        0 => Ok(timer),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tells whether a timer can be made. Each timer counts against the limit of the user's queued
/// signals, so there may be no room for another timer.
///
/// If not, prints `SKIP test: reason`, with the name of the test that runs in this thread.
pub fn has_timers() -> bool {
    match timer(libc::SIGUSR1) {
        Ok(timer) => {
            // SAFETY: the timer was made above, and no code uses it any more.
            unsafe { libc::timer_delete(timer) };
            true
        }
        Err(error) => {
            let name = thread::current().name().unwrap_or("a test").to_owned();
            println!("SKIP {name}: no timer can be made, see RLIMIT_SIGPENDING: {error}");
            false
        }
    }
}

/// Sends this process `signal` periodically, until the process ends.
///
/// Do not use SIGALRM: it kills a child of [`in_child`](crate::in_child) that hangs.
///
/// In the machine of `cargo xtask guest` the period is twenty times as long. In that machine, a
/// handler may take longer than a short period, and the interrupted code would make no progress.
///
/// # Errors
/// If the timer cannot be made.
pub fn signal_every(time: Duration, signal: i32) -> io::Result<()> {
    let timer = timer(signal)?;
    let time = time * if crate::is_guest() { 20 } else { 1 };
    let time = libc::timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: i64::from(time.subsec_nanos()),
    };
    let often = libc::itimerspec {
        it_interval: time,
        it_value: time,
    };
    // SAFETY: the timer was made above. The call reads `often`, a local variable.
    match unsafe { libc::timer_settime(timer, 0, &often, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
