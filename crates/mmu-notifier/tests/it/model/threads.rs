//! The threads that operate, each with its open brackets.

use mmu_notifier::{Bracket, Event, Mm, OwnedBracket, VaRange, WouldBlock};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// A bracket, which cannot leave its thread.
pub(super) enum Open {
    Owned { _bracket: OwnedBracket },
    Tried { _bracket: Tried },
}

/// A bracket that borrows, beside the address space that it borrows from.
pub(super) struct Tried {
    bracket: Option<Bracket<'static>>,
    mm: *mut Mm,
}

impl Tried {
    pub(super) fn new(mm: Mm, range: VaRange, event: Event) -> Result<Self, WouldBlock> {
        let mut tried = Self {
            bracket: None,
            mm: Box::into_raw(Box::new(mm)),
        };
        // SAFETY: The box lives until the drop of `tried`, which drops the bracket first.
        let mm: &'static Mm = unsafe { &*tried.mm };
        tried.bracket = Some(mm.try_invalidate(range, event)?);
        Ok(tried)
    }
}

impl Drop for Tried {
    fn drop(&mut self) {
        self.bracket = None;
        // SAFETY: The pointer came from `Box::into_raw`, and its only borrower is gone.
        drop(unsafe { Box::from_raw(self.mm) });
    }
}

pub(super) type Brackets = BTreeMap<usize, Open>;

type Job = Box<dyn FnOnce(&mut Brackets) + Send>;

/// One thread.
pub(super) struct Worker {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(super) fn new() -> Self {
        let (jobs, todo) = channel::<Job>();
        let thread = std::thread::spawn(move || {
            let mut brackets = Brackets::new();
            while let Ok(job) = todo.recv() {
                job(&mut brackets);
            }
        });
        Self {
            jobs: Some(jobs),
            thread: Some(thread),
        }
    }

    /// Begins `work` on this thread.
    pub(super) fn begin<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Brackets) -> R + Send + 'static,
    ) -> Receiver<R> {
        let (done, result) = channel();
        let job: Job = Box::new(move |brackets| drop(done.send(work(brackets))));
        self.jobs
            .as_ref()
            .and_then(|jobs| jobs.send(job).ok())
            .expect("the thread has panicked");
        result
    }

    /// Runs `work` on this thread.
    pub(super) fn run<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Brackets) -> R + Send + 'static,
    ) -> R {
        wait(&self.begin(work))
    }
}

/// Waits for the result of `begin`.
pub(super) fn wait<R>(result: &Receiver<R>) -> R {
    result
        .recv_timeout(Duration::from_secs(120))
        .expect("the thread hangs or has panicked")
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        if std::thread::panicking() {
            // The thread may hang, so do not join it.
            return;
        }
        if let Some(thread) = self.thread.take() {
            thread.join().expect("a thread has panicked");
        }
    }
}
