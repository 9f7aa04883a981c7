//! Reports changes of armed ranges of this process, through userfaultfd.
//!
//! The source registers the ranges for asynchronous write protection (`UFFD_FEATURE_WP_ASYNC`,
//! Linux 6.7) but never protects a page. So no fault occurs, and no thread hangs if this process
//! stops. The source uses only the events: unmap, remove (`madvise`, and hole punching through this
//! mapping), remap, fork.
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
//! # When subscribers are notified
//! The thread that changes the memory waits until the source has *read* the event of the change.
//! Then that thread continues, and the source runs the callbacks on a thread of its own. The kernel
//! sends remove events before it discards the pages, and the other events after the change. No
//! event is a bracket, because the change does not wait for the callbacks. [`settle`](Uffd::settle)
//! waits until the callbacks have run for every call that has returned.
//!
//! # Two threads
//! A caller of `munmap` may hold the allocator's lock while it waits for the thread that reads
//! events (the reader). So the reader runs no callbacks, takes no lock and allocates nothing: it
//! copies events into a queue of fixed size. A second thread runs the callbacks (the teller).
//! Callbacks may therefore allocate, map and unmap armed memory, arm and disarm.
//!
//! # Descriptors
//! The userfaultfd is in a separate descriptor table, which no system call of the program reaches:
//! `close_range`, `closefrom` and `dup2` cannot close it, and children do not inherit it. The
//! teller uses the program's table.
//!
//! # Forks
//! A fork makes all private memory copy on write. So if a range is armed, the source invalidates
//! the parent's whole address space. In the child, `arm` and `settle` of the inherited handle
//! return [`Error::AfterFork`], and the child's memory is not registered.
//!
//! # The end of the source
//! The kernel makes a descriptor for each fork, which the source closes. If no descriptor is free
//! (`RLIMIT_NOFILE`, `fs.file-max`), the source closes the userfaultfd, because the thread that
//! forks would wait for ever. Subscribers are notified of a change of everything, for the last
//! time. From then on `arm` and `settle` fail with that error. Once all handles are dropped,
//! [`start`](Uffd::start) starts the source anew.

mod queue;
mod sys;

use crate::Error;
use crate::current_mm::current_ref;
use crate::fork::{marks, running, try_marks};
use crate::ranges::whole_pages;
use crate::vault::Vault;
use crate::wait;
use mmu_notifier::{Event, Va, VaRange};
use queue::Queue;
use srcu::Thread;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use sys::{Message, Userfaultfd};

/// The source, which runs while a handle exists.
pub struct Uffd {
    inner: Arc<Inner>,
    /// Both fields are `None` once the source is being dropped.
    vault: Option<Vault<Reader>>,
    teller: Option<Thread>,
}

/// State that the threads share.
struct Inner {
    id: u64,
    queue: Queue,
    /// The teller, so that the reader can wake it.
    teller: OnceLock<thread::Thread>,
    stop: AtomicBool,
    stop_telling: AtomicBool,
    /// A thread that waits for the reader increments `asked`. The reader copies the value to
    /// `answered` after it has read all events.
    asked: AtomicU64,
    answered: AtomicU64,
    /// The error number with which the reader has closed the userfaultfd, or 0.
    failure: AtomicI32,
    armed: Mutex<Vec<VaRange>>,
}

/// The content of the vault: the descriptors and the reader thread.
struct Reader {
    inner: Arc<Inner>,
    descriptors: Arc<Descriptors>,
    thread: Option<Thread>,
}

#[derive(Debug)]
struct Descriptors {
    uffd: Userfaultfd,
    /// Wakes the reader, which then answers `asked` or stops.
    nudge: OwnedFd,
}

/// What [`probe`] found out about this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Features {
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
}

/// Tells whether the source could start here, without starting it.
///
/// # Errors
/// [`Error::Unavailable`] says what is missing, and gives a command that provides it.
pub fn probe() -> Result<Features, Error> {
    Userfaultfd::open().map_err(|error| missing(&error))?;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(Features {
        release: release.trim().to_owned(),
    })
}

