//! UCX: this library acts as UCX's external source of events, and settles the kernel source at each
//! look-up.
//!
//! UCX patches libc when it is loaded, whether or not a cache will be used: the constructor of
//! `libucs` initializes `libucm`, which calls `ucm_mmap_init`. This library defines that function,
//! and patches nothing if the `hook` is to run.
//!
//! UCX's registration caches subscribe with `ucm_set_event_handler`. If another library has
//! announced with `ucm_set_external_event` that it reports unmapped memory, UCX patches no function
//! for that event. The other library then calls `ucm_vm_munmap`. UCX's cache drops the
//! registrations that overlap the range. If the cache's lock is held, the cache queues the range
//! instead; from 1.17 on UCP's caches always do. The cache never waits for its lock there, so our
//! callback may run inside `free`.
//!
//! A change that only the kernel source sees is reported when a thread settles that source. Up to
//! UCX 1.13 each look-up calls `ucs_rcache_get`. From 1.14 on UCP's look-up is compiled into
//! `libucp`, and calls `ucs_pgtable_lookup` of `libucs`. This library defines both functions, and
//! settles the source in them.

#![allow(unsafe_code, reason = "calls UCX; see the crate's Safety section")]

mod caches;
mod calls;
mod context;
pub(crate) mod fork;
mod locks;

use crate::counts;
use crate::first::First;
use crate::found::{self, UCM};
use crate::late;
use crate::place;
use crate::say::complain;
use crate::settings::{Choice, settings};
use crate::space::{self, Aborts, Feeding, Space};
use crate::strict;
use crate::wait::wait_until;
use mmu_notifier::{InvalidateRange, Notifier, Registration};
use mmu_source::kernel::Kernel;
use srcu::Thread;
use std::ffi::{CStr, c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::Duration;

/// `UCM_EVENT_VM_UNMAPPED`.
const VM_UNMAPPED: c_int = 1 << 17;
/// `UCS_ERR_UNSUPPORTED`.
const UNSUPPORTED: i8 = -22;

type VmMunmap = unsafe extern "C" fn(*mut c_void, usize);

/// The connection to UCX, or the reason why there is none. Set when the first cache subscribes.
static SERVED: First<Result<(), String>> = First::new();

/// `ucm_vm_munmap` of each UCX in the process, to which changes are reported; the first null ends
/// the list. Relaxed: addresses of code that stays loaded.
static VM_MUNMAPS: [AtomicPtr<c_void>; 8] = [const { AtomicPtr::new(ptr::null_mut()) }; 8];

/// Why a copy of UCX in this process is not connected.
static PAST: First<String> = First::new();

/// The result of the connection, for the report. `None` if the program did not use UCX.
pub(crate) fn served() -> Option<Result<(), &'static str>> {
    let served = SERVED.get()?;
    Some(match (PAST.get(), served) {
        (Some(reason), _) | (None, Err(reason)) => Err(reason),
        (None, Ok(())) => Ok(()),
    })
}

/// Reports to UCX which memory is about to change.
#[derive(Debug)]
struct Feed(&'static Space);

impl Notifier for Feed {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        counts::TOLD.add(1);
        self.report(range);
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        // A registration during the change can be of the old pages. A record of the kernel source
        // has no end of its own: the source learns of the change as it begins.
        if !Kernel::is_telling() {
            self.report(range);
        }
    }
}

impl Feed {
    fn report(&self, range: &InvalidateRange<'_>) {
        let no_unwinding = Aborts;
        let start = range.range().start().get() as usize;
        // A range without an end reaches the end of the address space. UCX takes a length.
        let end = range
            .range()
            .end()
            .map_or(usize::MAX, |end| end.get() as usize);
        // Relaxed: the flag is set before the first cache of such a version exists.
        if LOOKS_UNLOCKED.load(Ordering::Relaxed) && Kernel::is_telling() {
            self.0.late.add(start, end - start);
            caches::reported();
        } else {
            report(start, end - start);
        }
        std::mem::forget(no_unwinding);
    }
}

/// No address of user space is higher. UCX's caches add up the lengths of the ranges that they have
/// queued, and can abort if the sum wraps around. The sum of `usize::MAX` and any other length
/// would.
const END: usize = 1 << 56;

