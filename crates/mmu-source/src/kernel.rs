//! This source reports every change of an armed range of this process, whichever process or part
//! of the kernel makes the change. The source uses KVM's MMU notifier.
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
//! Creating a KVM virtual machine registers an MMU notifier on the calling process. From then on,
//! every invalidation of the process's page tables passes the tracepoint `kvm:kvm_unmap_hva_range`,
//! with its start and end, *before* the page tables change. If the invalidation touches an armed
//! range, a small BPF program at the tracepoint increments a generation in memory that this process
//! has mapped, and writes the invalidated range to a ring. The virtual machine is never run.
//! Nothing is patched, and no change bypasses the tracepoint: changes by other processes, reclaim,
//! truncation, copy on write and `io_uring` all reach it.
//!
//! ```no_run
//! use mmu_notifier::{Va, VaRange};
//! use mmu_source::kernel::Kernel;
//!
//! let kernel = Kernel::start()?;
//! # let (buffer, translate, insert, remove, lookup, use_it) = (4096_u64, |_: VaRange| 1, |_: VaRange, _: i32| (), |_: VaRange| (), |_: VaRange| Some(1), |_: i32| ());
//! let range = VaRange::covering(Va::new(buffer), 1 << 20)?;
//! let armed = kernel.arm(range)?; // Until dropped, changes of these pages are counted and reported.
//!
//! // Fill the cache.
//! loop {
//!     let seq = armed.read_begin()?; // No change is under way, and subscribers know of all earlier ones.
//!     insert(range, translate(range));
//!     if !armed.read_retry(seq) {
//!         break; // No change has begun meanwhile. A later change will remove the entry.
//!     }
//!     remove(range);
//! }
//!
//! // Use it.
//! let settled = kernel.settle()?; // The callbacks of all changes so far have run.
//! if let Some(translation) = lookup(range) {
//!     use_it(translation);
//!     assert!(kernel.is_current(settled), "no change began during the use");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A cache without a subscriber, or a cache that must check an entry under its own lock, keeps a
//! [`Watch`](crate::Watch) in each entry instead:
//!
//! ```no_run
//! # use mmu_notifier::{Va, VaRange};
//! # use mmu_source::kernel::Kernel;
//! # let (buffer, translate) = (4096_u64, |_: VaRange| 1);
//! let kernel = Kernel::start()?;
//! let range = VaRange::covering(Va::new(buffer), 1 << 20)?;
//! let watch = kernel.watch(range)?; // No change is under way when it returns.
//! let translation = translate(range);
//!
//! // At each use.
//! let can_be_used = watch.is_valid(); // No callback, no lock, no allocation.
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Why this is sound
//! * **A hit.** The BPF program increments the generation before the kernel changes the page
//!   tables. Suppose a client finds an entry after [`settle`](Kernel::settle), and
//!   [`is_current`](Kernel::is_current) still holds after the use. Then no change of an armed range
//!   began between the two calls, and subscribers knew of all earlier changes.
//! * **A fill.** The tracepoint marks the *start* of a change. If a client translates between the
//!   start and the change itself, it gets the old translation with the new generation, and no
//!   counter of starts can show that. So [`read_begin`](Armed::read_begin) waits until every change
//!   under way is over, if an armed range has changed since the last wait. The wait takes some
//!   two microseconds. `kernel/wait.rs` has the argument, with a picture.
//! * **Arming.** [`arm`](Kernel::arm) adds the range to the filter and then waits in the same way.
//!   When it returns, no change is under way that passed the filter before the range was in it.
//!
//! The generation says nothing about a device that still uses a translation. The callbacks serve
//! that purpose. The callbacks run after the start of the change, and the change does not wait for
//! them.
//!
//! # What a callback may do
//! A callback runs on the thread that calls [`settle`](Kernel::settle), [`drain`](Kernel::drain) or
//! [`read_begin`](Armed::read_begin), or on the source's own thread. A callback may allocate, lock,
//! map, unmap, arm and disarm. A callback must not wait for another thread that may be draining,
//! because that thread may wait for the callback. Draining inside a callback returns at once.
//! Dropping the source or an armed range never waits for a callback.
//!
//! # Signal handlers
//! A signal handler may call [`Watch::is_valid`](crate::Watch::is_valid),
//! [`is_current`](Kernel::is_current) and [`is_settled`](Kernel::is_settled), and nothing else of
//! this module. If the handler has interrupted the source itself, `is_valid` may return false
//! although the range has not changed.
//!
//! A handler must not call [`settle`](Kernel::settle), because `settle` may run callbacks: the
//! handler may have interrupted code that holds a lock of the address space or of a subscriber, or
//! code that begins a read section. So a cache that handlers use keeps a `Watch` in each entry.
//!
//! # Descriptors
//! The source's descriptors are in a separate descriptor table, which no system call of the program
//! reaches: `close_range`, `closefrom` and `dup2` cannot close them, and children do not inherit
//! them. The limit `RLIMIT_NOFILE` also applies to that table. The start needs some twenty
//! descriptors; the descriptors that the source opens later are below 8. The source's own thread
//! that runs callbacks uses the program's table.
//!
//! # Forks
//! The virtual machine stays attached to the parent's address space. So in the child of a fork an
//! inherited handle sees no change. The handle detects the fork
//! ([`is_inherited`](Kernel::is_inherited)): [`is_current`](Kernel::is_current) is always false,
//! and `settle`, `arm`, `watch` and `read_begin` return [`Error::AfterFork`]. The child starts a
//! source of its own. When the child drops its last inherited handle, it unmaps the memory that the
//! parent's source shares with the BPF program.

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
#[doc(hidden)]
pub use missing::BROKER;
pub use probe::{Features, probe, probe_all};
#[doc(hidden)]
pub use tell::Counts;
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

