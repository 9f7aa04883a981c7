//! The registration caches of UCX, and the order between a report and a look-up.
//!
//! From 1.14 on, UCP's look-up is compiled into `libucp`. It makes three steps:
//! 1. If the cache's queue of invalidations is not empty, the look-up takes the slow path.
//! 2. It calls `ucs_pgtable_lookup` with the cache's page table. A null result means the slow path.
//! 3. It checks and returns the region.
//!
//! The slow path, `ucs_rcache_get`, handles the queue and searches again. If a report comes between
//! the steps 1 and 2, it may be in the queue while its stale region is still in the page table. So
//! this library, which defines `ucs_pgtable_lookup`, returns null if there was a report since the
//! cache's last look-up. For the caches that are noted here, null is always a correct answer: it
//! costs the slow path, no more.
//!
//! UCP's caches of imported memory are noted only as such, because null could be wrong there.
//! After null, UCP attaches the region that the slow path returns, even if the slow path has
//! found an old one.
//!
//! # Case analysis
//! A change happens before a look-up by UCP. Step 2 waits until the change is reported, and then
//! reads the count of reports, which includes the report of this change.
//! * If the cache has not seen this count, the result is null.
//! * If the cache has seen this count, an earlier look-up of the cache has read it. UCP does not
//!   look up in one cache from two threads at once: a context that threads share has a lock, and
//!   the program must not use any other context from two threads at once. So the report ended
//!   before step 1 of this look-up. Either step 1 found the report in the queue and took the slow
//!   path, or the queue had been handled before, so the page table is up to date.
//!
//! A change that was put off ([`late`](crate::late)) is counted before it is reported. If step 2 of
//! a look-up by UCP reads this count first, the look-up takes the slow path, in which
//! `ucs_rcache_get` makes the report.
//!
//! The caches of transports can be searched by several threads at once. Their look-ups do not need
//! the count: they call `ucs_rcache_get`, which waits for the reports before it reads the queue.
//!
//! # A miss
//! The slow path holds the cache's lock while it handles the queue, inserts a new region into the
//! page table, and registers the region's memory. A change that only the `kernel` source sees is
//! reported once, when it begins. If it is still under way, the registration could be of the old
//! pages. So this library, which defines `ucs_pgtable_insert`, waits there until every change is
//! over that was counted so far. The cases of a change:
//! * It was counted before the wait began. Then it is over when the memory is registered.
//! * It was counted later. Then its report finds the lock held, and the range is queued behind the
//!   handled ones; or it finds the region in the page table. The next look-up does not find the
//!   region.
//!
//! A report that came before the slow path took the lock is of a change in the first case: the
//! thread that made the report had read the record of the change.
//!
//! The wait runs no callback, and callbacks only try the cache's lock. So no thread for which the
//! wait waits needs that lock.
//!
//! # Other page tables
//! Other objects have page tables as well, such as UCX's cache of memory types. Their look-ups are
//! passed to the real function, because null has another meaning there.

#![allow(
    unsafe_code,
    reason = "pointers that are published once and never freed"
)]

use super::{context, locks};
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

/// A cache's page table begins less than this many bytes after the cache's address: at byte 72 to
/// 136 in UCX 1.12 to 1.22. A cache has at least 264 bytes, so no other object's page table begins
/// in these bytes.
const TABLE_WITHIN: usize = 192;

/// Functions of one `libucs`. Addresses of code that stays loaded.
#[derive(Debug, Default)]
pub(super) struct Functions {
    pub(super) get: AtomicPtr<c_void>,
    pub(super) destroy: AtomicPtr<c_void>,
}

/// A cache. Entries are never freed; an entry whose cache was destroyed is used again.
#[derive(Debug)]
pub(super) struct Entry {
    /// The address of the cache; 0 if it was destroyed.
    cache: AtomicUsize,
    /// The count of reports that the cache's look-ups have seen. [`NONE`] before the first look-up,
    /// which therefore takes the slow path.
    seen: AtomicU64,
    /// The functions of the cache's `libucs`.
    real: Functions,
    /// The address of the cache's page table; 0 before the first registration.
    table: AtomicUsize,
    /// Whether the places of the cache's locks are known.
    has_locks: AtomicBool,
    /// Whether the cache holds imported memory.
    is_imported: AtomicBool,
    /// The address of the UCP context's pointer to the cache, before the first look-up; then 0.
    pointer: AtomicUsize,
    /// The address of the UCP context's lock; 0 if it is not known.
    context: AtomicUsize,
    /// How many of the cache's locks, or of the context's one lock, the thread that forks holds.
    held: AtomicUsize,
    next: *const Entry,
}

// SAFETY: `next` is written before the entry is published, and points to an entry, which is never
// freed.
unsafe impl Sync for Entry {}

const NONE: u64 = u64::MAX;

static FIRST: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());

/// The count of reports to UCX that have ended, and of changes that were put off
/// ([`late`](crate::late)).
static REPORTS: AtomicU64 = AtomicU64::new(0);

