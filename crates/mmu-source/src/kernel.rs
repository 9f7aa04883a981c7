//! Everything that changes a translation of this process, whoever does it: the kernel's own MMU notifier.
//!
//! Creating a KVM virtual machine registers an MMU notifier on the calling process. From then on every invalidation of its
//! page tables passes the tracepoint `kvm:kvm_unmap_hva_range` with its start and end *before* the tables change. A small
//! BPF program there counts a generation, in memory that this process has mapped, and writes the range to a ring. The machine
//! itself is never run. Nothing is patched, and nothing can be evaded: other processes, reclaim, truncation, copy on
//! write and `io_uring` all come by.
//!
//! ```no_run
//! use mmu_notifier::{Va, VaRange};
//! use mmu_source::kernel::Kernel;
//!
//! let kernel = Kernel::start()?;
//! # let (buffer, translate, insert, remove, lookup, use_it) = (4096_u64, |_: VaRange| 1, |_: VaRange, _: i32| (), |_: VaRange| (), |_: VaRange| Some(1), |_: i32| ());
//! let range = VaRange::covering(Va::new(buffer), 1 << 20)?;
//! let armed = kernel.arm(range)?; // Until it is dropped, changes of these pages are counted and told.
//!
//! // Fill the cache.
//! loop {
//!     let seq = kernel.read_begin()?; // Whatever was changing has changed, and subscribers know.
//!     insert(range, translate(range));
//!     if !kernel.read_retry(seq) {
//!         break; // Nothing has begun to change meanwhile. What begins later will take the entry out.
//!     }
//!     remove(range);
//! }
//!
//! // Use it.
//! let generation = kernel.settle()?; // The callbacks for all that has happened have run.
//! if let Some(translation) = lookup(range) {
//!     use_it(translation);
//!     assert!(kernel.is_current(generation), "nothing has begun to change while it was used");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Why this is sound
//! * **A hit.** The generation is counted before the page tables change. So if an entry is found after [`settle`](Kernel::settle),
//!   and [`is_current`](Kernel::is_current) still holds after the use, no change of an armed range began between the two, and all
//!   earlier ones had been told.
//! * **A fill.** The tracepoint tells the *start* of a change. A translation made between the start and the change
//!   itself would be the old one with the new generation: no counter of starts can help. [`read_begin`](Kernel::read_begin)
//!   therefore waits, if there has been any event at all since the last time, until every change under way is over. It
//!   does so by registering one more notifier (another virtual machine, closed at once): registration takes every lock
//!   under which anybody changes this address space (`mm_take_all_locks`).
//! * **Arming.** [`arm`](Kernel::arm) enters the range into the filter and then waits in the same way. When it has returned, no change
//!   is under way that the filter has let pass.
//!
//! It tells nothing about a device that goes on using a translation. That is what the callbacks are for, and they come after
//! the start of the change, not in it: the change does not wait.
//!
//! # What a callback may do
//! Callbacks run in the thread that calls [`settle`](Kernel::settle), [`drain`](Kernel::drain) or [`read_begin`](Kernel::read_begin), or
//! in the source's own. They may allocate, lock, map and unmap, arm and disarm. They must not wait for another thread that
//! may be draining; draining inside of a callback returns at once.
//!
//! # Forks
//! The virtual machine stays the parent's. In the child of a fork an inherited handle is blind: it knows that, is never
//! current, and answers [`Error::AfterFork`]. The child starts its own.

mod drain;
mod filter;
mod probe;
mod program;
mod ring;
mod start;
pub(crate) mod sys;
#[cfg(test)]
mod tests;

pub use probe::{Features, probe};

use crate::Error;
use drain::{Drainer, Words};
use mmu_notifier::VaRange;
use program::header;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::JoinHandle;
use sys::Shared;

/// The source, while any handle of it is alive.
pub struct Kernel {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

/// What the background thread shares.
struct Inner {
    /// Nonzero and equal to `alive`, a word in the page that forks wipe, unless this is the child of a fork.
    id: u64,
    alive: &'static AtomicU64,
    header: Shared,
    tables: filter::Tables,
    drainer: Mutex<Drainer>,
    ring: OwnedFd,
    stop: OwnedFd,
    handled: AtomicU64,
    /// All of the first so many events are over.
    quiet: AtomicU64,
    /// `None` in a rehearsal.
    machine: Option<Machine>,
    program: OwnedFd,
}

/// What makes the kernel tell.
struct Machine {
    kvm: OwnedFd,
    _vm: OwnedFd,
    _attached: OwnedFd,
}

/// A generation at which nothing was changing: what [`Kernel::read_begin`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a fill that is not checked with `read_retry` may be stale"]
#[doc(alias = "mmu_interval_read_begin")]
pub struct ReadSeq(u64);

/// What a call of [`Kernel::drain`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// How many ranges it handed on.
    pub ranges: usize,
    /// Whether records had been lost, so that everything was invalidated.
    pub lost: bool,
    /// Whether the caller was a callback that is itself being drained, or the child of a fork: then nothing was done.
    pub refused: bool,
}

