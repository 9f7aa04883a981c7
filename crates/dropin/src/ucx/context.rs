//! The lock of a UCP context, from UCX 1.14 on, which the thread that forks takes (see
//! [`fork`](super::fork)).
//!
//! If threads share the context, UCP holds this lock while it looks up in a cache of the context,
//! registers memory, or releases a registration. UCX has no function that takes the lock. So the
//! first look-up in the context's cache searches the context for it: the thread that looks up holds
//! the lock, and the lock names its owner. The lock lies behind the context's pointer to the cache
//! (664 to 976 bytes behind it in UCX 1.14 to 1.22):
//!
//! | content | type | place |
//! | --- | --- | --- |
//! | the kind: [`SPIN`], [`MUTEX`] or 0 (no lock) | `int` | byte 0 |
//! | the lock: a spin lock, or a mutex | `pthread_spinlock_t` or `pthread_mutex_t` | byte 8 |
//! | how often the owner of the spin lock has taken it | `int` | byte 12 |
//! | the owner of the spin lock | `pthread_t` | byte 16 |
//! | zeros, in the rest of a spin lock's place, which has room for a mutex | | from byte 24 |
//! | the context's name, not empty | 32 bytes of text | behind the mutex |
//!
//! # Safety
//! The caller passes what [`find`] has returned, while the context exists.

#![allow(unsafe_code, reason = "structures of UCX; see the Safety section")]

use super::locks::{pthread_spin_trylock, pthread_spin_unlock, until};
use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::Instant;

const SPIN: i32 = 1;
const MUTEX: i32 = 2;

const LOCK: usize = 8;
const COUNT: usize = 12;
const OWNER: usize = 16;
const NAME: usize = LOCK + size_of::<libc::pthread_mutex_t>();
const NAME_LEN: usize = 32;

/// The owner of a free spin lock.
const NO_OWNER: usize = usize::MAX;
/// What a normal mutex of glibc has at these bytes: how often its owner has taken it again, the
/// owner's thread id, and the count of owners. The rest is zeros.
const MUTEX_COUNT: usize = 4;
const MUTEX_OWNER: usize = 8;
const MUTEX_USERS: usize = 12;

/// How many bytes behind the pointer to the cache are searched.
const WITHIN: usize = 1536;

/// Searches the context whose pointer to its cache is at the address `pointer`. `None` if the
/// context has no lock, or if the calling thread does not hold it.
pub(super) fn find(pointer: usize) -> Option<usize> {
    let mut bytes = [0; WITHIN];
    let read = read(pointer, &mut bytes);
    let at = (0..read).step_by(8).find(|at| {
        let bytes = bytes[*at..read].get(..NAME + NAME_LEN);
        bytes.is_some_and(is_held_here)
    })?;
    Some(pointer + at)
}

/// Whether the bytes are a lock that the calling thread holds, and the context's name.
fn is_held_here(bytes: &[u8]) -> bool {
    let word = |at: usize| {
        let four = bytes[at..].first_chunk().copied();
        four.map_or(0, i32::from_ne_bytes)
    };
    let are_zero = |from: usize| bytes[from..NAME].iter().all(|byte| *byte == 0);
    let owner = bytes[OWNER..].first_chunk().copied();
    let is_held = match word(0) {
        SPIN => {
            word(COUNT) > 0
                && owner.map(usize::from_ne_bytes) == Some(this_thread())
                && are_zero(OWNER + size_of::<libc::pthread_t>())
        }
        MUTEX => {
            word(LOCK) != 0
                && word(LOCK + MUTEX_COUNT) == 0
                // SAFETY: the call has no arguments, and always succeeds.
                && word(LOCK + MUTEX_OWNER) == unsafe { libc::gettid() }
                && word(LOCK + MUTEX_USERS) == 1
                && are_zero(LOCK + MUTEX_USERS + size_of::<c_int>())
        }
        _ => false,
    };
    let mut name = bytes[NAME..].splitn(2, |byte| *byte == 0);
    let text = name.next().unwrap_or_default();
    let is_text = !text.is_empty() && text.iter().all(|byte| (b' '..=b'~').contains(byte));
    is_held && is_text && name.next().is_some()
}

fn this_thread() -> usize {
    // SAFETY: the call has no arguments, and always succeeds.
    unsafe { libc::pthread_self() as usize }
}

/// Reads the memory at `from`, or its beginning if the memory ends earlier. Returns how many bytes
/// were read.
fn read(from: usize, bytes: &mut [u8]) -> usize {
    // The kernel reads whole pieces, so each piece ends where a page can end.
    const PIECE: usize = 4096;
    let first = bytes.len().min(PIECE - from % PIECE);
    let to = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let piece = |start: usize, len| libc::iovec {
        iov_base: ptr::without_provenance_mut(start),
        iov_len: len,
    };
    let pieces = [piece(from, first), piece(from + first, bytes.len() - first)];
    // SAFETY: the call has no arguments, and always succeeds.
    let own = unsafe { libc::getpid() };
    // SAFETY: the kernel writes into `bytes`, which are as long as `to` says. It checks the pieces.
    let read = unsafe { libc::process_vm_readv(own, &raw const to, 1, pieces.as_ptr(), 2, 0) };
    usize::try_from(read).unwrap_or(0)
}

fn word(lock: usize, place: usize) -> &'static AtomicI32 {
    // SAFETY: the word lies in a live lock of a context (see the module's # Safety), and is
    // aligned. UCX's own accesses are those of the lock's owner, or of an aligned word.
    unsafe { AtomicI32::from_ptr(ptr::with_exposed_provenance_mut(lock + place)) }
}