/// Called after each report to UCX, and after each change that was put off.
pub(super) fn reported() {
    // ORDER(dropin-reports): Release, for the report's effect in UCX. Partner: `reports`.
    REPORTS.fetch_add(1, Ordering::Release);
}

fn entries() -> impl Iterator<Item = &'static Entry> {
    // ORDER(dropin-caches): Acquire, for the entry's content. Partner: the exchange in `add`.
    let first = FIRST.load(Ordering::Acquire);
    // SAFETY: the pointer is null or comes from `Box::leak` in `add`, and entries are never freed.
    std::iter::successors(unsafe { first.as_ref() }, |entry| {
        // SAFETY: `next` is null or comes from `Box::leak` as well, and entries are never freed.
        unsafe { entry.next.as_ref() }
    })
}

/// What is known of a new cache.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Kind {
    /// Whether the places of the cache's locks are known.
    pub(super) has_locks: bool,
    /// Whether the cache holds imported memory. Its look-ups are not checked: see the module.
    pub(super) is_imported: bool,
    /// The address of the UCP context's pointer to the cache; 0 if the cache has no context.
    pub(super) pointer: usize,
}

/// Adds a new cache, with the functions of its `libucs`.
pub(super) fn add(cache: usize, real: Functions, kind: Kind) {
    // All accesses but the exchange of `FIRST` are relaxed, because the creation of a cache happens
    // before its look-ups.
    let is_taken = |entry: &Entry| {
        entry
            .cache
            .compare_exchange(0, cache, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    };
    if let Some(entry) = entries().find(|entry| is_taken(entry)) {
        entry.seen.store(NONE, Ordering::Relaxed);
        entry.has_locks.store(kind.has_locks, Ordering::Relaxed);
        entry.is_imported.store(kind.is_imported, Ordering::Relaxed);
        entry.pointer.store(kind.pointer, Ordering::Relaxed);
        let copy = |to: &AtomicPtr<c_void>, from: AtomicPtr<c_void>| {
            to.store(from.into_inner(), Ordering::Relaxed);
        };
        copy(&entry.real.get, real.get);
        copy(&entry.real.destroy, real.destroy);
        return;
    }
    let entry = Box::leak(Box::new(Entry {
        cache: AtomicUsize::new(cache),
        seen: AtomicU64::new(NONE),
        real,
        table: AtomicUsize::new(0),
        has_locks: AtomicBool::new(kind.has_locks),
        is_imported: AtomicBool::new(kind.is_imported),
        pointer: AtomicUsize::new(kind.pointer),
        context: AtomicUsize::new(0),
        held: AtomicUsize::new(0),
        next: FIRST.load(Ordering::Relaxed),
    }));
    loop {
        let next = entry.next.cast_mut();
        // ORDER(dropin-caches): Release, for the entry's content. Partner: `entries`.
        match FIRST.compare_exchange(next, entry, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => return,
            Err(first) => entry.next = first,
        }
    }
}

/// Removes a cache that is about to be destroyed. If a thread that forks can use the cache, the
/// caller has entered (`fork::enter_after_fork`).
pub(super) fn remove(cache: usize) {
    if let Some(entry) = entry(cache) {
        // Relaxed: no thread forks now, and the next one that forks sees these stores
        // (ORDER(dropin-fork)).
        entry.table.store(0, Ordering::Relaxed);
        entry.context.store(0, Ordering::Relaxed);
        entry.cache.store(0, Ordering::Relaxed);
    }
}

/// What the thread that forks takes.
#[derive(Clone, Copy, Debug)]
enum Lock {
    /// The lock of a UCP context, from UCX 1.14 on.
    Context(usize),
    /// The locks of a transport's cache with this page table, in UCX 1.12 and 1.13.
    Cache(usize),
}

/// The known locks that may be in use.
fn all_locks() -> impl Iterator<Item = (&'static Entry, Lock)> {
    entries().filter_map(|entry| Some((entry, entry.lock()?)))
}

/// Takes the locks of every context and cache, except those that are not free until `end`.
///
/// For the thread that forks. Its accesses to `held` are relaxed, because no other thread accesses
/// it, and because a cache is removed only while no thread forks.
pub(super) fn take_locks(end: Instant) {
    // The locks of contexts first: a look-up that holds one can report changes, and then waits for
    // a lock of each cache.
    for (entry, lock) in all_locks() {
        if let Lock::Context(lock) = lock {
            let is_taken = context::take(lock, end);
            entry.held.store(is_taken.into(), Ordering::Relaxed);
        }
    }
    for (entry, lock) in all_locks() {
        if let Lock::Cache(table) = lock {
            entry.held.store(locks::take(table, end), Ordering::Relaxed);
        }
    }
}

/// Releases the locks that [`take_locks`] has taken.
pub(super) fn release_locks() {
    release_with(locks::release);
}

/// Makes the locks anew that [`take_locks`] has taken, in the child of a fork.
pub(super) fn renew_locks() {
    release_with(locks::renew);
}

fn release_with(release: impl Fn(usize, usize)) {
    for (entry, lock) in all_locks() {
        match (lock, entry.held.swap(0, Ordering::Relaxed)) {
            (_, 0) => {}
            (Lock::Context(lock), _) => context::release(lock),
            (Lock::Cache(table), held) => release(table, held),
        }
    }
}

/// The entry of a cache; `None` if it was not added.
pub(super) fn entry(cache: usize) -> Option<&'static Entry> {
    entries().find(|entry| entry.cache.load(Ordering::Relaxed) == cache)
}