fn missing(error: &io::Error) -> Error {
    if let Some((missing, remedy)) = crate::error::exhausted(error) {
        return Error::Unavailable {
            source: "uffd",
            missing,
            remedy,
            instead: None,
        };
    }
    let release = || "uname -r".to_owned();
    let (missing, remedy) = match error.raw_os_error() {
        Some(libc::EPERM) => (
            "CAP_SYS_PTRACE, for the events of fork",
            crate::error::setcap("cap_sys_ptrace"),
        ),
        Some(libc::ENOSYS) => ("userfaultfd (CONFIG_USERFAULTFD)", release()),
        _ => ("UFFD_FEATURE_WP_ASYNC, as of Linux 6.7", release()),
    };
    Error::Unavailable {
        source: "uffd",
        missing: format!("{missing}: {error}"),
        remedy,
        instead: None,
    }
}

impl Uffd {
    /// Starts the source, or returns it if it is already running.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the kernel or this process's privileges lack something;
    /// [`Error::Kernel`] if a thread cannot be started or another system call fails.
    pub fn start() -> Result<Arc<Self>, Error> {
        running(&try_marks()?.uffd, Self::make)
    }

    fn make(id: u64) -> Result<Self, Error> {
        current_ref();
        let inner = Arc::new(Inner {
            id,
            queue: Queue::new(),
            teller: OnceLock::new(),
            stop: AtomicBool::new(false),
            stop_telling: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            failure: AtomicI32::new(0),
            armed: Mutex::new(Vec::new()),
        });
        let shared = Arc::clone(&inner);
        let vault = Vault::open(c"mmu-uffd-vault", kernel_error, move |_| {
            Reader::start(shared)
        })?;
        let mut uffd = Self {
            inner,
            vault: Some(vault),
            teller: None,
        };
        let inner = Arc::clone(&uffd.inner);
        let started = crate::queue::Queue::new();
        let starts = Arc::clone(&started);
        let tell = move || {
            let _ = inner.teller.set(thread::current());
            starts.push(());
            inner.tell();
        };
        let thread = Thread::spawn(c"mmu-uffd-tell", tell)
            .map_err(|error| kernel_error("start of a thread", error))?;
        uffd.teller = Some(thread);
        started.pop().expect("the thread has started");
        // A new thread allocates while it starts. If another thread forked during that time, that
        // other thread would hold the allocator's lock and wait for the reader, while the reader
        // waited for that lock. So wait until the reader has started.
        uffd.ask();
        Ok(uffd)
    }

    fn vault(&self) -> &Vault<Reader> {
        self.vault.as_ref().expect("it is there until the drop")
    }

    /// Arms `range`: subscribers are notified of its changes until the returned value is dropped or
    /// the memory is unmapped. Memory mapped at the same address later is not armed. Memory that
    /// `mremap` moves stays armed at its new address.
    ///
    /// Anonymous memory, shmem, hugetlbfs and mapped files can be armed. Ranges may overlap.
    ///
    /// # Errors
    /// [`Error::Arm`] if a part of the range is not mapped (`ENOMEM`), belongs to another
    /// userfaultfd (`EBUSY`), or cannot be registered (`EINVAL`). Then nothing is armed.
    /// [`Error::AfterFork`] in the child of a fork; [`Error::Kernel`] if the source has ended.
    pub fn arm(self: &Arc<Self>, range: VaRange) -> Result<Armed, Error> {
        if self.inner.is_inherited() {
            return Err(Error::AfterFork { source: "uffd" });
        }
        self.inner.goes_on()?;
        // The kernel registers only whole kernel pages.
        let range = whole_pages(range);
        let failed = |source| Error::Arm {
            call: "UFFDIO_REGISTER",
            range,
            source,
        };
        let mut armed = self.inner.armed();
        sys::is_mapped(range).map_err(failed)?;
        self.vault()
            .run(move |reader| sys::register(&reader.descriptors.uffd, range))
            .map_err(failed)?;
        armed.push(range);
        drop(armed);
        Ok(Armed {
            uffd: Arc::clone(self),
            range,
        })
    }

    /// Waits until callbacks have run for every memory call that returned before this call.
    ///
    /// # Blocking
    /// Waits while callbacks run.
    /// # Errors
    /// [`Error::AfterFork`] in the child of a fork; [`Error::InCallback`] in a callback of this
    /// source; [`Error::Kernel`] if the source has ended. Then nothing reports later changes.
    pub fn settle(&self) -> Result<(), Error> {
        let inner = &self.inner;
        if inner.is_inherited() {
            return Err(Error::AfterFork { source: "uffd" });
        }
        if self.is_teller() {
            return Err(Error::InCallback { source: "uffd" });
        }
        self.ask();
        let (written, lost) = (inner.queue.written(), inner.queue.lost());
        wait::until(|| inner.queue.read() >= written && inner.queue.is_told(lost));
        inner.goes_on()
    }

