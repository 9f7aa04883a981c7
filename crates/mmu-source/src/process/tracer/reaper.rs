//! A second thread that takes the statuses of threads that end while their process is being
//! attached to.
//!
//! While a thread of a process is in `execve`, no other one can be seized: the call waits. The
//! `execve` waits until the threads that it has killed are gone, and one that is traced is gone
//! when its tracer has taken its status. A tracer that waits in the call would wait for itself, so
//! this thread takes the statuses for it. A thread that is killed must not stop at its exit either,
//! which only the tracer's own thread could end: tasks that were attached to are asked for that
//! stop when they have stopped once.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use std::{io, mem};

use super::super::sys;
use super::{ExitStatus, Pid};
use srcu::Thread;

/// How often it looks.
const PAUSE: Duration = Duration::from_millis(2);

/// The thread; it ends when this is dropped.
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
    /// The threads that it looks after.
    tids: Vec<Pid>,
    /// The tasks whose status the reaper has taken.
    ended: Vec<(Pid, ExitStatus)>,
    is_over: bool,
}

impl Reaper {
    /// # Errors
    /// If no thread can be made.
    pub(super) fn start() -> io::Result<Reaper> {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let thread = Thread::spawn(c"mmu-attach", move || own.run())?;
        Ok(Reaper {
            shared,
            thread: Some(thread),
        })
    }

    /// Looks after a thread, which must be traced by the thread that this is called in and not be
    /// the first of its process.
    pub(super) fn watch(&self, tid: Pid) {
        self.shared.lock().tids.push(tid);
    }

    /// The threads whose status it has taken since it was asked last. A number that is free again
    /// is among them.
    pub(super) fn ended(&self) -> Vec<(Pid, ExitStatus)> {
        mem::take(&mut self.shared.lock().ended)
    }

    /// Ends it, and returns the threads whose status it has taken since it was asked last.
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
            // Taken under the lock: the tracer learns of it before it sees the number again.
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
