//! Changes of armed ranges of this process, told by userfaultfd.
//!
//! The ranges are registered for asynchronous write protection (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7), and no page is ever
//! protected: there is no fault to serve, and nobody hangs if the program stops. What is wanted are the events: unmap,
//! remove (madvise and hole punching through this mapping), remap, fork.
//!
//! ```
//! use mmu_source::uffd::Uffd;
//! use mmu_notifier::{Va, VaRange};
//!
//! # if mmu_source::uffd::probe().is_err() { return Ok(()); }
//! let uffd = Uffd::start()?;
//! let buffer = vec![0_u8; 1 << 20];
//! let inside = VaRange::covering(Va::new((buffer.as_ptr().addr() as u64).next_multiple_of(4096)), 1 << 19)?;
//! let armed = uffd.arm(inside)?;
//! drop(armed);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # When it tells
//! The thread that changes the memory waits until its event has been *read*, and then goes on; callbacks run after
//! that, in a thread of the source. Remove events are sent before the pages go, the others after, but since nobody waits for the
//! callbacks, no event is a bracket. [`settle`](Uffd::settle) waits until everything is told whose call has returned.
//!
//! # Two threads
//! Whoever calls `munmap` may hold the allocator's lock, and waits for our reader. So the thread that reads runs no callbacks,
//! takes no lock and allocates nothing: it moves events into a queue of fixed size. Another one runs the callbacks, which may
//! therefore do what they like: allocate, map and unmap armed memory, arm and disarm.
//!
//! # Forks
//! A fork of this process invalidates everything in the parent (all private memory becomes copy on write). In the child
//! an inherited handle answers [`Error::AfterFork`]; the child's memory is not registered.

mod queue;
mod sys;

use crate::Error;
use crate::current_mm::current_ref;
use crate::fork::{marks, running};
use crate::wait;
use mmu_notifier::{Event, Va, VaRange};
use queue::Queue;
use srcu::Thread;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use sys::Message;

/// The source, while any handle of it is alive.
pub struct Uffd {
    inner: Arc<Inner>,
    threads: Vec<Thread>,
}

struct Inner {
    id: u64,
    uffd: OwnedFd,
    queue: Queue,
    /// Wakes the reader: to answer `asked`, or to stop.
    reader: OwnedFd,
    /// Wakes the thread that runs callbacks.
    teller: OwnedFd,
    stop: AtomicBool,
    stop_telling: AtomicBool,
    /// The reader answers a question when it has read whatever was there: then it copies `asked`.
    asked: AtomicU64,
    answered: AtomicU64,
    armed: Mutex<Vec<VaRange>>,
}

/// What the source found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Features {
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
}

/// Tells whether the source would start here, without starting it.
///
/// # Errors
/// [`Error::Unavailable`] with what is missing, and the command that would grant it.
pub fn probe() -> Result<Features, Error> {
    sys::open().map_err(|error| missing(&error))?;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(Features { release: release.trim().to_owned() })
}

fn missing(error: &io::Error) -> Error {
    let release = || "uname -r".to_owned();
    let (missing, remedy) = match error.raw_os_error() {
        Some(libc::EPERM) => ("CAP_SYS_PTRACE, for the events of fork", crate::error::setcap("cap_sys_ptrace")),
        Some(libc::ENOSYS) => ("userfaultfd (CONFIG_USERFAULTFD)", release()),
        _ => ("UFFD_FEATURE_WP_ASYNC, as of Linux 6.7", release()),
    };
    Error::Unavailable { source: "uffd", missing: format!("{missing}: {error}"), remedy }
}

impl Uffd {
    /// Starts the source, or returns the one that runs already.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the kernel or the rights are lacking; [`Error::Kernel`] if a thread cannot be started.
    pub fn start() -> Result<Arc<Self>, Error> {
        running(&marks().uffd, Self::make)
    }

