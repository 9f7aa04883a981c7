//! Thread numbers: a small number for every thread that has claimed one, for example by its first
//! section. The kernel frees the number when the thread dies.
//!
//! A thread owns a number by holding the number's *robust mutex*, which it never unlocks. When the
//! thread has died, the kernel marks the mutex, and the next claim that tries this mutex gets
//! `EOWNERDEAD`. So no exit hook is needed, whose registration could allocate in the middle of the
//! program's `malloc`. A thread keeps its number until it dies, so its thread-local destructors can
//! still drop guards. The kernel hands a robust mutex over with a full fence, so the new owner sees
//! the counters as the old owner left them.
//!
//! A claim blocks all signals, because a signal handler that claims would deadlock with the claim
//! that it interrupts.
//!
//! # Safety
//! # Invariants
//! * The mutex of a number below `HIGH` is initialised, and its address is never unmapped or
//!   reused.
//! * `PLACE` is `NONE`, or the place of a number whose mutex this thread holds.

use super::die;
use super::lock::Lock;
use super::pages;
use super::place::{self, BUCKETS, Place};
use super::process;
use super::thread::Blocked;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

type Mutex = libc::pthread_mutex_t;

thread_word! {
    /// A [`Place`] in one word.
    static PLACE: u64 = Place::NONE.to_word();
}

/// One more than the highest number that was ever in use.
static HIGH: AtomicUsize = AtomicUsize::new(0);
static CHUNKS: [AtomicPtr<Mutex>; BUCKETS] = [const { AtomicPtr::new(ptr::null_mut()) }; BUCKETS];
/// Where the next search for a dead thread's number begins.
static CURSOR: Lock<usize> = Lock::new(0);

/// How many numbers a claim probes before it makes a new one. The limit bounds the time of a claim.
/// The limit also bounds the number of dead entries: once a large enough fraction of all numbers is
/// dead, a claim almost certainly finds one.
const PROBES: usize = 32;

#[inline(always)]
pub(super) fn place() -> Place {
    // INVARIANT: `PLACE` begins as `NONE`, and only `claim` sets it.
    Place::from_word(PLACE.get())
}

#[inline]
pub(super) fn high() -> usize {
    // Relaxed: a grace period, which needs the latest value, loads it after a heavy fence. `HIGH`
    // covers a thread's number before the thread's first count, ORDER(srcu-enter).
    HIGH.load(Ordering::Relaxed)
}

pub(super) fn place_or_claim() -> Place {
    match place() {
        Place::NONE => claim(),
        place => place,
    }
}

/// Returns this thread's number, for crates that keep per-thread data. Claiming a number allocates
/// nothing, and a signal handler may do it.
#[doc(hidden)]
pub fn thread_number() -> usize {
    place_or_claim().id()
}

/// Returns one more than the highest number that was ever in use. If the caller sees a store that a
/// thread made after its claim, the result is greater than that thread's number.
#[doc(hidden)]
#[inline]
pub fn thread_numbers() -> usize {
    high()
}

#[cold]
fn claim() -> Place {
    // The repair of a child ends the sections of all threads but one, so it must come before the
    // first section of any other thread.
    process::check();
    let _signals_wait = Blocked::new();
    // A signal handler may have claimed a number since the caller's check.
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
    // INVARIANT: `try_own` has locked the mutex of `id` for this thread.
    PLACE.set(place.to_word());
    place
}

/// Makes the number `high`, and claims it for this thread. The caller holds the lock of `CURSOR`.
fn add(high: usize) -> usize {
    let (bucket, _) = place::split(high);
    if bucket < BUCKETS && CHUNKS[bucket].load(Ordering::Relaxed).is_null() {
        let chunk = pages::map(place::slots_in(bucket) * size_of::<Mutex>());
        // ORDER(srcu-lock): Relaxed: every access to `CHUNKS` is under the lock, except in the
        // child of a fork, which has one thread.
        CHUNKS[bucket].store(chunk.as_ptr().cast(), Ordering::Relaxed);
    }
    init(mutex(high));
    if !try_own(mutex(high)) {
        die("a new robust mutex cannot be locked");
    }
    // INVARIANT: the mutex is initialised.
    HIGH.store(high + 1, Ordering::Relaxed);
    high
}

fn mutex(id: usize) -> *mut Mutex {
    let (bucket, at) = place::split(id);
    let Some(chunk) = CHUNKS.get(bucket) else {
        die("more threads than Linux can have")
    };
    // SAFETY: the offset must be inside the allocation. `add` maps room for all numbers of a
    // bucket, and every caller has a number for which `add` was called.
    unsafe { chunk.load(Ordering::Relaxed).add(at) }
}

fn init(mutex: *mut Mutex) {
    let mut robust = MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
    // SAFETY: the call needs room for an attribute object.
    unsafe { libc::pthread_mutexattr_init(robust.as_mut_ptr()) };
    // SAFETY: the call needs an initialised attribute object, which the line above made.
    let refused = unsafe {
        libc::pthread_mutexattr_setrobust(robust.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST)
    };
    // SAFETY: the call needs room for a mutex that is not in use. Either the number has not been
    // handed out, or this is the only thread of a forked child, where no other owner exists.
    let failed = unsafe { libc::pthread_mutex_init(mutex, robust.as_ptr()) };
    if refused != 0 || failed != 0 {
        die("the C library has no robust mutexes");
    }
}

fn try_own(mutex: *mut Mutex) -> bool {
    // SAFETY: the call needs an initialised mutex at a permanent address. The invariant of `HIGH`
    // guarantees that, or `add` has just initialised it.
    match unsafe { libc::pthread_mutex_trylock(mutex) } {
        0 => true,
        libc::EOWNERDEAD => {
            // ORDER(cache-number): the dead owner's stores happen before this claim, because the
            // kernel exchanges the mutex's word. Partner: the end of the owner.
            // SAFETY: the call needs a robust mutex that this thread has just locked with
            // `EOWNERDEAD`.
            unsafe { libc::pthread_mutex_consistent(mutex) };
            true
        }
        _ => false,
    }
}

/// Frees the numbers of the threads that exist only in the parent of a fork. Keeps this thread's
/// number.
pub(super) fn after_fork() {
    CURSOR.after_fork();
    for id in 0..HIGH.load(Ordering::Relaxed) {
        init(mutex(id));
    }
    if place() != Place::NONE && !try_own(mutex(place().id())) {
        die("a new robust mutex cannot be locked");
    }
}
