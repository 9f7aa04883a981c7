//! A helper thread that reaps threads which end while the tracer attaches to their process.
//!
//! Without the reaper the tracer could deadlock:
//! 1. While a thread of the process is in `execve`, seizing another thread of it blocks.
//! 2. The `execve` waits until the threads that it has killed are gone. A traced thread is gone
//!    only when its tracer has reaped it.
//! 3. So a tracer that blocks in 1 would wait for itself. The reaper reaps the thread instead.
//!
//! A killed thread must not stop at its exit either, because only the tracer's own thread could
//! resume it. So a task that was attached to gets the exit stop only after its first stop.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use std::{io, mem};

use super::super::sys;
use super::{ExitStatus, Pid};
use srcu::Thread;

/// The interval at which the reaper checks whether the threads have ended.
const PAUSE: Duration = Duration::from_millis(2);

/// Ends the thread when dropped.
#[derive(Debug)]
pub(super) struct Reaper {
    shared: Arc<Shared>,
    thread: Option<Thread>,
}

#[derive(Debug, Default)]
struct Shared {
    work: Mutex<Work>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Work {
    /// The threads to reap.
    tids: Vec<Pid>,
    /// The threads that were reaped since the last call of [`Reaper::ended`], with their status.
    ended: Vec<(Pid, ExitStatus)>,
    is_over: bool,
}

impl Reaper {
    /// # Errors
    /// If the thread cannot be started.
    pub(super) fn start() -> io::Result<Reaper> {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let thread = Thread::spawn(c"mmu-attach", move || own.run())?;
        Ok(Reaper {
            shared,
            thread: Some(thread),
        })
    }

    /// Adds a thread to reap. The calling thread must trace it, and it must not be the leader of
    /// its process.
    pub(super) fn watch(&self, tid: Pid) {
        self.shared.lock().tids.push(tid);
    }

    /// Returns the threads that were reaped since the last call. Their thread ids may be in use
    /// again.
    pub(super) fn ended(&self) -> Vec<(Pid, ExitStatus)> {
        mem::take(&mut self.shared.lock().ended)
    }

    /// Stops the reaper, and returns the threads that were reaped since the last call.
    pub(super) fn finish(mut self) -> Vec<(Pid, ExitStatus)> {
        self.end();
        self.ended()
    }

    fn end(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut work = self.lock();
        while !work.is_over {
            let Work { tids, ended, .. } = &mut *work;
            // Reap under the lock, so that the tracer learns of the end before it can see the
            // thread id again.
            tids.retain(|tid| match sys::take_status(*tid) {
                Some(status) => {
                    ended.push((*tid, status));
                    false
                }
                None => true,
            });
            work = self
                .wake
                .wait_timeout(work, PAUSE)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}
