//! Every change of a translation of this process, by any process and by the kernel itself: the
//! kernel's own MMU notifier.
//!
//! ```text
//!   any process, or the kernel itself             this process
//!   ---------------------------------             ------------
//!   munmap, reclaim, copy on write, ...
//!     1. calls the MMU notifiers
//!          tracepoint, BPF program:
//!          generation + 1  ──────────────────────> at each use: has the generation changed?
//!          range ── ring ────────────────────────>   settle: takes the ranges out of the ring and
//!     2. changes the page tables                     runs the callbacks, which drop the entries
//! ```
//!
//! Creating a KVM virtual machine registers an MMU notifier on the calling process. From then on
//! every invalidation of its page tables passes the tracepoint `kvm:kvm_unmap_hva_range` with its
//! start and end *before* the tables change. A small BPF program there counts a generation, in
//! memory that this process has mapped, and writes the range to a ring. The machine itself is never
//! run. Nothing is patched, and no change bypasses it: changes by other processes, reclaim,
//! truncation, copy on write and `io_uring` all reach the tracepoint.
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
//!     let seq = armed.read_begin()?; // Whatever was changing has changed, and subscribers know.
//!     insert(range, translate(range));
//!     if !armed.read_retry(seq) {
//!         break; // Nothing has begun to change meanwhile. What begins later will take the entry out.
//!     }
//!     remove(range);
//! }
//!
//! // Use it.
//! let settled = kernel.settle()?; // The callbacks for all that has happened have run.
//! if let Some(translation) = lookup(range) {
//!     use_it(translation);
//!     assert!(kernel.is_current(settled), "nothing has begun to change while it was used");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A cache that has no subscriber, or asks under a lock of its own, keeps a [`Watch`](crate::Watch)
//! in each entry instead:
//!
//! ```no_run
//! # use mmu_notifier::{Va, VaRange};
//! # use mmu_source::kernel::Kernel;
//! # let (buffer, translate) = (4096_u64, |_: VaRange| 1);
//! let kernel = Kernel::start()?;
//! let range = VaRange::covering(Va::new(buffer), 1 << 20)?;
//! let watch = kernel.watch(range)?; // Nothing is under way when it returns.
//! let translation = translate(range);
//!
//! // At each use.
//! let can_be_used = watch.is_valid(); // No callback, no lock, no allocation.
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Why this is sound
//! * **A hit.** The generation is counted before the page tables change. So if an entry is found
//!   after [`settle`](Kernel::settle), and [`is_current`](Kernel::is_current) still holds after the
//!   use, no change of an armed range began between the two, and all earlier ones had been told.
//! * **A fill.** The tracepoint tells the *start* of a change. A translation made between the start
//!   and the change itself would be the old one with the new generation: no counter of starts can
//!   help. [`read_begin`](Armed::read_begin) therefore waits, if there was any event since the last
//!   wait, until every change under way is over: some two microseconds. `kernel/wait.rs` has the
//!   argument, with a picture.
//! * **Arming.** [`arm`](Kernel::arm) enters the range into the filter and then waits in the same
//!   way. When it has returned, no change is under way that the filter has let pass.
//!
//! It tells nothing about a device that still uses a translation. That is what the callbacks are
//! for, and they come after the start of the change, not in it: the change does not wait.
//!
//! # What a callback may do
//! Callbacks run in the thread that calls [`settle`](Kernel::settle), [`drain`](Kernel::drain) or
//! [`read_begin`](Armed::read_begin), or in the source's own. They may allocate, lock, map and
//! unmap, arm and disarm. They must not wait for another thread that may be draining; draining
//! inside of a callback returns at once. Dropping the source or what is armed never waits for a
//! callback.
//!
//! # Signal handlers
//! [`Watch::is_valid`](crate::Watch::is_valid), [`is_current`](Kernel::is_current) and
//! [`settle`](Kernel::settle) may be called in a signal handler. One that has interrupted the
//! source itself gets false, or [`Error::InCallback`]. Nothing else may.
//!
//! # Descriptors
//! The source's descriptors are in a table of their own that no call of the program reaches:
//! `close_range`, `closefrom` and `dup2` do not harm it, and children do not inherit them. The
//! limit of descriptors (`RLIMIT_NOFILE`) holds in that table as well: some twenty are needed to
//! start, and what is opened later has a number below 8. Threads of the source's that run callbacks
//! have the program's table.
//!
//! # Forks
//! The virtual machine stays the parent's. In the child of a fork an inherited handle is blind: it
//! knows that ([`is_inherited`](Kernel::is_inherited)), is never current, and answers
//! [`Error::AfterFork`]. The child starts its own. When its last inherited handle is dropped,
//! nothing of the parent's source is left in it.

mod armed;
mod asm;
pub mod broker;
mod btf;
mod busy;
mod filter;
mod intake;
mod layout;
mod listen;
mod machine;
mod missing;
mod owner;
mod probe;
mod program;
mod programs;
mod resolver;
mod ring;
mod start;
pub(crate) mod sys;
mod tell;
#[cfg(test)]
mod tests;
mod wait;
mod watching;