/// Reports that a range is about to change, or has changed. While another thread forks, puts the
/// report off.
fn report(start: usize, len: usize) {
    while !fork::enter() {
        if let Some(space) = space::current() {
            space.late.add(start, len);
            return caches::reported();
        }
        // The child of a fork drops its parent's registrations, in a thread that holds no lock.
        std::thread::yield_now();
    }
    tell(start, len);
}

/// Like [`report`], also while a thread forks: for a look-up, which holds no lock for which `fork`
/// waits.
fn report_now(start: usize, len: usize) {
    fork::enter_always();
    tell(start, len);
}

/// Calls UCX's handlers, then leaves them: the caller has entered.
fn tell(start: usize, len: usize) {
    let len = len.min(END - start.min(END));
    for vm_munmap in &VM_MUNMAPS {
        let Some(vm_munmap) = NonNull::new(vm_munmap.load(Ordering::Relaxed)) else {
            break;
        };
        // SAFETY: this is the type of `ucm_vm_munmap` in `ucm/api/ucm.h`.
        let vm_munmap = unsafe { std::mem::transmute::<NonNull<c_void>, VmMunmap>(vm_munmap) };
        // SAFETY: the function may be called anywhere, inside `free` as well: it takes a recursive
        // read lock, and calls handlers that only try the lock of their cache. The handlers wait
        // for a spin lock, under which UCX reports no change of memory.
        unsafe { vm_munmap(ptr::without_provenance_mut(start), len) };
    }
    caches::reported();
    fork::leave();
}

/// Whether UCP's look-ups hold no lock that `ucm_vm_munmap` respects: in UCX 1.14 to 1.16
/// ([`late`]).
static LOOKS_UNLOCKED: AtomicBool = AtomicBool::new(false);

/// Returns the caller's version of UCX, and notes how that version looks up: without a lock, and in
/// code inside `libucp`.
fn note_version() -> Option<(u32, u32)> {
    let version = version();
    if version.is_some_and(|version| ((1, 14)..(1, 17)).contains(&version)) {
        LOOKS_UNLOCKED.store(true, Ordering::Relaxed);
    }
    if version.is_some_and(|version| version >= (1, 14)) {
        IS_INLINED.store(true, Ordering::Relaxed);
    }
    version
}

/// Connects UCX to the sources of this address space, if that was not done before.
fn serve() {
    if strict::is_off() {
        return;
    }
    let _whole = srcu::Uncancelled::enter();
    place::begin();
    // Two threads may run this at the same time. Each step may run twice without harm.
    let served = SERVED.get_or_make(try_serve);
    // Not in the first look-up, which may hold a lock of UCX.
    calls::prepare();
    match served.clone().and_then(|()| announce()) {
        Ok(()) => start(),
        Err(reason) => {
            strict::require(Err(&reason));
            PAST.get_or_make(|| reason);
        }
    }
}

/// Starts the sources of this address space and subscribes, if that was not done before.
fn start() {
    let space = space::current_or_made();
    if feed(space) && space.is_watched() {
        return;
    }
    let reason =
        "no event source works in a child process: registrations of UCX can become stale here";
    strict::require(Err(reason));
    complain(reason);
}

fn try_serve() -> Result<(), String> {
    note_version();
    let space = space::current_or_made();
    if !space.is_watched() {
        let why = match settings().choice {
            Choice::Both => "MMUN=both asks for both sources, and one does not work",
            _ => "no event source works here",
        };
        return Err(format!("{why}: UCX watches memory by itself"));
    }
    if !feed(space) {
        return Err("the address space cannot be subscribed to: UCX watches by itself".to_owned());
    }
    Ok(())
}

/// Announces this library to the UCX that has called it. Further calls for the same UCX have no
/// effect.
fn announce() -> Result<(), String> {
    let function = |name: &CStr| {
        found::for_caller(UCM, name)
            .ok_or_else(|| format!("it is older than 1.4 (no {})", name.to_string_lossy()))
    };
    let (announce, vm_munmap) = (
        function(c"ucm_set_external_event")?,
        function(c"ucm_vm_munmap")?,
    );
    let vm_munmap = vm_munmap.as_ptr();
    // Fill the list before the announcement: from then on UCX relies on the reports.
    let is_listed = |slot: &AtomicPtr<c_void>| {
        let (before, relaxed) = (ptr::null_mut(), Ordering::Relaxed);
        match slot.compare_exchange(before, vm_munmap, relaxed, relaxed) {
            Ok(_) => true,
            Err(listed) => listed == vm_munmap,
        }
    };
    if !VM_MUNMAPS.iter().any(is_listed) {
        return Err("there are more than eight copies of it in the process".to_owned());
    }
    // SAFETY: this is the type of `ucm_set_external_event` in `ucm/api/ucm.h`.
    let announce =
        unsafe { std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn(c_int)>(announce) };
    // SAFETY: the function takes a set of events. This library reports these events from now on.
    unsafe { announce(VM_UNMAPPED) };
    Ok(())
}