    fn make(id: u64) -> Result<Self, Error> {
        current_ref();
        let event = || wait::event_fd().map_err(|source| Error::Kernel { call: "eventfd", tid: None, source });
        let inner = Arc::new(Inner {
            id,
            uffd: sys::open().map_err(|error| missing(&error))?,
            queue: Queue::new(),
            reader: event()?,
            teller: event()?,
            stop: AtomicBool::new(false),
            stop_telling: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            armed: Mutex::new(Vec::new()),
        });
        // A child that is forked just before this keeps the memory registered, if it lives on, though this source may end.
        sys::let_go_in_children(inner.uffd.as_fd(), inner.reader.as_fd());
        let mut uffd = Self { inner, threads: Vec::with_capacity(2) };
        for (name, run) in [(c"mmu-uffd-read", Inner::read as fn(&Inner)), (c"mmu-uffd-tell", Inner::tell)] {
            let inner = Arc::clone(&uffd.inner);
            let thread = Thread::spawn(name, move || run(&inner));
            let thread = thread.map_err(|source| Error::Kernel { call: "start of a thread", tid: None, source })?;
            uffd.threads.push(thread);
        }
        // A thread allocates as it starts. A fork at that time would hold the allocator's lock and wait for the reader.
        uffd.ask();
        Ok(uffd)
    }

    /// Has changes of `range` told until the returned value is dropped, or until the memory is unmapped: what is mapped there
    /// afterwards is not armed. Memory that is moved stays armed at its new place.
    ///
    /// Anonymous memory, shmem, hugetlbfs and mapped files can be armed. Ranges may overlap.
    ///
    /// # Errors
    /// [`Error::Arm`] if a part of the range is not mapped (`ENOMEM`), belongs to another userfaultfd (`EBUSY`), or cannot be registered
    /// (`EINVAL`): then nothing is armed. [`Error::AfterFork`] in the child of a fork.
    pub fn arm(self: &Arc<Self>, range: VaRange) -> Result<Armed, Error> {
        if self.inner.is_inherited() {
            return Err(Error::AfterFork { source: "uffd" });
        }
        let failed = |source| Error::Arm { call: "UFFDIO_REGISTER", range, source };
        let mut armed = self.inner.armed();
        sys::is_mapped(range).map_err(failed)?;
        sys::register(self.inner.uffd.as_fd(), range).map_err(failed)?;
        armed.push(range);
        drop(armed);
        Ok(Armed { uffd: Arc::clone(self), range })
    }

    /// Waits until everything has been told whose call returned before.
    ///
    /// # Blocking
    /// While callbacks run.
    /// # Errors
    /// [`Error::AfterFork`] in the child of a fork; [`Error::InCallback`] in a callback of this source.
    pub fn settle(&self) -> Result<(), Error> {
        let inner = &self.inner;
        if inner.is_inherited() {
            return Err(Error::AfterFork { source: "uffd" });
        }
        if self.threads.iter().any(Thread::is_current) {
            return Err(Error::InCallback { source: "uffd" });
        }
        self.ask();
        let (written, lost) = (inner.queue.written(), inner.queue.lost());
        wait::until(|| inner.queue.read() >= written && inner.queue.is_told(lost));
        Ok(())
    }

    /// Waits until the reader has read whatever there is.
    fn ask(&self) {
        let inner = &self.inner;
        // ORDER(source-ask): AcqRel: the question comes after the call that it is about. Partner: the load in `Inner::read`.
        let question = inner.asked.fetch_add(1, Ordering::AcqRel) + 1;
        wait::wake(inner.reader.as_fd());
        // ORDER(source-answer): Acquire: what was read is in the queue. Partner: the store in `Inner::read`.
        wait::until(|| inner.answered.load(Ordering::Acquire) >= question);
    }

    /// Returns how many events did not fit into the queue. Everything was invalidated for them.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.inner.queue.lost()
    }
}

impl Inner {
    fn is_inherited(&self) -> bool {
        marks().alive.load(Ordering::Relaxed) != self.id
    }

    fn armed(&self) -> MutexGuard<'_, Vec<VaRange>> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread that reads. No lock, no allocation, no callback: somebody waits for it with the allocator's lock held.
    fn read(&self) {
        loop {
            // ORDER(source-ask): Acquire: what is read below is read after the question. Partner: the addition in `settle`.
            let asked = self.asked.load(Ordering::Acquire);
            let mut any = false;
            while let Some(message) = sys::read(self.uffd.as_fd()) {
                any = true;
                match message {
                    Message::Remove { start, end } => self.queue.push([Kind::Clear as u64, start, end]),
                    Message::Unmap { start, end } => self.queue.push([Kind::Unmap as u64, start, end]),
                    Message::Remap { from, to, len } => {
                        self.queue.push([Kind::Unmap as u64, from, from.wrapping_add(len)]);
                        self.queue.push([Kind::Unmap as u64, to, to.wrapping_add(len)]);
                    }
                    Message::Fork => self.queue.push([Kind::Protection as u64, 0, 0]),
                    Message::Other => self.queue.push([Kind::Clear as u64, 0, 0]),
                }
            }
            if any {
                wait::wake(self.teller.as_fd());
            }
            // ORDER(source-answer): Release, for the queue. Partner: the load in `settle`.
            self.answered.store(asked, Ordering::Release);
            // ORDER: Relaxed: the wake-up below is what tells.
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            if !wait::readable(self.uffd.as_fd(), self.reader.as_fd(), None) {
                wait::clear(self.reader.as_fd());
            }
        }
    }

