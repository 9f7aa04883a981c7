//! A time limit for code that could hang.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Runs `f` in a thread of its own, and fails if `f` has not ended after five minutes (twenty in
/// the machine of `cargo xtask guest`).
///
/// # Panics
/// If `f` panics or hangs.
pub fn within<T: Send + 'static>(what: &str, f: impl FnOnce() -> T + Send + 'static) -> T {
    let (end, ended) = mpsc::channel();
    let thread = thread::spawn(move || {
        // The receiver is gone only if the test has failed.
        let _ = end.send(f());
    });
    // An emulated guest gets little processor time on a busy machine.
    let minutes = if crate::is_guest() { 20 } else { 5 };
    let result = ended.recv_timeout(Duration::from_secs(60 * minutes));
    assert!(
        !matches!(result, Err(mpsc::RecvTimeoutError::Timeout)),
        "{what} took more than {minutes} minutes"
    );
    // The thread may trace processes, which stay traced until the thread has ended.
    match (thread.join(), result) {
        (Ok(()), Ok(result)) => result,
        (Err(panic), _) => std::panic::resume_unwind(panic),
        (Ok(()), Err(_)) => unreachable!("a thread that does not panic sends its result"),
    }
}