pub use armed::{Armed, ReadSeq};
pub use probe::{Features, probe, probe_all};
pub(crate) use watching::Watching;

use crate::Error;
use crate::vault::Vault;
use intake::Intake;
use layout::header;
use machine::Machines;
use mmu_notifier::VaRange;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::Thread;
use sys::{ProgressPage, Shared};
use wait::Waits;

/// The source, while any handle of it is alive.
pub struct Kernel {
    inner: Arc<Inner>,
    /// `None` once this is being dropped.
    vault: Option<Vault<Machines>>,
}

/// What the threads of the source share.
struct Inner {
    /// Nonzero and equal to `alive`, a word in the page that forks wipe, unless this is the child
    /// of a fork.
    id: u64,
    alive: &'static AtomicU64,
    header: Shared,
    tables: filter::Tables,
    progress: ProgressPage,
    intake: Mutex<Intake>,
    /// Held while records are handed on, callbacks included.
    handing: Mutex<()>,
    waits: Waits,
    stop: AtomicBool,
    teller: OnceLock<Thread>,
    /// How often the program was skipped.
    missed: AtomicU64,
    /// The source's threads have done what they put off at the start.
    has_begun: AtomicBool,
}

/// A generation up to which subscribers have been told of every change: what [`Kernel::settle`]
/// returned.
///
/// A number that nothing has been told of is not one:
/// ```compile_fail,E0308
/// # let kernel = mmu_source::kernel::Kernel::start().unwrap();
/// let is_current = kernel.is_current(kernel.generation());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "what is used has to be checked with `is_current` if it may change meanwhile"]
pub struct Settled(u64);

/// What a call of [`Kernel::drain`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// How many ranges it handed on.
    pub ranges: usize,
    /// Whether records had been lost, so that everything was invalidated.
    pub lost: bool,
    /// Whether the caller was a callback that is itself being drained, or the child of a fork: then
    /// nothing was done.
    pub refused: bool,
}

impl Drained {
    const REFUSED: Self = Self {
        ranges: 0,
        lost: false,
        refused: true,
    };
}

impl Kernel {
    /// Returns the number of changes of armed ranges that have begun, and one: for statistics.
    ///
    /// It counts only what touches an armed range (and, since the filter is coarse, a few that do
    /// not), so that an allocator's traffic makes no client drain.
    #[must_use]
    #[inline]
    pub fn generation(&self) -> u64 {
        self.inner.generation()
    }

    /// Tells whether no change of an armed range has begun since the source was settled. False for
    /// ever in the child of a fork.
    #[must_use]
    #[inline]
    pub fn is_current(&self, settled: Settled) -> bool {
        // ORDER(source-generation): what the caller has read through its translation comes before
        // the look at the generation.
        fence(Ordering::Acquire);
        self.generation() == settled.0 && self.inner.handled() >= settled.0
    }

    /// Tells whether subscribers have been told of every change that has begun: then
    /// [`settle`](Self::settle) has nothing to do.
    #[must_use]
    #[inline]
    pub fn is_settled(&self) -> bool {
        self.inner.is_caught_up()
    }

    /// Runs the callbacks of every change that has begun before the call, or waits for them.
    /// Two loads and a comparison if there is nothing to tell.
    ///
    /// # Blocking
    /// While callbacks run, here or in another thread that drains.
    /// # Errors
    /// [`Error::AfterFork`] in the child of a fork. [`Error::InCallback`] in a callback that the
    /// source itself runs, and in a signal handler that has interrupted the source.
    #[inline]
    pub fn settle(&self) -> Result<Settled, Error> {
        let generation = self.generation();
        if self.inner.handled() >= generation {
            return Ok(Settled(generation));
        }
        self.settle_now(generation)
    }

    #[cold]
    fn settle_now(&self, generation: u64) -> Result<Settled, Error> {
        if self.is_inherited() {
            return Err(Error::AfterFork { source: "kernel" });
        }
        if busy::is_inside() {
            return Err(Error::InCallback { source: "kernel" });
        }
        self.inner.settle(generation);
        // A callback that runs here may fork, and this be the child.
        if self.is_inherited() {
            Err(Error::AfterFork { source: "kernel" })
        } else {
            Ok(Settled(generation))
        }
    }

    /// Hands the ranges that are waiting to [`Mm::invalidate`](mmu_notifier::Mm::invalidate) of
    /// [`current`](crate::current), in the order of the ring.
    ///
    /// # Blocking
    /// While callbacks run, here or in another thread that drains. What changes meanwhile is left
    /// for the next call.
    pub fn drain(&self) -> Drained {
        if self.is_inherited() || busy::is_inside() {
            return Drained::REFUSED;
        }
        let target = self.generation();
        let mut drained = Drained {
            ranges: 0,
            lost: false,
            refused: false,
        };
        crate::wait::until(|| {
            if let Some(turn) = self.inner.hand_on(target) {
                drained.ranges += turn.ranges;
                drained.lost |= turn.lost;
                return true;
            }
            self.inner.handled() >= target
        });
        drained
    }