    /// The thread that runs callbacks.
    fn tell(&self) {
        let mm = current_ref();
        loop {
            wait::clear(self.teller.as_fd());
            loop {
                // Also between entries, which may never end.
                if let Some(lost) = self.queue.untold() {
                    drop(mm.invalidate(VaRange::ALL, Event::Clear));
                    self.queue.tell(lost);
                }
                let Some([kind, start, end]) = self.queue.peek() else { break };
                let range = VaRange::covering(Va::new(start), end.wrapping_sub(start)).unwrap_or(VaRange::ALL);
                let event = match kind {
                    kind if kind == Kind::Unmap as u64 => Event::Unmap,
                    kind if kind == Kind::Protection as u64 => Event::ProtectionPage,
                    _ => Event::Clear,
                };
                drop(mm.invalidate(range, event));
                self.queue.advance();
            }
            if self.stop_telling.load(Ordering::Relaxed) {
                return;
            }
            wait::wait_for(self.teller.as_fd());
        }
    }

    /// Unregisters what no other armed range covers.
    fn disarm(&self, range: VaRange) {
        let mut armed = self.armed();
        if let Some(at) = armed.iter().position(|other| *other == range) {
            armed.swap_remove(at);
        }
        let mut from = range.start();
        loop {
            let rest = VaRange::new(from, range.end().unwrap_or(Va::new(u64::MAX))).ok();
            let Some(rest) = rest else { return };
            // The first armed range that covers something of the rest.
            let next = armed.iter().filter_map(|other| other.intersection(rest)).min();
            let until = next.map_or(rest.end(), |next| Some(next.start()));
            if let Some(free) = until.and_then(|until| VaRange::new(from, until).ok()) {
                // It may be unmapped meanwhile, and then it is not registered either.
                drop(sys::unregister(self.uffd.as_fd(), free));
            }
            match next.and_then(VaRange::end) {
                Some(end) => from = end,
                None => return,
            }
        }
    }
}

/// What a queue's entry says.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Clear = 0,
    Unmap = 1,
    Protection = 2,
}

impl Drop for Uffd {
    fn drop(&mut self) {
        let threads = std::mem::take(&mut self.threads);
        if self.inner.is_inherited() {
            // The threads are the parent's.
            threads.into_iter().for_each(std::mem::forget);
            return;
        }
        // The callbacks end first, and the reader serves what they change. The descriptor goes before the reader, which may need the
        // allocator to end: from then on nobody waits for it.
        let mut threads = threads.into_iter().rev();
        // A callback that drops the last handle runs on the thread itself.
        let end = |thread: Thread| if thread.is_current() { thread.detach() } else { thread.join() };
        self.inner.stop_telling.store(true, Ordering::Relaxed);
        wait::wake(self.inner.teller.as_fd());
        if threads.len() == 2 {
            threads.next().into_iter().for_each(end);
        }
        self.inner.stop.store(true, Ordering::Relaxed);
        sys::replace(self.inner.uffd.as_fd(), self.inner.reader.as_fd());
        sys::forget_in_children(self.inner.uffd.as_fd());
        wait::wake(self.inner.reader.as_fd());
        threads.for_each(end);
    }
}

impl fmt::Debug for Uffd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uffd").field("lost", &self.lost()).finish_non_exhaustive()
    }
}

/// An armed range. Dropping it disarms.
#[derive(Debug)]
#[must_use = "the range is disarmed when this is dropped"]
pub struct Armed {
    uffd: Arc<Uffd>,
    range: VaRange,
}

impl Armed {
    /// Returns the pages.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.range
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        // In the child of a fork the descriptor acts on the parent's memory.
        if !self.uffd.inner.is_inherited() {
            self.uffd.inner.disarm(self.range);
        }
    }
}
