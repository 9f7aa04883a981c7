//! The sources and the watched ranges of this address space.
//!
//! The child of a fork has an address space of its own. The parent's registrations are stale there,
//! and the parent's sources do not watch it. So one pointer leads to all state of an address space,
//! and the state has the id of that address space. A child finds a different id and makes a state
//! of its own. It leaks the parent's state, because a thread that does not exist in the child may
//! have held the locks of that state.

#![allow(
    unsafe_code,
    reason = "a pointer that is published once and never freed"
)]

use crate::counts::{self, Change};
use crate::found::{self, OPAL};
use crate::late::Late;
use crate::ranges::Ranges;
use crate::reaper::Reaper;
use crate::say::{complain, explain};
use crate::settings::settings;
use crate::strict;
use crate::wait::wait_until;
use mmu_notifier::{InvalidateRange, Notifier, Registration, Va, VaRange};
use mmu_source::Watch;
use mmu_source::hook::Hook;
use mmu_source::kernel::{Armed, Counts, Kernel};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The sources and subscriptions of one address space.
#[derive(Debug)]
pub(crate) struct Space {
    /// The id of the address space's `Mm`.
    id: u64,
    hook: Result<Hook, String>,
    kernel: Result<Arc<Kernel>, String>,
    /// The counts of the kernel source, for the fast paths.
    counts: Option<Counts<'static>>,
    /// Whether the kernel can skip the kernel source's program for a change (since Linux 7.0). Then
    /// the hook's reports count as well.
    may_skip: bool,
    /// The whole address space, armed for UCX, because UCX does not say which ranges it registers.
    everything: Mutex<Option<Armed>>,
    /// The ranges that libfabric's caches have registered.
    pub(crate) ranges: Ranges,
    pub(crate) reaper: Reaper,
    /// The subscription that marks `ranges`. Made when the first cache starts.
    marks: Mutex<Option<Registration<Marks>>>,
    is_marked: AtomicBool,
    /// Whether UCX's caches may hold registrations that a parent made before a fork.
    pub(crate) has_parents: AtomicBool,
    /// The subscription that reports to UCX. Made when UCX's first cache subscribes.
    pub(crate) fed: Mutex<Option<Feeding>>,
    /// Changes that UCX learns of at its next look-up.
    pub(crate) late: Late,
}

/// A subscription of any type, which is only kept alive.
pub(crate) type Feeding = Box<dyn std::fmt::Debug + Send + Sync>;

static CURRENT: AtomicPtr<Space> = AtomicPtr::new(ptr::null_mut());

/// The space of this process. `None` if none was made yet, or if a parent process made it.
#[inline]
pub(crate) fn current() -> Option<&'static Space> {
    // ORDER(dropin-space): Acquire, for the content. Partner: the exchange in `make`.
    own(CURRENT.load(Ordering::Acquire))
}

/// The space behind the pointer. `None` if there is none, or if a parent process made it.
#[inline]
fn own(space: *mut Space) -> Option<&'static Space> {
    // SAFETY: the pointer is null or comes from `Box::leak` in `make`, and is never freed.
    let space = unsafe { space.as_ref() }?;
    (space.id == mmu_source::current_ref().id()).then_some(space)
}

/// The space of this process, if the callbacks have run for every change that its kernel source has
/// counted, or if that source is not in use. For fast paths: loads only, no call.
///
/// A parent's space is never returned: in the child of a fork its kernel source is not settled, and
/// without that source the id differs.
#[inline]
pub(crate) fn settled() -> Option<&'static Space> {
    // ORDER(dropin-space): Acquire, as in `current`.
    let space = CURRENT.load(Ordering::Acquire);
    // SAFETY: as in `own`.
    let space = unsafe { space.as_ref() }?;
    let is_settled = match &space.counts {
        Some(counts) => counts.is_settled(),
        None => mmu_source::current_if_made().is_some_and(|mm| mm.id() == space.id),
    };
    is_settled.then_some(space)
}

/// The space of this process, made at first use.
///
/// # Blocking
/// The first time it starts the sources: milliseconds. Must not be called from a callback.
pub(crate) fn current_or_made() -> &'static Space {
    current().unwrap_or_else(make)
}

