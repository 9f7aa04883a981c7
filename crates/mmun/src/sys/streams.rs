//! Standard streams that the caller has closed stay closed in the programs that `mmun` starts.
//!
//! Before `main`, Rust's runtime opens `/dev/null` for each closed stream, so that no other file
//! gets its number. A program that `mmun` starts must find the streams as the caller left them.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// A bit for each stream that was closed.
static CLOSED: AtomicU8 = AtomicU8::new(0);

/// Runs before the runtime does: the loader calls each function that this section points to.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

extern "C" fn look() {
    for stream in 0..3 {
        // SAFETY: `F_GETFD` takes integers and changes nothing.
        if unsafe { libc::fcntl(stream, libc::F_GETFD) } == -1 {
            // Relaxed: there is one thread.
            CLOSED.fetch_or(1 << stream, Relaxed);
        }
    }
}

/// Makes `execve` close each `/dev/null` that the runtime opened, so that no program inherits
/// one.
pub(crate) fn keep_closed_in_programs() {
    for stream in 0..3 {
        if CLOSED.load(Relaxed) & (1 << stream) != 0 {
            // SAFETY: `F_SETFD` takes integers, and changes only whether `execve` closes the file.
            unsafe { libc::fcntl(stream, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
}