impl Drained {
    const REFUSED: Self = Self { ranges: 0, lost: false, refused: true };
}

impl Kernel {
    /// Returns the number of changes of armed ranges that have begun: one load.
    ///
    /// It counts only what touches an armed range (and, since the filter is coarse, a few that do not), so that an allocator's
    /// traffic makes no client drain. In the child of a fork it is the parent's and says nothing: see
    /// [`is_current`](Self::is_current).
    #[must_use]
    #[inline]
    pub fn generation(&self) -> u64 {
        // ORDER(source-generation): Acquire: what the caller reads next is not read before. Partner: the program's addition, a full
        // barrier, before the page tables change.
        self.inner.header.u64(header::GENERATION).load(Ordering::Acquire)
    }

    /// Tells whether no change of an armed range has begun since the generation was `generation`. False for ever in the child
    /// of a fork.
    #[must_use]
    #[inline]
    pub fn is_current(&self, generation: u64) -> bool {
        // ORDER(source-generation): what the caller has read through its translation comes before the look at the generation.
        fence(Ordering::Acquire);
        self.generation() == generation && !self.inner.is_inherited()
    }

    /// Tells whether subscribers have been told of every change up to `generation`.
    #[must_use]
    #[inline]
    pub fn is_handled(&self, generation: u64) -> bool {
        self.inner.handled() >= generation
    }

    /// Sees to it that subscribers have been told of every change that has begun before the call, and returns the
    /// generation of that moment. Two loads and two comparisons if there is nothing to tell.
    ///
    /// # Blocking
    /// While callbacks run, here or in another thread that drains.
    /// # Errors
    /// [`Error::AfterFork`] in the child of a fork. [`Error::InCallback`] in a callback that the source itself runs.
    #[inline]
    pub fn settle(&self) -> Result<u64, Error> {
        let generation = self.generation();
        if self.is_handled(generation) && !self.inner.is_inherited() {
            return Ok(generation);
        }
        self.inner.settle(generation)?;
        Ok(generation)
    }

    /// Begins to fill a cache: settles, and waits until every change under way is over.
    ///
    /// # Blocking
    /// As [`settle`](Self::settle); if there was any event since the last call, also for the changes under way and for the making of a
    /// virtual machine, and for its end: from some hundred microseconds to some milliseconds.
    /// # Errors
    /// As [`settle`](Self::settle); [`Error::Kernel`] if no virtual machine can be made, as with too many open files.
    /// # Source
    /// `mmu_interval_read_begin`.
    pub fn read_begin(&self) -> Result<ReadSeq, Error> {
        let generation = self.settle()?;
        self.inner.quiesce()?;
        Ok(ReadSeq(generation))
    }

    /// Tells whether what was translated since `seq` must be thrown away.
    ///
    /// # Source
    /// `mmu_interval_read_retry`.
    #[must_use]
    #[inline]
    pub fn read_retry(&self, seq: ReadSeq) -> bool {
        !self.is_current(seq.0)
    }

    /// Hands the ranges that are waiting to [`Mm::invalidate`](mmu_notifier::Mm::invalidate) of [`current`](crate::current), in
    /// the order of the ring.
    ///
    /// # Blocking
    /// While callbacks run, here or in another thread that drains. What changes meanwhile is left for the next call.
    pub fn drain(&self) -> Drained {
        if self.inner.is_inherited() || drain::is_draining() {
            return Drained::REFUSED;
        }
        let target = self.generation();
        let mut drained = Drained { ranges: 0, lost: false, refused: false };
        sys::until(|| match self.inner.try_drain(target) {
            Some((ranges, lost)) => {
                drained = Drained { ranges, lost, ..drained };
                true
            }
            None => self.is_handled(target),
        });
        drained
    }

    /// Returns how many records were lost because the ring was full. Each time everything was invalidated.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.inner.header.u64(header::LOST).load(Ordering::Relaxed)
    }

    /// Has changes of `range` counted and told until the returned value is dropped. When it returns, no change
    /// that began before is still under way, and every later one is counted before it happens.
    ///
    /// Ranges may overlap, and be armed several times.
    ///
    /// # Blocking
    /// As [`read_begin`](Self::read_begin), without the callbacks.
    /// # Errors
    /// [`Error::AfterFork`] in the child of a fork; [`Error::Kernel`] if no virtual machine can be made.
    pub fn arm(self: &Arc<Self>, range: VaRange) -> Result<Armed, Error> {
        if self.inner.is_inherited() {
            return Err(Error::AfterFork { source: "kernel" });
        }
        let armed = Armed { kernel: Arc::clone(self), range, level: filter::level(range) };
        let words = &self.inner.header;
        match armed.level {
            Some(level) => {
                filter::add(&self.inner.tables, range, level);
                words.u64(header::RANGES + 8 * level).fetch_add(1, Ordering::Relaxed);
            }
            None => drop(words.u64(header::WIDE).fetch_add(1, Ordering::Relaxed)),
        }
        words.u64(header::ARMED).fetch_add(1, Ordering::Relaxed);
        // ORDER(source-arm): full fence between the filter and the look at the count of events in `quiesce`. Partner: the program, which
        // counts the event (a full barrier) and then looks at the filter. Weaker, an event could be in neither.
        fence(Ordering::SeqCst);
        self.inner.quiesce()?;
        Ok(armed)
    }
}