#[cold]
fn make() -> &'static Space {
    // ORDER(dropin-space): Acquire, as for a failed exchange below. Partner: the exchange.
    let before = CURRENT.load(Ordering::Acquire);
    // Another thread may have published a space since the caller looked. If this thread then used
    // a second space, it would look up ranges that are subscribed only in the first one.
    if let Some(space) = own(before) {
        return space;
    }
    if !before.is_null() {
        // The fork may have run no handlers, and libfabric may make this space: UCX's next look-up
        // must notice that its caches hold registrations of the parent.
        counts::LOOKED_UP.store(false, Ordering::Relaxed);
    }
    let space = Box::leak(Box::new(Space::new(!before.is_null())));
    // ORDER(dropin-space): Release for the content, Acquire for that of the thread that was first.
    // Partner: `current`.
    match CURRENT.compare_exchange(before, space, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => space,
        // Another call of this function has stored `first`, in this process: a child of a fork
        // begins with one thread, so no call of the parent continues in it. Our space is leaked;
        // both spaces share the sources.
        // SAFETY: as in `own`; the pointer is not null, because another call of this function
        // has stored it.
        Err(first) => unsafe { &*first },
    }
}

impl Space {
    fn new(in_child: bool) -> Space {
        let begin = Instant::now();
        let choice = settings().choice;
        let off = || format!("MMUN={} does not ask for it", choice.name());
        let hook = match choice.wants_hook() {
            true => Hook::install().map_err(|error| explain(&error)),
            false => Err(off()),
        };
        let kernel = match choice.wants_kernel() {
            true => Kernel::start().map_err(|error| explain(&error)),
            false => Err(off()),
        };
        // Open MPI overwrites the beginnings of `munmap` and other functions, perhaps as soon as
        // the program's first call of UCX or libfabric returns. No thread of ours may be inside of
        // such a function then.
        if let Some(kernel) = kernel.as_ref().ok().filter(|_| found::is_loaded(OPAL)) {
            kernel.wait_for_threads();
        }
        let may_skip = kernel.is_ok() && Kernel::may_skip_changes();
        counts::START_NS.set(begin.elapsed().as_nanos() as u64);
        // The space is never freed, so the source may live as long.
        let forever = |kernel| &**Box::leak(Box::new(Arc::clone(kernel)));
        let space = Space {
            counts: kernel.as_ref().ok().map(|kernel| forever(kernel).counts()),
            id: mmu_source::current_ref().id(),
            hook,
            kernel,
            may_skip,
            everything: Mutex::new(None),
            ranges: Ranges::new(in_child).with_doubt(may_skip),
            reaper: Reaper::new(),
            marks: Mutex::new(None),
            is_marked: AtomicBool::new(false),
            has_parents: AtomicBool::new(in_child),
            fed: Mutex::new(None),
            late: Late::new(),
        };
        strict::require(space.gap().as_deref().map_or(Ok(()), Err));
        space
    }

    /// Whether the required sources are in use: both for `MMUN=both`, otherwise at least one.
    pub(crate) fn is_watched(&self) -> bool {
        match settings().choice {
            crate::settings::Choice::Both => self.hook.is_ok() && self.kernel.is_ok(),
            _ => self.hook.is_ok() || self.kernel.is_ok(),
        }
    }

    /// Why registrations can become stale with these sources. `None` if they cannot.
    fn gap(&self) -> Option<String> {
        match (&self.kernel, &self.hook) {
            (Err(reason), _) => Some(format!("the sources miss changes: kernel: {reason}")),
            (_, Err(reason)) if !self.is_watched() => Some(format!(
                "MMUN=both, and one source does not work: hook: {reason}"
            )),
            _ => None,
        }
    }

    /// Whether the sources miss no change.
    pub(crate) fn is_complete(&self) -> bool {
        self.kernel.is_ok()
    }

    pub(crate) fn hook(&self) -> Result<&Hook, &str> {
        self.hook.as_ref().map_err(String::as_str)
    }

    pub(crate) fn kernel(&self) -> Result<&Arc<Kernel>, &str> {
        self.kernel.as_ref().map_err(String::as_str)
    }

