//! The memory monitor that libfabric imports.
//!
//! | call | libfabric holds | action |
//! | --- | --- | --- |
//! | `start` | the lock of the monitors' states | starts the sources, marks ranges from now on |
//! | `subscribe`, `unsubscribe` | the lock of all caches | enters a range, removes it |
//! | `valid` | the lock of all caches | checks for unreported changes and stale ranges; before it refuses a range, waits for changes under way |
//!
//! None of these functions waits for a thread that could need a lock of libfabric. Callbacks only
//! mark ranges ([`Ranges`](crate::ranges::Ranges)). Our own thread, which holds no lock, calls
//! `notify`, which takes the caches' lock ([`Reaper`](crate::reaper::Reaper)).

#![allow(
    unsafe_code,
    reason = "a structure that libfabric fills in; see the crate's Safety section"
)]

use super::abi::{CLASS_MEM_MONITOR, Fid, MemMonitor, MonitorOps};
use crate::counts::{self, Change};
use crate::found;
use crate::place;
use crate::ranges::Verdict;
use crate::space::{self, Space};
use mmu_notifier::VaRange;
use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::ptr;

static OPS: MonitorOps = MonitorOps {
    size: size_of::<MonitorOps>(),
    start,
    stop,
    subscribe,
    unsubscribe,
    valid,
};

/// The structure that both libraries share. libfabric writes its fields once, at the import.
struct Shared(UnsafeCell<MemMonitor>);

// SAFETY: after the import, which happens once, the structure is only read. The reaper, which reads
// `import_ops`, starts afterwards.
unsafe impl Sync for Shared {}

static MONITOR: Shared = Shared(UnsafeCell::new(MemMonitor {
    fid: Fid {
        class: CLASS_MEM_MONITOR,
        context: ptr::null_mut(),
        ops: ptr::null_mut(),
    },
    export_ops: &raw const OPS,
    import_ops: ptr::null(),
}));

/// The monitor that is imported.
pub(super) fn monitor() -> *mut MemMonitor {
    MONITOR.0.get()
}

/// Whether libfabric has this monitor.
pub(super) fn is_imported() -> bool {
    // SAFETY: the monitor is a static. Only an import writes the field, and none runs now: that of
    // this thread is over, and `IMPORTING` keeps out other threads.
    unsafe { !(*monitor()).import_ops.is_null() }
}

/// Makes libfabric drop every registration that overlaps `start..start + len`.
///
/// # Blocking
/// Takes the lock of all caches. Must not be called by a thread that may hold this lock.
fn notify(start: u64, len: u64) {
    // SAFETY: the monitor is a static; only the import writes the field, before any cache starts.
    let import = unsafe { (*monitor()).import_ops };
    // SAFETY: libfabric sets `import_ops` to a static table, and libfabric is pinned.
    let Some(import) = (unsafe { import.as_ref() }) else {
        return;
    };
    // SAFETY: this is the type of `notify` in `rdma/fi_ext.h`; this thread holds no lock of
    // libfabric.
    unsafe {
        (import.notify)(
            monitor(),
            ptr::without_provenance(start as usize),
            len as usize,
        )
    };
    found::returned(());
}

/// Called for the first cache of a kind. After an error, libfabric uses no cache: slower, never
/// stale.
extern "C" fn start(_: *mut MemMonitor) -> c_int {
    if super::is_disabled() {
        return -libc::ENOSYS;
    }
    let _whole = srcu::Uncancelled::enter();
    counts::STARTS.add(1);
    if is_ready(space::current_or_made()) {
        0
    } else {
        -libc::ENOSYS
    }
}

/// Makes `space` watch ranges; returns whether it does.
fn is_ready(space: &'static Space) -> bool {
    space.is_watched() && space.mark() && space.reaper.start(&space.ranges, notify)
}

extern "C" fn stop(_: *mut MemMonitor) {}

extern "C" fn subscribe(_: *mut MemMonitor, address: *const c_void, len: usize) -> c_int {
    let _whole = srcu::Uncancelled::enter();
    place::begin();
    counts::WATCHED.add(1);
    let space = space::current_or_made();
    let (start, len) = (address.addr() as u64, len as u64);
    // A change before the registration does no harm. A change between the registration and this
    // call is missed by every monitor, because libfabric does not tell monitors that a miss begins.
    // In the child of a fork, the sources start here. If no source works in the child, no change
    // would be reported.
    let is_ready = is_ready(space);
    let make = || match space.watch(start, len) {
        Ok(watch) if is_ready => Ok(watch),
        _ => Err(Change {
            event: "no watch could be made",
            range: VaRange::ALL,
        }),
    };
    // Returns no error: after one, some versions of libfabric unsubscribe and others do not.
    if space.ranges.subscribe(start, len, make) {
        space.reaper.wake();
    }
    0
}

extern "C" fn unsubscribe(_: *mut MemMonitor, address: *const c_void, len: usize) {
    let _whole = srcu::Uncancelled::enter();
    // In the child of a fork the range belongs to the parent, so there is nothing to remove.
    if let Some(space) = space::current() {
        space.ranges.unsubscribe(address.addr() as u64, len as u64);
    }
}

extern "C" fn valid(_: *mut MemMonitor, address: *const c_void, len: usize) -> bool {
    counts::HITS.add_one_under_lock();
    // Fast path, loads only: no range has changed, and no change is left to be reported.
    if space::settled().is_some_and(|space| space.ranges.is_clean()) {
        return true;
    }
    is_valid(address.addr() as u64, len as u64)
}

#[cold]
#[inline(never)]
fn is_valid(start: u64, len: u64) -> bool {
    let _whole = srcu::Uncancelled::enter();
    let unknown = Change {
        event: "fork",
        range: VaRange::ALL,
    };
    let verdict = match space::current() {
        // Another thread may have settled the source, or removed the stale ranges, since the fast
        // path looked.
        Some(space) if space.is_settled() && space.ranges.is_clean() => Verdict::Valid,
        Some(space) => space.ranges.ask(start, len),
        // A registration of the parent.
        None => {
            place::begin();
            Verdict::Stale(unknown)
        }
    };
    match verdict {
        Verdict::Valid => true,
        Verdict::Stale(change) => {
            counts::refused(start, len, change);
            false
        }
        Verdict::Unknown => {
            counts::refused(start, len, unknown);
            false
        }
    }
}