/// The source, which runs while a handle exists.
pub struct Kernel {
    inner: Arc<Inner>,
    /// `None` once the source is being dropped.
    vault: Option<Vault<Machines>>,
}

/// State that the threads of the source share.
struct Inner {
    /// Nonzero, and equal to `alive` except in the child of a fork: `alive` lies in a page that the
    /// kernel zeroes at a fork.
    id: u64,
    alive: &'static AtomicU64,
    header: Shared,
    tables: filter::Tables,
    progress: ProgressPage,
    intake: Mutex<Intake>,
    /// A thread holds this lock while it passes records to subscribers, also during their
    /// callbacks.
    handing: Mutex<()>,
    waits: Waits,
    stop: AtomicBool,
    teller: OnceLock<Thread>,
    /// How often the kernel skipped the program.
    missed: AtomicU64,
    /// Whether the source's threads have finished the work that they postponed at the start.
    has_begun: AtomicBool,
}

/// The result of [`Kernel::settle`]: a generation such that subscribers know of every change up to
/// it.
///
/// A plain generation is no `Settled`, because subscribers may not know of its change yet:
/// ```compile_fail,E0308
/// # let kernel = mmu_source::kernel::Kernel::start().unwrap();
/// let is_current = kernel.is_current(kernel.generation());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "check it with `is_current` after the use if the memory may change meanwhile"]
pub struct Settled(u64);