fn owner(lock: usize) -> &'static AtomicUsize {
    // SAFETY: as in `word`.
    unsafe { AtomicUsize::from_ptr(ptr::with_exposed_provenance_mut(lock + OWNER)) }
}

fn spin(lock: usize) -> *mut c_int {
    ptr::with_exposed_provenance_mut(lock + LOCK)
}

fn mutex(lock: usize) -> *mut libc::pthread_mutex_t {
    ptr::with_exposed_provenance_mut(lock + LOCK)
}

/// Takes a lock. Returns false if the lock is not free until `end`.
///
/// The accesses to words are relaxed: the spin lock orders them, and only its owner finds its own
/// name in it.
pub(super) fn take(lock: usize, end: Instant) -> bool {
    if word(lock, 0).load(Ordering::Relaxed) == MUTEX {
        // SAFETY: the mutex lies in a live context (see the module's # Safety).
        let try_lock = || unsafe { libc::pthread_mutex_trylock(mutex(lock)) } == 0;
        return until(end, try_lock);
    }
    let has = owner(lock).load(Ordering::Relaxed) == this_thread();
    // SAFETY: the lock lies in a live context (see the module's # Safety).
    let try_lock = || unsafe { pthread_spin_trylock(spin(lock)) } == 0;
    if !has && !until(end, try_lock) {
        return false;
    }
    owner(lock).store(this_thread(), Ordering::Relaxed);
    word(lock, COUNT).fetch_add(1, Ordering::Relaxed);
    true
}

/// Releases a lock that this thread has taken, in the parent or in the child of a fork: the thread
/// that forks has the same `pthread_t` in both, and neither lock counts the threads that wait.
pub(super) fn release(lock: usize) {
    if word(lock, 0).load(Ordering::Relaxed) == MUTEX {
        // SAFETY: the mutex lies in a live context (see the module's # Safety), and this thread has
        // taken it. It is a normal mutex, whose release does not check the thread's id.
        unsafe { libc::pthread_mutex_unlock(mutex(lock)) };
        return;
    }
    if word(lock, COUNT).fetch_sub(1, Ordering::Relaxed) == 1 {
        owner(lock).store(NO_OWNER, Ordering::Relaxed);
        // SAFETY: the lock lies in a live context (see the module's # Safety), and this thread has
        // taken it.
        unsafe { pthread_spin_unlock(spin(lock)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A context with a lock of the kind `kind`, which the calling thread holds. Returns the
    /// address of the pointer to the cache.
    fn context(kind: i32, place: usize) -> usize {
        let memory = Box::leak(Box::new([0_u64; 512]));
        let pointer = ptr::from_mut(memory).expose_provenance();
        let lock = pointer + place;
        word(lock, 0).store(kind, Ordering::Relaxed);
        word(lock, NAME).store(i32::from_ne_bytes(*b"name"), Ordering::Relaxed);
        if kind == MUTEX {
            // SAFETY: the memory is large enough, aligned, and no other thread's.
            unsafe { libc::pthread_mutex_init(mutex(lock), ptr::null()) };
        } else {
            // SAFETY: as above.
            unsafe { libc::pthread_spin_init(spin(lock), 0) };
            owner(lock).store(NO_OWNER, Ordering::Relaxed);
        }
        assert!(take(lock, Instant::now()));
        pointer
    }

    fn elsewhere<T: Send>(f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| scope.spawn(f).join().unwrap())
    }

    #[test]
    fn the_thread_that_holds_the_lock_finds_it() {
        for kind in [SPIN, MUTEX] {
            for place in [664, 976] {
                let pointer = context(kind, place);
                let lock = pointer + place;
                assert_eq!(find(pointer), Some(lock));
                assert_eq!(elsewhere(|| find(pointer)), None, "another thread holds it");
                word(lock, NAME).store(0, Ordering::Relaxed);
                assert_eq!(find(pointer), None, "no name follows");
                word(lock, NAME).store(1, Ordering::Relaxed);
                assert_eq!(find(pointer), None, "no text follows");
                word(lock, NAME).store(i32::from_ne_bytes(*b"name"), Ordering::Relaxed);
                word(lock, NAME - 4).store(1, Ordering::Relaxed);
                assert_eq!(find(pointer), None, "the lock's place has other content");
                word(lock, NAME - 4).store(0, Ordering::Relaxed);
                assert_eq!(find(pointer), Some(lock));
                release(lock);
                assert_eq!(find(pointer), None, "the lock is free");
                assert!(elsewhere(|| take(lock, Instant::now())));
                assert!(!take(lock, Instant::now()));
            }
        }
    }

    #[test]
    fn the_owner_of_a_spin_lock_takes_it_twice() {
        let lock = context(SPIN, 664) + 664;
        assert!(take(lock, Instant::now()));
        release(lock);
        assert!(!elsewhere(|| take(lock, Instant::now())));
        release(lock);
        assert!(elsewhere(|| take(lock, Instant::now())));
    }

    #[test]
    fn memory_is_read_up_to_its_end() {
        let mut bytes = [0; WITHIN];
        assert_eq!(read(0, &mut bytes), 0);
        let page = 65536;
        // SAFETY: a new mapping.
        let at = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(ptr::null_mut(), 2 * page, libc::PROT_READ, flags, -1, 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: the second half of the new mapping, which has no other use.
        unsafe { libc::munmap(at.wrapping_byte_add(page), page) };
        assert_eq!(read(at.addr() + page - 100, &mut bytes), 100);
        assert_eq!(read(at.addr(), &mut bytes), WITHIN);
    }
}