    /// Returns how often records were lost: the ring or the queue was full, or the kernel skipped
    /// the program (`missed` in the `Debug` output).
    ///
    /// It counts records, not invalidations: everything is invalidated once for all records that
    /// were lost since the last time.
    #[must_use]
    pub fn lost(&self) -> u64 {
        let overflows = self
            .inner
            .with_intake(|intake, _| intake.overflows)
            .unwrap_or(0);
        self.inner.header.u64(header::LOST).load(Ordering::Relaxed)
            + self.inner.missed.load(Ordering::Relaxed)
            + overflows
    }

    /// Tells whether this is the child of a fork and the source its parent's.
    /// [`start`](Self::start) makes its own.
    #[must_use]
    pub fn is_inherited(&self) -> bool {
        self.inner.is_inherited()
    }

    /// Returns how often a thread has waited for changes under way, and for how many of these a
    /// virtual machine was made.
    #[must_use]
    pub fn waits(&self) -> (u64, u64) {
        self.inner.waits.counts()
    }

    /// Waits until the source's own threads have done what they put off at the start: until then
    /// they read files, and map and unmap memory.
    ///
    /// For a program in which other code is about to overwrite `munmap` and the like, as Open MPI
    /// and libfabric do: a thread that is inside of such a function meanwhile crashes.
    ///
    /// # Blocking
    /// For some milliseconds. Returns at once in the child of a fork.
    pub fn wait_for_threads(&self) {
        // ORDER(source-begun): Acquire, for no data. Partner: the store in `listen`.
        let has_begun = || self.inner.has_begun.load(Ordering::Acquire);
        crate::wait::until(|| has_begun() || self.is_inherited());
    }

    /// Has changes of `range` counted and told until the returned value is dropped. When it
    /// returns, no change that began before is still under way, and every later one is counted
    /// before it happens.
    ///
    /// Ranges may overlap, and be armed several times.
    ///
    /// # Blocking
    /// If there was any event since the last wait of any thread, for the changes under way, as
    /// [`read_begin`](Armed::read_begin) does; for no callback.
    /// # Errors
    /// [`Error::AfterFork`] in the child of a fork; [`Error::InCallback`] in a signal handler that
    /// has interrupted such a wait; [`Error::Kernel`] if no virtual machine can be made, such as
    /// `EMFILE` if the program has lowered its limit of descriptors (`RLIMIT_NOFILE`) below 8: the
    /// limit holds in the source's own table, too.
    pub fn arm(self: &Arc<Self>, range: VaRange) -> Result<Armed, Error> {
        let armed = Armed::enter(self, range)?;
        self.wait()?;
        Ok(armed)
    }

    /// Waits until every change that had begun before the call is over.
    fn wait(&self) -> Result<(), Error> {
        self.inner.waits.wait(&self.inner.header, self.vault())
    }

    /// The same for ranges that were armed before `settled` was made.
    fn wait_for(&self, settled: Settled) -> Result<(), Error> {
        self.inner
            .waits
            .wait_for(settled.0, &self.inner.header, self.vault())
    }

    fn vault(&self) -> &Vault<Machines> {
        self.vault.as_ref().expect("it is there until the drop")
    }
}

impl Inner {
    #[inline]
    fn is_inherited(&self) -> bool {
        self.alive.load(Ordering::Relaxed) != self.id
    }

    #[inline]
    fn generation(&self) -> u64 {
        // ORDER(source-generation): Acquire: what the caller reads next is not read before.
        // Partner: the program's addition, a full barrier, before the page tables change.
        self.header.u64(header::GENERATION).load(Ordering::Acquire)
    }

    fn wake_teller(&self) {
        if let Some(teller) = self.teller.get() {
            teller.unpark();
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

impl Drop for Kernel {
    /// Closes all descriptors, and waits for that, but for no callback: the thread that runs one
    /// ends after it.
    fn drop(&mut self) {
        let vault = self.vault.take();
        if self.inner.is_inherited() {
            // The vault's thread is the parent's.
            if let Some(vault) = vault {
                vault.abandon();
            }
            self.inner.leave_to_parent();
            return;
        }
        // ORDER(source-stop): Release, for no data: the threads look at it when they are woken.
        // Partner: the loads there.
        self.inner.stop.store(true, Ordering::Release);
        self.inner.wake_teller();
        drop(vault);
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (waits, machines) = if self.is_inherited() {
            (0, 0)
        } else {
            self.waits()
        };
        f.debug_struct("Kernel")
            .field("generation", &self.generation())
            .field("handled", &self.inner.handled())
            .field("lost", &self.lost())
            .field("missed", &self.inner.missed.load(Ordering::Relaxed))
            .field("waits", &waits)
            .field("machines", &machines)
            .finish_non_exhaustive()
    }
}