impl Inner {
    #[inline]
    fn is_inherited(&self) -> bool {
        self.alive.load(Ordering::Relaxed) != self.id
    }

    #[inline]
    fn handled(&self) -> u64 {
        // ORDER(source-handled): Acquire, for what the callbacks did. Partner: the store in `Drainer::publish`.
        self.handled.load(Ordering::Acquire)
    }

    fn words(&self) -> Words<'_> {
        Words {
            generation: self.header.u64(header::GENERATION),
            lost: self.header.u64(header::LOST),
            handled: &self.handled,
        }
    }

    #[cold]
    fn settle(&self, generation: u64) -> Result<(), Error> {
        if self.is_inherited() {
            return Err(Error::AfterFork { source: "kernel" });
        }
        if drain::is_draining() {
            return Err(Error::InCallback { source: "kernel" });
        }
        // Once more if the program has counted the generation on another processor and is about to write its record. Nobody
        // waits for the lock itself: whoever has it goes on, and may have handed on what is asked for here long before.
        sys::until(|| {
            self.try_drain(generation);
            self.handled() >= generation
        });
        Ok(())
    }

    /// Hands on what is there, up to a generation, unless another thread does.
    fn try_drain(&self, target: u64) -> Option<(usize, bool)> {
        match self.drainer.try_lock() {
            Ok(mut drainer) => Some(drainer.run(self.words(), target)),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner().run(self.words(), target)),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Waits until every change that had begun before the call is over.
    fn quiesce(&self) -> Result<(), Error> {
        let Some(machine) = &self.machine else { return Ok(()) };
        // ORDER(source-arm): partner of the program's count of events; behind the fence in `arm`, or behind the generation's Acquire.
        let seen = self.header.u64(header::SEEN).load(Ordering::Acquire);
        // ORDER(source-quiet): Acquire: those changes are over for this thread too. Partner: the addition below.
        if self.quiet.load(Ordering::Acquire) >= seen {
            return Ok(());
        }
        let vm = sys::create_vm(machine.kvm.as_fd()).map_err(|error| kernel_error("KVM_CREATE_VM", error))?;
        // ORDER(source-quiet): Release, behind the call. Partner: the load above.
        self.quiet.fetch_max(seen, Ordering::AcqRel);
        drop(vm);
        Ok(())
    }

    /// The background thread: drains when the ring fills and nobody looks.
    fn serve(&self) {
        while sys::wait(self.ring.as_fd(), self.stop.as_fd()) {
            // Whoever waits for this range drains by itself, and at once. Were this thread as quick, the two would fight for the lock,
            // and each event would wake it.
            sys::nap();
            // ORDER(source-generation): Acquire, as everybody's look; what comes after it wakes this thread again.
            let target = self.header.u64(header::GENERATION).load(Ordering::Acquire);
            // If another thread has the lock, that one empties the ring, or this one does after the next nap.
            self.try_drain(target);
        }
    }
}

fn kernel_error(call: &'static str, source: io::Error) -> Error {
    Error::Kernel { call, tid: None, source }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if self.inner.is_inherited() {
            // The thread is the parent's. There is nothing here to join or to detach.
            std::mem::forget(thread);
            return;
        }
        sys::wake(self.inner.stop.as_fd());
        // A callback that drops the last handle runs on that thread.
        if thread.thread().id() != std::thread::current().id() && !drain::is_draining() {
            drop(thread.join());
        }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("generation", &self.generation())
            .field("handled", &self.inner.handled())
            .field("lost", &self.lost())
            .finish_non_exhaustive()
    }
}

/// An armed range. Dropping it disarms.
#[derive(Debug)]
#[must_use = "the range is disarmed when this is dropped"]
pub struct Armed {
    kernel: Arc<Kernel>,
    range: VaRange,
    level: Option<usize>,
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
        let inner = &self.kernel.inner;
        if inner.is_inherited() {
            // The filter is the parent's, and the parent is still armed.
            return;
        }
        inner.header.u64(header::ARMED).fetch_sub(1, Ordering::Relaxed);
        match self.level {
            Some(level) => {
                inner.header.u64(header::RANGES + 8 * level).fetch_sub(1, Ordering::Relaxed);
                filter::remove(&inner.tables, self.range, level);
            }
            None => drop(inner.header.u64(header::WIDE).fetch_sub(1, Ordering::Relaxed)),
        }
    }
}