    /// Tells whether the caller runs in a callback of this source.
    fn is_teller(&self) -> bool {
        self.teller.as_ref().is_some_and(Thread::is_current)
    }

    /// Waits until the reader has read every pending event.
    fn ask(&self) {
        let inner = &self.inner;
        // ORDER(source-ask): AcqRel: this request comes after the memory call whose event the
        // caller waits for. Partner: the load in `Inner::read`.
        let question = inner.asked.fetch_add(1, Ordering::AcqRel) + 1;
        self.vault()
            .run(|reader| wait::wake(reader.descriptors.nudge.as_fd()));
        // ORDER(source-answer): Acquire: the events that were read are in the queue. Partner: the
        // store in `Inner::read`.
        wait::until(|| inner.answered.load(Ordering::Acquire) >= question);
    }

    /// Returns how many entries did not fit into the queue. The source then invalidates the whole
    /// address space, once for all losses that it has not yet handled.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.inner.queue.lost()
    }
}

impl Inner {
    fn is_inherited(&self) -> bool {
        marks().alive.load(Ordering::Relaxed) != self.id
    }

    /// # Errors
    /// If the reader has closed the userfaultfd.
    fn goes_on(&self) -> Result<(), Error> {
        // ORDER: Relaxed: no data. A call of `settle` has seen the answer, which comes later.
        match self.failure.load(Ordering::Relaxed) {
            0 => Ok(()),
            errno => Err(kernel_error(
                "read of a userfaultfd",
                io::Error::from_raw_os_error(errno),
            )),
        }
    }

    fn armed(&self) -> MutexGuard<'_, Vec<VaRange>> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs on the reader. Takes no lock, allocates nothing and runs no callback, because a thread
    /// that waits for the reader may hold the allocator's lock.
    fn read(&self, Descriptors { uffd, nudge }: &Descriptors) {
        loop {
            // ORDER(source-ask): Acquire: the events below are read after the request. Partner: the
            // addition in `ask`.
            let asked = self.asked.load(Ordering::Acquire);
            let mut any = false;
            loop {
                match sys::read(uffd) {
                    Ok(Some(message)) => self.take_in(message),
                    Ok(None) => break,
                    Err(error) if uffd.descriptor().is_some() => {
                        self.failure
                            .store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Relaxed);
                        uffd.close();
                        self.take_in(Message::Other);
                    }
                    Err(_) => break,
                }
                any = true;
            }
            if any {
                self.wake_teller();
            }
            // ORDER(source-answer): Release, for the queue. Partner: the load in `ask`.
            self.answered.store(asked, Ordering::Release);
            // ORDER: Relaxed: the wake-up of `nudge` orders this load.
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let events = uffd.descriptor().unwrap_or(nudge.as_fd());
            if !wait::readable(events, nudge.as_fd(), None) {
                wait::clear(nudge.as_fd());
            }
        }
    }

    fn take_in(&self, message: Message) {
        match message {
            Message::Remove { start, end } => self.queue.push([Kind::Clear as u64, start, end]),
            Message::Unmap { start, end } => self.queue.push([Kind::Unmap as u64, start, end]),
            Message::Remap { from, to, len } => {
                self.queue
                    .push([Kind::Unmap as u64, from, from.wrapping_add(len)]);
                self.queue
                    .push([Kind::Unmap as u64, to, to.wrapping_add(len)]);
            }
            Message::Fork => self.queue.push([Kind::Protection as u64, 0, 0]),
            Message::Other => self.queue.push([Kind::Clear as u64, 0, 0]),
        }
    }

    fn wake_teller(&self) {
        if let Some(teller) = self.teller.get() {
            teller.unpark();
        }
    }

    /// Runs on the teller.
    fn tell(&self) {
        let mm = current_ref();
        loop {
            loop {
                // Check this before each entry, because entries may never stop arriving.
                if let Some(lost) = self.queue.untold() {
                    drop(mm.invalidate(VaRange::ALL, Event::Clear));
                    self.queue.tell(lost);
                }
                let Some([kind, start, end]) = self.queue.peek() else {
                    break;
                };
                let range = VaRange::covering(Va::new(start), end.wrapping_sub(start))
                    .unwrap_or(VaRange::ALL);
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
            thread::park();
        }
    }
}

