//! A small number for every thread that ever entered a section, given back by the kernel when the
//! thread dies.
//!
//! A number is owned by holding its *robust mutex*, which is never unlocked. When the thread is
//! gone the kernel marks the mutex, and the next claim finds it with `EOWNERDEAD`. So there is no
//! exit hook to register, which could allocate in the middle of the program's `malloc`. A thread
//! keeps its number to its very end, so a guard kept in thread-local storage can still be dropped
//! there. The kernel's hand-over is a full fence, so the new owner sees the counters as the old
//! owner left them.
//!
//! A claim blocks all signals: a handler that claims would deadlock with the claim it interrupts.
//!
//! # Safety
//! # Invariants
//! * The mutex of a number below `HIGH` is initialized, and at an address that is never unmapped or
//!   moved.
//! * `PLACE` is `NONE`, or the place of a number whose mutex this thread holds.

use super::die;
use super::lock::Lock;
use super::pages;
use super::place::{self, BUCKETS, Place};
use super::thread::Blocked;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

type Mutex = libc::pthread_mutex_t;

thread_word! {
    /// A [`Place`] in one word.
    static PLACE: u64 = Place::NONE.to_word();
}

/// One more than the highest number in use so far.
static HIGH: AtomicUsize = AtomicUsize::new(0);
static CHUNKS: [AtomicPtr<Mutex>; BUCKETS] = [const { AtomicPtr::new(ptr::null_mut()) }; BUCKETS];
/// Where to look next for a dead thread's number.
static CURSOR: Lock<usize> = Lock::new(0);

/// How many numbers a claim probes before it makes a new one. This bounds the time of a claim. It
/// also bounds the unused numbers: once some fraction of all numbers is dead, a claim finds one
/// with near certainty.
const PROBES: usize = 32;

#[inline(always)]
pub(super) fn place() -> Place {
    // INVARIANT: `PLACE` begins as `NONE`, and only `claim` sets it.
    Place::from_word(PLACE.get())
}

#[inline]
pub(super) fn high() -> usize {
    // Relaxed: a grace period, which needs the current value, loads it after a heavy fence. `HIGH`
    // includes a thread's number before the thread's first count, ORDER(srcu-enter).
    HIGH.load(Ordering::Relaxed)
}

pub(super) fn place_or_claim() -> Place {
    match place() {
        Place::NONE => claim(),
        place => place,
    }
}

/// Returns this thread's number, for crates that keep per-thread data. Claiming the number
/// allocates nothing, and may be done in a signal handler.
#[doc(hidden)]
pub fn thread_number() -> usize {
    place_or_claim().id()
}

/// One more than the highest number in use so far. If the caller sees a store that a thread made
/// after its claim, then the result is greater than that thread's number.
#[doc(hidden)]
#[inline]
pub fn thread_numbers() -> usize {
    high()
}

#[cold]
fn claim() -> Place {
    let _signals_wait = Blocked::new();
    // A signal handler may have claimed since the caller's check.
    let place = place();
    if place != Place::NONE {
        return place;
    }
    let mut cursor = CURSOR.lock();
    let high = HIGH.load(Ordering::Relaxed);
    let start = if high <= PROBES { 0 } else { *cursor };
    let dead = (0..high.min(PROBES))
        .map(|probe| (start + probe) % high)
        .find(|id| try_own(mutex(*id)));
    let id = dead.unwrap_or_else(|| add(high));
    *cursor = if high <= PROBES {
        0
    } else {
        (start + PROBES) % high
    };
    let Some(place) = Place::of(id) else {
        die("more threads than Linux can have")
    };
    // INVARIANT: `try_own` locked the mutex of `id` for this thread.
    PLACE.set(place.to_word());
    place
}

/// Makes number `high` and owns it. The caller holds the lock.
fn add(high: usize) -> usize {
    let (bucket, _) = place::split(high);
    if bucket < BUCKETS && CHUNKS[bucket].load(Ordering::Relaxed).is_null() {
        let chunk = pages::map(place::slots_in(bucket) * size_of::<Mutex>());
        // ORDER(srcu-lock): Relaxed suffices for `CHUNKS`: every access holds the lock, except in a
        // fork's child, which has one thread.
        CHUNKS[bucket].store(chunk.as_ptr().cast(), Ordering::Relaxed);
    }
    init(mutex(high));
    if !try_own(mutex(high)) {
        die("a new robust mutex cannot be locked");
    }
    // INVARIANT: The mutex is initialized.
    HIGH.store(high + 1, Ordering::Relaxed);
    high
}

fn mutex(id: usize) -> *mut Mutex {
    let (bucket, at) = place::split(id);
    let Some(chunk) = CHUNKS.get(bucket) else {
        die("more threads than Linux can have")
    };
    // SAFETY: The offset must stay within the allocation: `add` maps room for all numbers of a
    // bucket, and every caller has a number that `add` has been called for.
    unsafe { chunk.load(Ordering::Relaxed).add(at) }
}

fn init(mutex: *mut Mutex) {
    let mut robust = MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
    // SAFETY: Needs a place for an attribute object.
    unsafe { libc::pthread_mutexattr_init(robust.as_mut_ptr()) };
    // SAFETY: Needs an initialized attribute object: from the line above.
    let refused = unsafe {
        libc::pthread_mutexattr_setrobust(robust.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST)
    };
    // SAFETY: Needs a place for a mutex that is not in use: its number is not given out, or this is
    // the only thread of a forked child, in which all other owners are gone.
    let failed = unsafe { libc::pthread_mutex_init(mutex, robust.as_ptr()) };
    if refused != 0 || failed != 0 {
        die("the C library has no robust mutexes");
    }
}

fn try_own(mutex: *mut Mutex) -> bool {
    // SAFETY: Needs an initialized mutex at an address that stays: the invariant of `HIGH`, or
    // `add` has just initialized it.
    match unsafe { libc::pthread_mutex_trylock(mutex) } {
        0 => true,
        libc::EOWNERDEAD => {
            // ORDER(cache-number): the dead owner's stores happen before this claim, by the
            // kernel's exchange of the mutex's word. Partner: the end of the owner.
            // SAFETY: Needs a robust mutex that this thread has just locked with EOWNERDEAD.
            unsafe { libc::pthread_mutex_consistent(mutex) };
            true
        }
        _ => false,
    }
}

/// Frees the numbers of the threads that a fork has left behind, and keeps this thread's own.
pub(super) fn after_fork() {
    CURSOR.after_fork();
    for id in 0..HIGH.load(Ordering::Relaxed) {
        init(mutex(id));
    }
    if place() != Place::NONE && !try_own(mutex(place().id())) {
        die("a new robust mutex cannot be locked");
    }
}
