//! The locks of a transport's cache in UCX 1.12 and 1.13, which the thread that forks takes (see
//! [`fork`](super::fork)).
//!
//! UCX has no function that takes these locks. Their places relative to the cache's page table:
//!
//! | protects | type | place |
//! | --- | --- | --- |
//! | the page table | `pthread_rwlock_t` | ends where the page table begins |
//! | the queue of invalidations | `pthread_spinlock_t` | byte 48 |
//! | the list of unused regions | `pthread_spinlock_t` | byte 128 |
//!
//! UCX takes the other locks while it holds the first one, and never the other way round.
//!
//! # Safety
//! The caller passes the page table of a cache of one of these versions, and the cache is not
//! destroyed meanwhile.

#![allow(unsafe_code, reason = "structures of UCX; see the Safety section")]

use std::ffi::c_int;
use std::ptr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The places of the spin locks.
const SPIN_LOCKS: [usize; 2] = [48, 128];

unsafe extern "C" {
    fn pthread_rwlock_timedwrlock(
        lock: *mut libc::pthread_rwlock_t,
        until: *const libc::timespec,
    ) -> c_int;
    pub(super) fn pthread_spin_trylock(lock: *mut c_int) -> c_int;
    pub(super) fn pthread_spin_unlock(lock: *mut c_int) -> c_int;
}

/// Whether a version's caches have these locks.
pub(super) fn are_known(version: (u32, u32)) -> bool {
    matches!(version, (1, 12 | 13))
}

/// How often [`until`] polls before it yields the processor: some 50 us.
const POLLS: u32 = 100;

/// Waits until `is_done`. Returns false if that takes longer than until `end`.
pub(super) fn until(end: Instant, is_done: impl Fn() -> bool) -> bool {
    let mut polls = 0_u32;
    loop {
        if is_done() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        polls += 1;
        // A thread that runs is done within microseconds. A preempted one needs a processor, which
        // other threads may use to spin for the lock. After a sleep, unlike after a `sched_yield`,
        // the scheduler prefers this thread to those.
        match polls % POLLS {
            0 => std::thread::sleep(Duration::from_micros(100)),
            _ => std::hint::spin_loop(),
        }
    }
}

fn first(table: usize) -> *mut libc::pthread_rwlock_t {
    ptr::with_exposed_provenance_mut(table - size_of::<libc::pthread_rwlock_t>())
}

/// Takes the locks one after the other, until one is not free until `end`. Returns how many it has
/// taken.
pub(super) fn take(table: usize, end: Instant) -> usize {
    // In slices, because the clock of the function may be set back.
    if !until(end, || timed_write_lock(first(table))) {
        return 0;
    }
    let is_taken = |place: &&usize| {
        let lock = ptr::with_exposed_provenance_mut(table + *place);
        // SAFETY: the lock lies in a live cache (see the module's # Safety).
        until(end, || unsafe { pthread_spin_trylock(lock) } == 0)
    };
    1 + SPIN_LOCKS.iter().take_while(is_taken).count()
}

/// Takes a lock within a tenth of a second.
fn timed_write_lock(lock: *mut libc::pthread_rwlock_t) -> bool {
    let at = SystemTime::now() + Duration::from_millis(100);
    let at = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let at = libc::timespec {
        tv_sec: at.as_secs() as libc::time_t,
        tv_nsec: i64::from(at.subsec_nanos()),
    };
    // SAFETY: the lock lies in a live cache (see the module's # Safety), and the time is valid.
    unsafe { pthread_rwlock_timedwrlock(lock, &raw const at) == 0 }
}

/// Releases the first `taken` locks, which this thread has taken.
pub(super) fn release(table: usize, taken: usize) {
    release_others(table, taken);
    if taken != 0 {
        // SAFETY: the lock lies in a live cache (see the module's # Safety), and this thread has
        // taken it.
        unsafe { libc::pthread_rwlock_unlock(first(table)) };
    }
}

/// Makes the first `taken` locks anew, in the child of a fork. The first lock also counts threads
/// that waited for it, which the child does not have. So to release it is not enough.
pub(super) fn renew(table: usize, taken: usize) {
    release_others(table, taken);
    if taken != 0 {
        // SAFETY: the lock lies in a live cache (see the module's # Safety). No other thread uses
        // it, because the child has one thread. UCX makes it without attributes, too.
        unsafe { libc::pthread_rwlock_init(first(table), ptr::null()) };
    }
}

fn release_others(table: usize, taken: usize) {
    for place in SPIN_LOCKS.iter().take(taken.saturating_sub(1)) {
        let lock = ptr::with_exposed_provenance_mut(table + place);
        // SAFETY: the lock lies in a live cache (see the module's # Safety), and this thread has
        // taken it.
        unsafe { pthread_spin_unlock(lock) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_locks_are_taken_one_after_the_other_and_released() {
        let memory = Box::leak(Box::new([0_u64; 64]));
        let table = ptr::from_mut(memory).expose_provenance() + 64;
        let now = Instant::now();
        renew(table, 3);
        assert_eq!(take(table, now), 3);
        assert_eq!(take(table, now), 0);
        release(table, 3);
        assert_eq!(take(table, now), 3);
        renew(table, 2);
        assert_eq!(take(table, now), 2, "the third lock is still held");
        assert!(are_known((1, 13)) && !are_known((1, 14)));
    }
}