/// Subscribes on behalf of UCX, once for each address space. Returns false if that fails.
fn feed(space: &'static Space) -> bool {
    let mut fed = space.fed.lock().unwrap_or_else(PoisonError::into_inner);
    if fed.is_none() && space.arm_everything() {
        let made = Registration::new(mmu_source::current_ref(), Feed(space)).ok();
        *fed = made.map(|made| Box::new(made) as Feeding);
        space::wait_for_threads();
    }
    fed.is_some()
}

/// Runs in the child of a fork, where UCX's caches still hold the parent's registrations.
///
/// If look-ups call this library, the child's first look-up starts the child's sources and drops
/// these registrations. Not here, because most children use no cache, the start takes milliseconds,
/// and UCX can hang (see `begin_child`). If look-ups do not call this library, both happen here,
/// because the child's first look-up cannot be noticed.
fn serve_child() {
    // Relaxed: see `fork::in_child`.
    counts::LOOKED_UP.store(false, Ordering::Relaxed);
    if !CALLS_US.load(Ordering::Relaxed) {
        begin_child();
    }
}

/// Drops the parent's registrations, and starts the child's sources.
///
/// If another thread of the parent held a lock of UCX's cache at the fork, no thread of the child
/// will ever release that lock. So a new thread calls UCX. If the new thread hangs, the calling
/// thread continues after a second, because the child may be about to execute another program. The
/// sources stay off then, because their reports would hang in the same place.
fn begin_child() {
    let Some(Ok(())) = SERVED.get() else {
        return;
    };
    static IS_DONE: AtomicBool = AtomicBool::new(false);
    IS_DONE.store(false, Ordering::Relaxed);
    let drop_parents = || {
        drop_parents();
        IS_DONE.store(true, Ordering::Relaxed);
    };
    let made = Thread::spawn(c"mmun-fork", drop_parents).map(Thread::detach);
    // Relaxed: this thread does not look up, so it need not see the drop's effect. The child's
    // first look-up drops the parent's registrations once more.
    let is_done = || IS_DONE.load(Ordering::Relaxed);
    if made.is_ok() {
        wait_until(Duration::from_secs(1), is_done);
    }
    if is_done() {
        return start();
    }
    let reason = match made {
        Ok(()) => "a thread held a lock of UCX at the fork: the child cannot use UCX",
        Err(_) => "no thread can be started in a child process: the child cannot use UCX",
    };
    strict::require(Err(reason));
    complain(reason);
}

/// Makes UCX drop every registration, because all of them are of the parent's memory.
///
/// # Blocking
/// Takes locks of UCX's caches, see `begin_child`.
fn drop_parents() {
    report(0, usize::MAX);
}

/// Keeps UCX from patching libc as it is loaded, if the `hook` is to run. If the sources do not
/// work, or if a part of the program subscribes to other events of libc's calls, UCX patches at
/// that subscription.
///
/// UCX's patches and the `hook` would tell each change twice. And a patch is not safe while another
/// thread executes the function: on aarch64 it replaces the system call's instruction and the one
/// to which that call returns.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ucm_mmap_init() {
    if settings().choice.wants_hook() {
        return;
    }
    let Some(real) = found::for_caller(UCM, c"ucm_mmap_init") else {
        complain("ucm_mmap_init: no libucm is loaded");
        return;
    };
    // SAFETY: this is the function's type from UCX 1.12 to 1.22.
    let real = unsafe { std::mem::transmute::<NonNull<c_void>, extern "C" fn()>(real) };
    real();
    found::returned(());
}

