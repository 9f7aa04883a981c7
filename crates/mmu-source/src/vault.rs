//! Keeps a source's descriptors where the program cannot close them.
//!
//! Programs close descriptors that they did not open: a daemon calls `close_range(3, ~0)`, a shell
//! calls `dup2` over a fixed descriptor. If a source kept its descriptors in the program's table,
//! such a call would blind the source. If the program then opened a file that got the same
//! descriptor, the source would read and write that file. So a source keeps its descriptors in a
//! **vault**: a thread with a descriptor table of its own. Other threads post jobs to the vault's
//! thread, and the jobs use the descriptors.
//!
//! ```text
//!   the program's threads ─── the program's table: its files
//!   the vault's thread ────── a table of its own:  what the source opened
//!   threads that it starts ──────┘
//! ```
//!
//! A child gets a copy of the descriptor table of the thread that forks. That thread belongs to the
//! program, so a child inherits none of the source's descriptors.
//!
//! The vault's thread runs no callback, and takes no lock whose holder runs a callback or waits for
//! the vault. So a thread that waits for the vault never waits for client code.
//!
//! # Safety
//! The system calls take only integers. `close_range` gives the calling thread an empty descriptor
//! table. The caller is the vault's own thread, which has not opened anything yet. The program's
//! table does not change.

#![allow(
    unsafe_code,
    reason = "calls without a safe wrapper; see the Safety section"
)]

use crate::queue::{ClosesQueue, Queue};
use srcu::Thread;
use std::ffi::CStr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::{fmt, io};

type Job<T> = Box<dyn FnOnce(&mut T) + Send>;

/// A thread with a descriptor table of its own, and a value `T` that owns the descriptors in it.
///
/// Dropping the vault drops the value on that thread, and waits until the thread has ended.
#[derive(Debug)]
pub(crate) struct Vault<T> {
    inbox: Letterbox<T>,
    thread: Option<Thread>,
}

/// Posts jobs to a vault. A letterbox does not keep the vault open.
pub(crate) struct Letterbox<T>(Arc<Queue<Job<T>>>);

impl<T: 'static> Vault<T> {
    /// Starts the thread. The thread calls `make` once it has its own descriptor table.
    ///
    /// # Errors
    /// An error of `make`. If a call before `make` fails, the result of `failed`.
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

    /// Runs `f` in the vault and waits for its result.
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

    /// Forgets the vault in the child of a fork: its thread exists only in the parent.
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
    /// Queues `f` to run in the vault. If the vault closes first, `f` is dropped.
    pub(crate) fn post(&self, f: impl FnOnce(&mut T) + Send + 'static) {
        self.0.push(Box::new(f));
    }
}

impl<T> Clone for Letterbox<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// The receiving end of the letterbox. Dropped when the vault's thread ends, also by the panic of a
/// posted job. The drop discards the jobs in the queue. So a thread that waits for the result of
/// such a job panics instead of waiting for ever.
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

/// Gives the calling thread an empty descriptor table of its own. Placeholders occupy descriptors 0
/// to 2, so that the message of a panic is lost instead of written to some file.
fn empty_table() -> io::Result<()> {
    const CLOSE_RANGE_UNSHARE: u32 = 1 << 1;
    // SAFETY: takes integers. The call first unshares the table, so it closes only this thread's
    // copies, and this thread has opened nothing.
    if unsafe { libc::syscall(libc::SYS_close_range, 0_u32, u32::MAX, CLOSE_RANGE_UNSHARE) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for _ in 0..3 {
        // SAFETY: takes integers; no code uses the descriptor.
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
