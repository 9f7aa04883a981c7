//! The sources and the watched ranges of this address space.
//!
//! The child of a fork has an address space of its own: what its parent registered is stale there,
//! and what its parent started does not watch it. So everything that is about *this* address space
//! hangs on one pointer, with the number of the address space that it was made for. A child finds
//! another number and makes its own; its parent's is leaked, because a thread that the child does
//! not have may have held its locks.

#![allow(
    unsafe_code,
    reason = "one pointer that is published once and never freed, and an exit"
)]

use crate::counts::{self, Change};
use crate::found::{self, OPAL};
use crate::ranges::Ranges;
use crate::reaper::Reaper;
use crate::say::{complain, explain};
use crate::settings::settings;
use mmu_notifier::{InvalidateRange, Notifier, Registration, Va, VaRange};
use mmu_source::Watch;
use mmu_source::hook::Hook;
use mmu_source::kernel::{Armed, Kernel};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// What watches one address space.
#[derive(Debug)]
pub(crate) struct Space {
    /// The number of its `Mm`.
    id: u64,
    hook: Result<Hook, String>,
    kernel: Result<Arc<Kernel>, String>,
    /// All of the address space, armed for UCX: that says nothing of what it registers.
    everything: Mutex<Option<Armed>>,
    /// The ranges that libfabric's caches have registered.
    pub(crate) ranges: Ranges,
    pub(crate) reaper: Reaper,
    /// The subscription that marks them. Made with the first cache.
    marks: Mutex<Option<Registration<Marks>>>,
    /// The subscription that feeds UCX. Made with its first cache.
    pub(crate) fed: Mutex<Option<Feeding>>,
}

/// A subscription, of whatever kind: it is kept, and not looked at.
pub(crate) type Feeding = Box<dyn std::fmt::Debug + Send + Sync>;

static CURRENT: AtomicPtr<Space> = AtomicPtr::new(ptr::null_mut());

/// The space of this process, if it was made here: not that of a parent.
#[inline]
pub(crate) fn current() -> Option<&'static Space> {
    // ORDER(dropin-space): Acquire, for the content. Partner: the exchange in `make`.
    let space = CURRENT.load(Ordering::Acquire);
    // SAFETY: it is null or comes from `Box::leak` in `make`, and is never freed.
    let space = unsafe { space.as_ref() }?;
    (space.id == mmu_source::current_ref().id()).then_some(space)
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
    // ORDER(dropin-space): Acquire, for a failure below. Partner: itself.
    let before = CURRENT.load(Ordering::Acquire);
    // A space that was made before is the parent's.
    let space = Box::leak(Box::new(Space::new()));
    // ORDER(dropin-space): Release for the content, Acquire for that of the thread that was first.
    // Partner: `current`.
    match CURRENT.compare_exchange(before, space, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => space,
        // Another thread was first, in this address space: a child begins with one thread. Both
        // have the same sources. SAFETY: as in `current`; it is not null, since it was exchanged by
        // another call of this function.
        Err(first) => unsafe { &*first },
    }
}

impl Space {
    fn new() -> Space {
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
        // Open MPI overwrites the beginnings of `munmap` and others, perhaps as soon as this
        // returns. No thread of ours may be inside of one then.
        if let Some(kernel) = kernel.as_ref().ok().filter(|_| found::is_loaded(OPAL)) {
            kernel.wait_for_threads();
        }
        counts::START_NS.set(begin.elapsed().as_nanos() as u64);
        let space = Space {
            id: mmu_source::current_ref().id(),
            hook,
            kernel,
            everything: Mutex::new(None),
            ranges: Ranges::new(),
            reaper: Reaper::new(),
            marks: Mutex::new(None),
            fed: Mutex::new(None),
        };
        if settings().strict && !space.is_complete() {
            refuse(&space);
        }
        space
    }

    /// Whether any source watches, as asked.
    pub(crate) fn is_watched(&self) -> bool {
        match settings().choice {
            crate::settings::Choice::Both => self.hook.is_ok() && self.kernel.is_ok(),
            _ => self.hook.is_ok() || self.kernel.is_ok(),
        }
    }

    /// Whether no change is missed.
    pub(crate) fn is_complete(&self) -> bool {
        self.kernel.is_ok()
    }

    pub(crate) fn hook(&self) -> Result<&Hook, &str> {
        self.hook.as_ref().map_err(String::as_str)
    }

    pub(crate) fn kernel(&self) -> Result<&Arc<Kernel>, &str> {
        self.kernel.as_ref().map_err(String::as_str)
    }

    /// Has every change that has begun before told, callbacks included.
    #[inline]
    pub(crate) fn settle(&self) {
        if let Ok(kernel) = &self.kernel {
            // In the child of a fork nothing is told; what its parent registered was dropped there.
            let _ = kernel.settle();
        }
    }

    /// Whether every change that the kernel has counted was told.
    #[inline]
    pub(crate) fn is_settled(&self) -> bool {
        self.kernel
            .as_ref()
            .map_or(true, |kernel| kernel.is_settled())
    }

    /// Has the kernel watch a registration. `None` where that source is not in use.
    ///
    /// # Errors
    /// The kernel source is in use, and cannot.
    pub(crate) fn watch(&self, start: u64, len: u64) -> Result<Option<Watch>, ()> {
        let Ok(kernel) = &self.kernel else {
            return Ok(None);
        };
        let range = VaRange::covering(Va::new(start), len).map_err(drop)?;
        kernel.watch(range).map(Some).map_err(drop)
    }

    /// Has changes of all the address space told, where the kernel source is in use. False if it
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

    /// Begins to mark ranges. False if the address space cannot be subscribed to.
    pub(crate) fn mark(&'static self) -> bool {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if marks.is_none() {
            *marks = Registration::new(mmu_source::current_ref(), Marks(self)).ok();
        }
        marks.is_some()
    }
}

/// `MMUN_STRICT=1` and no source is complete.
fn refuse(space: &Space) -> ! {
    let reason = space.kernel().map_or_else(str::to_owned, |_| String::new());
    complain(&format!(
        "MMUN_STRICT=1 and the sources miss changes: kernel: {reason}"
    ));
    // SAFETY: it takes an integer. Handlers of the program do not run: it has not begun to
    // communicate.
    unsafe { libc::_exit(125) }
}

/// Marks the ranges that a change meets.
#[derive(Debug)]
struct Marks(&'static Space);

impl Notifier for Marks {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
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

/// Aborts when it is dropped: a panic in a callback would lose an invalidation, and the core would
/// only count it.
#[derive(Debug)]
pub(crate) struct Aborts;

impl Drop for Aborts {
    fn drop(&mut self) {
        complain("a callback panicked: an invalidation would be lost");
        std::process::abort();
    }
}
