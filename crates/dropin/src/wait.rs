//! Waiting for another thread, with a limit.

use std::time::{Duration, Instant};

/// Waits until `is_done`, and no longer than `limit`.
pub(crate) fn wait_until(limit: Duration, is_done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_done() && begin.elapsed() < limit {
        std::thread::sleep(Duration::from_micros(100));
    }
}