/// Connects UCX to the sources, then calls the real `ucm_set_event_handler`.
///
/// # Safety
/// As for `ucm_set_event_handler`, which gets all arguments.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ucm_set_event_handler(
    events: c_int,
    priority: c_int,
    callback: *mut c_void,
    argument: *mut c_void,
) -> i8 {
    type Real = unsafe extern "C" fn(c_int, c_int, *mut c_void, *mut c_void) -> i8;
    let Some(real) = found::for_caller(UCM, c"ucm_set_event_handler") else {
        complain("ucm_set_event_handler: no libucm is loaded");
        return UNSUPPORTED;
    };
    // SAFETY: this is the type of `ucm_set_event_handler` in `ucm/api/ucm.h`; a `ucs_status_t` is
    // one byte.
    let real = unsafe { std::mem::transmute::<NonNull<c_void>, Real>(real) };
    if events & VM_UNMAPPED != 0 {
        serve();
    }
    // SAFETY: the arguments are valid for `ucm_set_event_handler`, because the caller promises so
    // (see # Safety).
    found::returned(unsafe { real(events, priority, callback, argument) })
}

/// Waits until all changes so far are reported to UCX.
fn ask() {
    let _whole = srcu::Uncancelled::enter();
    match space::current() {
        Some(space) => {
            // ORDER(dropin-looked): Acquire, for the subscription. Partner: `first_look_up`. The
            // load comes first, because a store at each look-up would contend for the cache line
            // between all threads.
            if !counts::LOOKED_UP.load(Ordering::Acquire) {
                first_look_up();
            }
            settle(space);
        }
        // If UCX is connected, this is the child of a fork, whose first look-up makes the space. If
        // UCX is not connected, the first look-up notes this process for the report. Later look-ups
        // must not store, because the stores would contend for the cache line.
        None => match SERVED.get() {
            None => {}
            Some(Err(_)) if counts::LOOKED_UP.load(Ordering::Relaxed) => {}
            Some(_) => first_look_up(),
        },
    }
}

fn settle(space: &Space) {
    space.settle();
    // Before UCX is connected there is no cache that needs the report.
    if late::is_waiting() {
        space.late.report(report_now);
    }
}

/// Notes this process for the report. The child of a fork that makes no look-up, perhaps because it
/// is about to execute another program, does not appear in the report.
///
/// In a child, starts the sources and then drops the parent's registrations. Two threads may do so
/// at once: neither continues before the subscription is made and the registrations are dropped.
#[cold]
fn first_look_up() {
    let Some(served) = SERVED.get() else {
        return;
    };
    place::begin();
    if served.is_ok() {
        start();
        let space = space::current_or_made();
        // ORDER(dropin-parents): Acquire, for the effect in UCX of another thread's report of all
        // memory. Partner: the store below.
        if space.has_parents.load(Ordering::Acquire) {
            drop_parents();
            // ORDER(dropin-parents): Release, after the report.
            space.has_parents.store(false, Ordering::Release);
        }
    }
    CALLS_US.store(true, Ordering::Relaxed);
    // ORDER(dropin-looked): Release, for the subscription. Partner: the load in `ask`.
    counts::LOOKED_UP.store(true, Ordering::Release);
}

/// The version of the loaded UCX, major and minor. `None` if UCX does not tell its version.
fn version() -> Option<(u32, u32)> {
    type GetVersion = unsafe extern "C" fn(*mut u32, *mut u32, *mut u32);
    let get = found::for_caller(c"libucp", c"ucp_get_version")?;
    // SAFETY: this is the type of `ucp_get_version` in `ucp/api/ucp.h`.
    let get = unsafe { std::mem::transmute::<NonNull<c_void>, GetVersion>(get) };
    let [mut major, mut minor, mut release] = [0; 3];
    // SAFETY: each of the three pointers has room for an integer.
    unsafe { get(&raw mut major, &raw mut minor, &raw mut release) };
    Some((major, minor))
}

/// Whether a look-up has called this library, in this process or in a parent before its fork.
static CALLS_US: AtomicBool = AtomicBool::new(false);

/// Whether UCP's look-up is compiled into `libucp`, and calls `ucs_rcache_get` only on its slow
/// path: in UCX 1.14 and later.
static IS_INLINED: AtomicBool = AtomicBool::new(false);

/// Why a look-up may find a registration that a change has made stale. `None` if look-ups call
/// this library, which settles the kernel source in each of them.
pub(crate) fn late_changes() -> Option<&'static str> {
    if counts::LOOKED_UP.load(Ordering::Relaxed) {
        None
    } else {
        Some(
            "no look-up came through the drop-in; if there was one, UCX receives a change that only the kernel source sees up to milliseconds late",
        )
    }
}