/// What one call of [`Kernel::drain`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// The number of ranges that the call passed to subscribers. The whole address space after a
    /// loss does not count.
    pub ranges: usize,
    /// Whether records had been lost, so that the call invalidated the whole address space.
    pub lost: bool,
    /// Whether the call did nothing, because its caller was a callback that the source runs, a
    /// signal handler that had interrupted the source, or the child of a fork.
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
    /// Returns a counter that starts at one and is incremented when a change of an armed range
    /// begins. For statistics.
    ///
    /// A few other events increment it as well: some changes of memory that is not armed, because
    /// the filter is coarse, and losses that the source finds. But most changes of memory that is
    /// not armed do not make clients drain.
    #[must_use]
    #[inline]
    pub fn generation(&self) -> u64 {
        self.inner.generation()
    }

    /// Returns true only if no change of an armed range has begun since the call of `settle` that
    /// returned `settled`. Always false in the child of a fork.
    #[must_use]
    #[inline]
    pub fn is_current(&self, settled: Settled) -> bool {
        // ORDER(source-generation): the caller's reads through its translation come before the load
        // of the generation.
        fence(Ordering::Acquire);
        self.generation() == settled.0 && self.inner.handled() >= settled.0
    }

    /// Tells whether subscribers know of every change that has begun. If so,
    /// [`settle`](Self::settle) has nothing to do. Always false in the child of a fork. Runs no
    /// callback and takes no lock.
    #[must_use]
    #[inline]
    pub fn is_settled(&self) -> bool {
        self.inner.is_caught_up()
    }

    /// The counts behind [`is_settled`](Self::is_settled), for a caller that asks very often.
    #[doc(hidden)]
    #[must_use]
    pub fn counts(&self) -> Counts<'_> {
        self.inner.counts()
    }

    /// Runs the callbacks of every change that began before the call, or waits until another thread
    /// has run them. Costs two loads and a comparison if there is no such change.
    ///
    /// # Blocking
    /// Waits while callbacks run, on this thread or on another one that drains. Must not be called
    /// in a signal handler: see the [module](self#signal-handlers).
    /// # Errors
    /// [`Error::AfterFork`] in the child of a fork. [`Error::InCallback`] if there is a change
    /// whose callbacks have not run, and the caller is a callback that the source runs, or has
    /// interrupted the source.
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
        // A callback may have forked inside of this call, and this process may be the child.
        if self.is_inherited() {
            Err(Error::AfterFork { source: "kernel" })
        } else {
            Ok(Settled(generation))
        }
    }

    /// Passes the waiting ranges to [`Mm::invalidate`](mmu_notifier::Mm::invalidate) of
    /// [`current`](crate::current), in the order of the ring.
    ///
    /// # Blocking
    /// Waits while callbacks run, on this thread or on another one that drains. Changes that happen
    /// meanwhile are left for the next call.
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

    /// Tells whether this kernel can skip the source's program for a change, which the source then
    /// notices up to a second later: since Linux 7.0.
    #[doc(hidden)]
    #[must_use]
    pub fn may_skip_changes() -> bool {
        programs::this_kernel_may_skip()
    }

    /// Returns how often records were lost: because the ring or the queue was full, because the
    /// kernel skipped the program (`missed` in the `Debug` output), or because a broker no longer
    /// says whether the kernel did so. For statistics.
    ///
    /// The count is of records, not of invalidations: one invalidation of the whole address space
    /// covers all records that were lost since the last one. When the source finds skipped runs, it
    /// counts one loss more than there were runs.
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

    /// Tells whether this is the child of a fork and the parent started the source. In the child
    /// [`start`](Self::start) makes a new source.
    #[must_use]
    pub fn is_inherited(&self) -> bool {
        self.inner.is_inherited()
    }

    /// Returns how often a thread has waited for changes under way, and how many of these waits
    /// made a virtual machine. A thread that relied on another thread's wait is not counted.
    #[must_use]
    pub fn waits(&self) -> (u64, u64) {
        self.inner.waits.counts()
    }

    /// Waits until the source's own threads have finished the work that they postponed at the
    /// start. Until then they read files, and map and unmap memory.
    ///
    /// This call is for a program in which other code is about to overwrite functions like
    /// `munmap`, as Open MPI and libfabric do: a thread that is inside such a function at that time
    /// crashes.
    ///
    /// # Blocking
    /// Waits some milliseconds. Returns at once in the child of a fork.
    pub fn wait_for_threads(&self) {
        // ORDER(source-begun): Acquire; it publishes no data. Partner: the store in `listen`.
        let has_begun = || self.inner.has_begun.load(Ordering::Acquire);
        crate::wait::until(|| has_begun() || self.is_inherited());
    }

    /// Arms `range`: its changes are counted and reported until the returned value is dropped. When
    /// `arm` returns, no change that began before the call is still under way, and every later
    /// change is counted before it happens.
    ///
    /// Ranges may overlap, and may be armed several times.
    ///
    /// # Blocking
    /// Waits for the changes under way, as [`read_begin`](Armed::read_begin) does, if any event has
    /// happened since the last wait of any thread. Waits for no callback.
    /// # Errors
    /// [`Error::AfterFork`] in the child of a fork. [`Error::InCallback`] in a signal handler that
    /// has interrupted such a wait. [`Error::Kernel`] if no virtual machine can be made: for
    /// example `EMFILE` if the program has lowered its `RLIMIT_NOFILE` below 8, because that limit
    /// also applies to the source's own descriptor table.
    pub fn arm(self: &Arc<Self>, range: VaRange) -> Result<Armed, Error> {
        let armed = Armed::enter(self, range)?;
        self.wait()?;
        Ok(armed)
    }

    /// Waits until every change that began before the call is over.
    fn wait(&self) -> Result<(), Error> {
        self.inner.waits.wait(&self.inner.header, self.vault())
    }

    /// Like `wait`, for a range that was armed before the generation of `settled` was loaded.
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
        // ORDER(source-generation): Acquire: the caller's next reads come after this load. Partner:
        // the program's addition, a full barrier, before the page tables change.
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
    /// Closes all descriptors and waits until they are closed. Waits for no callback: if the
    /// source's own thread is running callbacks, that thread ends after them. In the child of a
    /// fork, only unmaps memory.
    fn drop(&mut self) {
        let vault = self.vault.take();
        if self.inner.is_inherited() {
            // The vault's thread exists only in the parent.
            if let Some(vault) = vault {
                vault.abandon();
            }
            self.inner.leave_to_parent();
            return;
        }
        // ORDER(source-stop): Release; it publishes no data, because the threads load the flag
        // after they are woken. Partner: the loads there.
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
