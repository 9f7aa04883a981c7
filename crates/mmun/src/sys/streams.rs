//! Standard streams that the caller has closed stay closed for the programs that are started.
//!
//! The runtime of Rust opens `/dev/null` in the place of each, before `main`: so that no file gets
//! such a number by chance. A program that is started is to see what the caller has left.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// A bit for each stream that was closed.
static CLOSED: AtomicU8 = AtomicU8::new(0);

/// Runs before the runtime does: the loader calls each function that this section points to.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

extern "C" fn look() {
    for stream in 0..3 {
        // SAFETY: it takes integers, and only asks.
        if unsafe { libc::fcntl(stream, libc::F_GETFD) } == -1 {
            // Relaxed: there is one thread.
            CLOSED.fetch_or(1 << stream, Relaxed);
        }
    }
}

/// What the runtime has opened in their place is this process's own, and ends with it or with
/// `execve`.
pub(crate) fn keep_closed_in_programs() {
    for stream in 0..3 {
        if CLOSED.load(Relaxed) & (1 << stream) != 0 {
            // SAFETY: it takes integers, and changes who inherits a descriptor, not what it is.
            unsafe { libc::fcntl(stream, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
}