/// The cache with this page table, unless the cache holds imported memory.
#[inline]
pub(super) fn with_table(table: usize) -> Option<&'static Entry> {
    entries().find(|entry| {
        let cache = entry.cache.load(Ordering::Relaxed);
        table.wrapping_sub(cache) < TABLE_WITHIN && !entry.is_imported()
    })
}

impl Entry {
    /// Notes where the cache's page table is.
    #[inline]
    pub(super) fn note_table(&self, table: usize) {
        self.table.store(table, Ordering::Relaxed);
    }

    /// Searches the lock of the cache's UCP context, in the first look-up, which holds it.
    pub(super) fn find_lock(&self) {
        // Relaxed: one cache's look-ups by UCP do not run at once.
        let pointer = self.pointer.load(Ordering::Relaxed);
        if pointer != 0 {
            self.pointer.store(0, Ordering::Relaxed);
            let lock = context::find(pointer).unwrap_or(0);
            // ORDER(dropin-context): Release, for the lock's content. Partner: `lock`.
            self.context.store(lock, Ordering::Release);
        }
    }

    /// The lock of this cache or of its context, if it is known and may be in use.
    fn lock(&self) -> Option<Lock> {
        // ORDER(dropin-context): Acquire, for the lock's content. Partner: `find_lock`.
        let context = self.context.load(Ordering::Acquire);
        let table = self.table.load(Ordering::Relaxed);
        let has_locks = table != 0 && self.has_locks();
        if self.cache.load(Ordering::Relaxed) == 0 {
            return None;
        }
        match context {
            0 => has_locks.then_some(Lock::Cache(table)),
            lock => Some(Lock::Context(lock)),
        }
    }

    /// Whether the places of the cache's locks are known: in UCX 1.12 and 1.13.
    pub(super) fn has_locks(&self) -> bool {
        self.has_locks.load(Ordering::Relaxed)
    }

    pub(super) fn is_imported(&self) -> bool {
        self.is_imported.load(Ordering::Relaxed)
    }

    pub(super) fn real(&self) -> &Functions {
        &self.real
    }

    /// Whether the cache's look-ups have seen all that [`REPORTS`] counts.
    #[inline]
    pub(super) fn has_seen_all(&self) -> bool {
        // Relaxed: one cache's look-ups by UCP do not run at once, and other look-ups do not need
        // the result (see the module).
        self.seen.load(Ordering::Relaxed) == reports()
    }

    /// Returns the same as `has_seen_all`, and notes that the cache's look-ups have now seen all.
    pub(super) fn sees_all(&self) -> bool {
        let reports = reports();
        let has_seen = self.seen.load(Ordering::Relaxed) == reports;
        if !has_seen {
            self.seen.store(reports, Ordering::Relaxed);
        }
        has_seen
    }
}

#[inline]
fn reports() -> u64 {
    // ORDER(dropin-reports): Acquire, so that the slow path finds the report's effect. Partner:
    // `reported`.
    REPORTS.load(Ordering::Acquire)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_table_belongs_to_the_cache_around_it() {
        let caches = [0x10000, 0x20000];
        for cache in caches {
            add(cache, Functions::default(), Kind::default());
        }
        for cache in caches {
            assert!(entry(cache).is_some());
            let found = with_table(cache + 72).expect("the table is inside");
            assert_eq!(found.cache.load(Ordering::Relaxed), cache);
            assert!(with_table(cache + 136).is_some());
            assert!(with_table(cache - 8).is_none());
            assert!(with_table(cache + TABLE_WITHIN).is_none());
        }
        remove(0x10000);
        assert!(entry(0x10000).is_none() && with_table(0x10000 + 72).is_none());
        let count = entries().count();
        add(0x30000, Functions::default(), Kind::default());
        assert!(entry(0x30000).is_some());
        assert_eq!(entries().count(), count, "the entry was used again");
    }

    #[test]
    fn each_cache_sees_a_report_once() {
        add(0x50000, Functions::default(), Kind::default());
        add(0x60000, Functions::default(), Kind::default());
        let [one, other] = [0x50000, 0x60000].map(|cache| with_table(cache).expect("added"));
        reported();
        for entry in [one, other] {
            assert!(!entry.has_seen_all() && !entry.sees_all());
            assert!(entry.has_seen_all() && entry.sees_all());
        }
    }
}
