//! Descriptors out of the program's reach.
//!
//! Programs close descriptors that they do not know: a daemon calls `close_range(3, ~0)`, a shell
//! calls `dup2` over a fixed number. A source that kept its descriptors in the program's table
//! would be blind from then on, or would read and write a file of the program that was given the
//! old number. So a source keeps them in a **vault**: a thread whose descriptor table is its own.
//! Other threads post jobs to that thread, which uses the descriptors for them.
//!
//! ```text
//!   the program's threads ─── the program's table: its files
//!   the vault's thread ────── a table of its own:  what the source opened
//!   threads that it starts ──────┘
//! ```
//!
//! A child gets a copy of the table of the thread that forks. So it inherits none of these
//! descriptors, and nothing of a source lives on in a child.
//!
//! The vault's thread runs no callback and takes no lock that a callback can see: a thread that
//! waits for it never waits for a client.
//!
//! # Safety
//! The one call without a safe wrapper replaces the calling thread's descriptor table by an empty
//! one. The thread is the vault's own, it has opened nothing yet, and the program's table is not
//! touched.

#![allow(
    unsafe_code,
    reason = "one call without a safe wrapper; see the Safety section"
)]

use crate::queue::{ClosesQueue, Queue};
use srcu::Thread;
use std::ffi::CStr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::{fmt, io};

type Job<T> = Box<dyn FnOnce(&mut T) + Send>;

/// A thread with a descriptor table of its own, and the value `T` that owns what is open there.
///
/// Dropping it drops the content, in the vault, and waits for that.
#[derive(Debug)]
pub(crate) struct Vault<T> {
    inbox: Letterbox<T>,
    thread: Option<Thread>,
}

/// Posts jobs to a vault, without keeping it open.
pub(crate) struct Letterbox<T>(Arc<Queue<Job<T>>>);

impl<T: 'static> Vault<T> {
    /// Starts the thread, which makes the content when its own table is in force.
    ///
    /// # Errors
    /// The errors of `make`, and what `failed` makes of the error of an earlier call.
    pub(crate) fn open<E: Send + 'static>(
        name: &'static CStr,
        failed: fn(&'static str, io::Error) -> E,
        make: impl FnOnce(&Letterbox<T>) -> Result<T, E> + Send + 'static,
    ) -> Result<Self, E> {
        let inbox = Letterbox(Queue::new());
        let own = Serving(inbox.clone());
        let answered = Queue::new();
        let answer = ClosesQueue(Arc::clone(&answered));
        let run = move || {
            let made = empty_table()
                .map_err(|error| failed("close_range", error))
                .and_then(|()| make(&own.0));
            let (content, made) = match made {
                Ok(content) => (Some(content), Ok(())),
                Err(error) => (None, Err(error)),
            };
            answer.0.push(made);
            drop(answer);
            if let Some(mut content) = content {
                while let Some(job) = own.0.0.pop() {
                    job(&mut content);
                }
            }
        };
        let thread =
            Thread::spawn(name, run).map_err(|error| failed("start of a thread", error))?;
        let vault = Self {
            inbox,
            thread: Some(thread),
        };
        answered
            .pop()
            .expect("the thread answers before it ends")
            .map(|()| vault)
    }

    /// Runs `f` in the vault, and waits for its result.
    pub(crate) fn run<R: Send + 'static>(&self, f: impl FnOnce(&mut T) -> R + Send + 'static) -> R {
        let answered = Queue::new();
        let answer = ClosesQueue(Arc::clone(&answered));
        self.inbox
            .post(move |content| answer.0.push(catch_unwind(AssertUnwindSafe(|| f(content)))));
        let result = answered
            .pop()
            .expect("the thread runs every job that comes before its end");
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Gives the vault up in the child of a fork, where it is empty: the thread is the parent's.
    pub(crate) fn abandon(self) {
        std::mem::forget(self);
    }
}

impl<T> Drop for Vault<T> {
    fn drop(&mut self) {
        self.inbox.0.close();
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

impl<T> Letterbox<T> {
    /// Has `f` run in the vault some time, unless that is closed before.
    pub(crate) fn post(&self, f: impl FnOnce(&mut T) + Send + 'static) {
        self.0.push(Box::new(f));
    }
}

impl<T> Clone for Letterbox<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// The vault's own end of its letterbox. When the vault ends, or a job panics, every thread that
/// waits for a job is woken with an error.
struct Serving<T>(Letterbox<T>);

impl<T> Drop for Serving<T> {
    fn drop(&mut self) {
        self.0.0.close();
        while self.0.0.pop().is_some() {}
    }
}

impl<T> fmt::Debug for Letterbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Letterbox").finish_non_exhaustive()
    }
}

/// Gives the calling thread an empty descriptor table of its own, in which 0 to 2 stand for
/// nothing: what a panic would print there goes nowhere.
fn empty_table() -> io::Result<()> {
    const CLOSE_RANGE_UNSHARE: u32 = 1 << 1;
    // SAFETY: integers. The table is the thread's own from here on, and nothing that it has closed
    // was the thread's.
    if unsafe { libc::syscall(libc::SYS_close_range, 0_u32, u32::MAX, CLOSE_RANGE_UNSHARE) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for _ in 0..3 {
        // SAFETY: integers; the descriptor is never used.
        if unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    fn open() -> Vault<File> {
        Vault::open(
            c"vault",
            |_, error| error,
            |_| File::open("/proc/self/status"),
        )
        .expect("a vault")
    }

    #[test]
    fn what_is_open_in_a_vault_has_no_number_in_the_program() {
        let vault = open();
        let inside = vault
            .run(|file| std::fs::read_link(format!("/proc/thread-self/fd/{}", file.as_raw_fd())));
        assert!(inside.expect("it is open there").ends_with("status"));
        let outside = std::fs::read_dir("/proc/self/fd")
            .expect("proc")
            .filter_map(|entry| std::fs::read_link(entry.expect("an entry").path()).ok());
        assert!(!outside.into_iter().any(|path| path.ends_with("status")));
        let own = vault.run(|_| {
            std::fs::read_dir("/proc/thread-self/fd")
                .expect("proc")
                .count()
        });
        assert_eq!(
            own, 5,
            "three that stand for nothing, the content, and the folder itself"
        );
    }

    #[test]
    fn a_panic_is_the_callers_and_an_error_of_the_maker_is_handed_on() {
        let vault = open();
        assert!(catch_unwind(AssertUnwindSafe(|| vault.run(|_| panic!("as asked")))).is_err());
        assert!(
            vault.run(|file| file.metadata().is_ok()),
            "the vault still works"
        );
        vault.inbox.post(|_| panic!("as posted"));
        assert!(
            catch_unwind(AssertUnwindSafe(|| vault.run(|_| ()))).is_err(),
            "no caller is kept waiting"
        );
        let failed = Vault::<()>::open(
            c"vault",
            |_, error| error,
            |_| Err(io::ErrorKind::NotFound.into()),
        );
        assert_eq!(
            failed.err().map(|error| error.kind()),
            Some(io::ErrorKind::NotFound)
        );
    }
}