impl Uffd {
    /// Unregisters the parts of `range` that no other armed range covers.
    fn disarm(&self, range: VaRange) {
        let mut armed = self.inner.armed();
        if let Some(at) = armed.iter().position(|other| *other == range) {
            armed.swap_remove(at);
        }
        let mut from = range.start();
        loop {
            let rest = VaRange::new(from, range.end().unwrap_or(Va::new(u64::MAX))).ok();
            let Some(rest) = rest else { return };
            // The first part of the rest that another armed range covers.
            let next = armed
                .iter()
                .filter_map(|other| other.intersection(rest))
                .min();
            let until = next.map_or(rest.end(), |next| Some(next.start()));
            if let Some(free) = until.and_then(|until| VaRange::new(from, until).ok()) {
                // If the memory was unmapped meanwhile, it is not registered any more, and the call
                // fails harmlessly.
                drop(
                    self.vault()
                        .run(move |reader| sys::unregister(&reader.descriptors.uffd, free)),
                );
            }
            match next.and_then(VaRange::end) {
                Some(end) => from = end,
                None => return,
            }
        }
    }
}

/// The event of a queue entry.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Clear = 0,
    Unmap = 1,
    Protection = 2,
}

impl Reader {
    /// Opens the descriptors and starts the reader. Runs in the vault.
    fn start(inner: Arc<Inner>) -> Result<Self, Error> {
        let uffd = Userfaultfd::open().map_err(|error| missing(&error))?;
        let nudge = wait::event_fd().map_err(|error| kernel_error("eventfd", error))?;
        let descriptors = Arc::new(Descriptors { uffd, nudge });
        let (shared, own) = (Arc::clone(&inner), Arc::clone(&descriptors));
        let read = move || shared.read(&own);
        let thread = Thread::spawn(c"mmu-uffd-read", read)
            .map_err(|error| kernel_error("start of a thread", error))?;
        Ok(Self {
            inner,
            descriptors,
            thread: Some(thread),
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let Descriptors { uffd, nudge } = &*self.descriptors;
        self.inner.stop.store(true, Ordering::Relaxed);
        // Close the userfaultfd before the reader ends. The reader may need the allocator's lock in
        // order to end, and the holder of that lock could be waiting for the reader. Once the
        // userfaultfd is closed, no thread waits for it.
        uffd.close();
        wait::wake(nudge.as_fd());
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

fn kernel_error(call: &'static str, source: io::Error) -> Error {
    Error::Kernel {
        call,
        tid: None,
        source,
    }
}

impl Drop for Uffd {
    fn drop(&mut self) {
        let (vault, teller) = (self.vault.take(), self.teller.take());
        if self.inner.is_inherited() {
            // The threads exist only in the parent.
            if let Some(vault) = vault {
                vault.abandon();
            }
            return;
        }
        // The teller ends before the reader, because a memory call in a callback waits for the
        // reader.
        self.inner.stop_telling.store(true, Ordering::Relaxed);
        self.inner.wake_teller();
        // If a callback dropped the last handle, this code runs on the teller itself.
        match teller {
            Some(teller) if teller.is_current() => teller.detach(),
            Some(teller) => teller.join(),
            None => {}
        }
        drop(vault);
    }
}

impl fmt::Debug for Uffd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uffd")
            .field("lost", &self.lost())
            .finish_non_exhaustive()
    }
}

/// An armed range. Dropping this value disarms the range. If the value also holds the last handle
/// of the source, dropping it stops the source.
#[derive(Debug)]
#[must_use = "the range is disarmed when this is dropped"]
pub struct Armed {
    uffd: Arc<Uffd>,
    range: VaRange,
}

impl Armed {
    /// Returns the armed pages.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.range
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        // In the child of a fork the descriptor still acts on the parent's memory.
        if !self.uffd.inner.is_inherited() {
            self.uffd.disarm(self.range);
        }
    }
}