    /// Waits until the callbacks have run for every change that the source `kernel` has counted
    /// before the call.
    #[inline]
    pub(crate) fn settle(&self) {
        if let Ok(kernel) = &self.kernel {
            // Fails in the child of a fork, where the parent's registrations were dropped, and
            // inside a callback, where this library does not settle.
            let _ = kernel.settle();
        }
    }

    /// Whether the callbacks have run for every change that the kernel has counted.
    #[inline]
    pub(crate) fn is_settled(&self) -> bool {
        self.kernel
            .as_ref()
            .map_or(true, |kernel| kernel.is_settled())
    }

    /// Waits until every change is over that the kernel source has counted before the call. Runs no
    /// callback. Returns false if a change may still be under way.
    pub(crate) fn wait_for_changes(&self) -> bool {
        self.kernel
            .as_ref()
            .map_or(true, |kernel| kernel.wait_for_changes().is_ok())
    }

    /// Starts a watch of a registration by the kernel source. `None` if that source is not in use.
    ///
    /// Does not wait for changes under way: the registration was made before this call, so a change
    /// that began before this call is missed whether or not it is over when this call returns.
    ///
    /// # Errors
    /// The kernel source is in use, but cannot watch the range.
    pub(crate) fn watch(&self, start: u64, len: u64) -> Result<Option<Watch>, ()> {
        let Ok(kernel) = &self.kernel else {
            return Ok(None);
        };
        let range = VaRange::covering(Va::untagged(start), len).map_err(drop)?;
        kernel.watch_at_once(range).map(Some).map_err(drop)
    }

    /// Arms the whole address space, if the kernel source is in use. Returns false if the source
    /// cannot.
    pub(crate) fn arm_everything(&self) -> bool {
        let Ok(kernel) = &self.kernel else {
            return true;
        };
        let mut everything = self
            .everything
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if everything.is_none() {
            *everything = kernel.arm(VaRange::ALL).ok();
        }
        everything.is_some()
    }

    /// Starts to mark ranges. Returns false if the subscription fails.
    pub(crate) fn mark(&'static self) -> bool {
        // Relaxed: the flag publishes no data.
        if self.is_marked.load(Ordering::Relaxed) {
            return true;
        }
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if marks.is_none() {
            *marks = Registration::new(mmu_source::current_ref(), Marks(self)).ok();
            wait_for_threads();
        }
        self.is_marked.store(marks.is_some(), Ordering::Relaxed);
        marks.is_some()
    }
}

/// Waits until the reclaimer sleeps. A new thread maps and unmaps memory as it starts, and Open MPI
/// may patch `munmap` as soon as the program's first call of UCX or libfabric returns.
pub(crate) fn wait_for_threads() {
    wait_until(Duration::from_secs(1), srcu::reclaimer_sleeps);
}

/// Marks the ranges that a change overlaps.
#[derive(Debug)]
struct Marks(&'static Space);

impl Notifier for Marks {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        // With the kernel source each range has a watch, and that source reports this change, too.
        // So the report of the hook is not needed.
        if self.0.kernel.is_ok() && !self.0.may_skip && !Kernel::is_telling() {
            return;
        }
        self.mark(range);
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        // A registration since the start of the change can be of the old pages or of the new ones.
        // Only a watch of the kernel source tells which. So without that source, or if the kernel
        // may have skipped its program, every registration of the range becomes stale.
        if self.0.kernel.is_err() || (self.0.may_skip && !Kernel::is_telling()) {
            self.mark(range);
        }
    }
}

impl Marks {
    fn mark(&self, range: &InvalidateRange<'_>) {
        let no_unwinding = Aborts;
        let change = Change {
            event: range.event().name(),
            range: range.range(),
        };
        if self.0.ranges.changed(change) {
            self.0.reaper.wake();
        }
        std::mem::forget(no_unwinding);
    }
}

/// Aborts the process when a panic drops this value: a callback that panics loses an invalidation,
/// and the core would only count the panic.
#[derive(Debug)]
pub(crate) struct Aborts;

impl Drop for Aborts {
    fn drop(&mut self) {
        complain("a callback panicked: an invalidation would be lost");
        std::process::abort();
    }
}
