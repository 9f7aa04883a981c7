//! The ranges that libfabric's caches have registered, and which of them are stale.
//!
//! A change of memory is reported in the thread that makes it, perhaps inside `free`, with the
//! allocator's lock held. Registrations are entered under libfabric's lock and this table's, and
//! entering allocates. So the callback must not wait for the table: it *tries* the lock. If the
//! lock is held, the callback leaves a note: one bit in `pending` for each group of granules
//! ([`granules`]). The next thread that locks the table marks every range that shares a bit. So a
//! note can mark a valid range, and libfabric registers that range anew. A note never misses a
//! stale range.
//!
//! | | state of a range | leaves it by |
//! | --- | --- | --- |
//! | 1 | valid: `stale` is `None` | change, note or `limit` (2), `ask` (3), last unsubscription |
//! | 2 | stale, counted in `dirty` | last unsubscription, `ask` (3), `dropped` |
//! | 3 | parked: `count` is 0, `stale` is `None` | `subscribe` (1 or 2), parking of another range |
//!
//! `ask` refuses a range in state 1 only if its watch is invalid. A refused range that has no watch
//! is removed, not parked. `dropped` leads to state 1 if the range has newer registrations, and
//! otherwise removes the range.
//!
//! # Versions that never unsubscribe
//! Up to 2.0, libfabric drops a registration without a call of `unsubscribe`. So the table has to
//! find out by itself that a stale registration is gone. Otherwise each later registration of the
//! same range would be refused at every look-up.
//! * If `valid` has returned false and the range has one subscription, libfabric drops the
//!   registration for which it has called `valid`, and there is no other.
//! * If `notify` has returned, every cache has dropped the registrations that it had when `notify`
//!   was called. Later registrations are counted in `newer`. For evicted ones, see [`most`].
//!
//! After a refusal libfabric usually registers the range anew and subscribes. So the entry stays in
//! the table, parked. The refusal renews the entry's watch and waits until every older change is
//! over; from then on the watch is valid again. At most one entry is parked.
//!
//! If a range has several subscriptions, some may be of registrations that are long gone, and
//! libfabric does not tell `valid` for which registration it asks. So all registrations of the
//! range are refused until `notify` has returned.
//!
//! # The child of a fork
//! The caches of a child begin with registrations of its parent, which this table does not know.
//! The child can register one of these ranges anew in one cache, while another cache still holds
//! the parent's registration of the same range. libfabric does not tell `valid` which cache asks.
//! So every registration is refused, the child's own as well, until every cache has dropped all
//! that it had: [`Ranges::stale`] returns [`EVERYTHING`] first.
//!
//! # Invariants
//! `dirty` is the count of stale ranges, plus one while the caches may hold registrations of a
//! parent, and is changed under the lock only. `pending` is 0 or holds the bits of changes that
//! have not been entered yet. So if both are 0, no reported change has made a range stale.

mod most;

use crate::counts::Change;
use mmu_notifier::{Va, VaRange};
use mmu_source::Watch;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How often a callback tries to take the lock before it leaves a note. The lock is usually held
/// for some hundred instructions; for longer if its holder is preempted, is the callback's own
/// thread, or walks the whole table.
const TURNS: usize = 64;

/// Start without its tag, length in bytes, and the tag: the upper bits of the start, which only
/// some processors have (see [`Va::untagged`]). Changes are reported without tags, and libfabric
/// finds a registration only with its tag.
type Key = (u64, u64, u64);

fn key(start: u64, len: u64) -> Key {
    let plain = Va::untagged(start).get();
    (plain, len, start ^ plain)
}

#[derive(Debug)]
struct Entry {
    /// How many registrations of this range there are at most, in all caches: libfabric does not
    /// say which cache subscribes. 0 if the entry is parked, or is about to be.
    count: usize,
    stale: Option<Change>,
    /// If the range is stale: how many registrations are newer than the change, and newer than the
    /// last call of [`Ranges::stale`].
    newer: usize,
    /// The number of the last change that met the range, counted in [`Table::marks`].
    mark: u64,
    /// The number of the last subscription of this range, counted in [`Table::numbers`].
    number: u64,
    /// Tells whether the kernel has changed the range since the first of the registrations that are
    /// not stale, or, if the range is parked, since the refusal. `None` if the kernel source is not
    /// in use.
    watch: Option<Watch>,
}

impl Entry {
    /// Tells whether a change that is reported now makes a valid range stale. The range stays valid
    /// if the kernel has counted no change of the range since its registration. The change is then
    /// older than the registration, or it has not begun, and the kernel source will report it
    /// again. If `sees_all` is false, the kernel can miss a change that another source reports, so
    /// a valid watch says nothing about it.
    fn is_met(&self, sees_all: bool) -> bool {
        self.has_valid() && !(sees_all && self.watch.as_ref().is_some_and(Watch::is_valid))
    }

    /// Whether there may be a registration that no reported change has met.
    fn has_valid(&self) -> bool {
        self.count != 0 && (self.stale.is_none() || self.newer != 0)
    }

    /// Makes all registrations stale. Returns whether the range was valid before. `marks` numbers
    /// the changes.
    fn meet(&mut self, change: Change, marks: &mut u64) -> bool {
        *marks += 1;
        self.mark = *marks;
        self.newer = 0;
        self.stale.replace(change).is_none()
    }

    /// Stale if a change was reported, or if the kernel has counted a change that is not reported
    /// yet.
    fn verdict(&self, start: u64, len: u64) -> Verdict {
        match (&self.stale, &self.watch) {
            (Some(change), _) => Verdict::Stale(*change),
            (None, Some(watch)) if !watch.is_valid() => Verdict::Stale(counted(start, len)),
            (None, _) => Verdict::Valid,
        }
    }
}

/// Ranges by class of length, then by start: class `n` has lengths from `2^n` to `2^(n+1) - 1`. So
/// a range of class `n` that overlaps an address starts less than `2^(n+1)` bytes before it.
#[derive(Debug)]
struct Table {
    classes: [BTreeMap<Key, Entry>; 64],
    /// The classes that are not empty.
    used: u64,
    /// Numbers the changes that have made a range stale.
    marks: u64,
    /// Numbers the subscriptions.
    numbers: u64,
    /// Whether `unsubscribe` was ever called, so whether this version of libfabric unsubscribes.
    has_unsubscribed: bool,
    /// Whether the caches may hold registrations that a parent made before a fork.
    has_parents: bool,
    /// The parked entry.
    parked: Option<Key>,
}

/// A stale range, and the number of the change that made it stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stale {
    pub(crate) start: u64,
    pub(crate) len: u64,
    mark: u64,
}

impl Stale {
    /// Whether this is not one range, but all registrations of a parent.
    pub(crate) fn is_everything(&self) -> bool {
        *self == EVERYTHING
    }
}

/// All registrations of all caches. No stale range equals it, because marks begin at 1.
const EVERYTHING: Stale = Stale {
    start: 0,
    len: u64::MAX,
    mark: 0,
};

/// The watched ranges; the module's documentation describes them.
#[derive(Debug)]
pub(crate) struct Ranges {
    table: Mutex<Table>,
    dirty: AtomicUsize,
    pending: AtomicU64,
    /// Whether the kernel source counts every change. Then a range with a valid watch is unchanged.
    sees_all: bool,
}

/// The result of a look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Valid,
    Stale(Change),
    /// The registration is, or may be, one that a parent made before a fork.
    Unknown,
}

impl Ranges {
    /// Makes an empty table. In the child of a fork, the caches may hold registrations of the
    /// parent.
    pub(crate) const fn new(in_child: bool) -> Ranges {
        let table = Table {
            classes: [const { BTreeMap::new() }; 64],
            used: 0,
            marks: 0,
            numbers: 0,
            has_unsubscribed: false,
            has_parents: in_child,
            parked: None,
        };
        Ranges {
            table: Mutex::new(table),
            dirty: AtomicUsize::new(in_child as usize),
            pending: AtomicU64::new(0),
            sees_all: true,
        }
    }

    /// The same table, for a kernel source that may miss changes which another source reports.
    pub(crate) const fn with_doubt(mut self, may_miss: bool) -> Ranges {
        self.sees_all = !may_miss;
        self
    }

    /// Enters a registration of `start..start + len`. A range that has a valid registration keeps
    /// its watch. A stale range stays stale, because another cache may have registered it before
    /// the change. `make` makes a watch unless the range's entry is parked, and is called without
    /// the lock. If `make` fails, the range is stale at once. Returns true if this range is stale,
    /// or if the bound of the table has made other ranges stale. Then the caller must wake the
    /// thread that drops stale ranges.
    pub(crate) fn subscribe(
        &self,
        start: u64,
        len: u64,
        make: impl FnOnce() -> Result<Option<Watch>, Change>,
    ) -> bool {
        let mut table = self.lock();
        let class = class(len);
        let key = key(start, len);
        table.numbers += 1;
        let number = table.numbers;
        if table.parked == Some(key) {
            table.parked = None;
            let Table { classes, marks, .. } = &mut *table;
            if let Some(entry) = classes[class].get_mut(&key) {
                entry.count = 1;
                entry.number = number;
                // The watch sees every change since the refusal, so also a change between the
                // refusal and this registration.
                if entry.watch.is_some() && entry.is_met(true) {
                    self.add_dirty(entry.meet(counted(start, len), marks));
                }
                return entry.stale.is_some();
            }
        }
        drop(table);
        let made = make();
        table = self.lock();
        table.used |= 1 << class;
        // Another thread may have parked the entry meanwhile.
        table.parked.take_if(|parked| *parked == key);
        let Table { classes, marks, .. } = &mut *table;
        let entry = classes[class].entry(key).or_insert(Entry {
            count: 0,
            stale: None,
            newer: 0,
            mark: 0,
            number,
            watch: None,
        });
        // A change that is counted and not reported yet makes the older registrations stale.
        let is_changed = entry.watch.as_ref().is_some_and(|watch| !watch.is_valid());
        if entry.count != 0 && entry.has_valid() && is_changed {
            self.add_dirty(entry.meet(counted(start, len), marks));
        }
        let is_first = entry.count == 0 || !entry.has_valid();
        entry.count += 1;
        entry.number = number;
        entry.newer += usize::from(entry.stale.is_some());
        let watch = made.unwrap_or_else(|change| {
            self.add_dirty(entry.meet(change, marks));
            None
        });
        let unused = match is_first {
            true => std::mem::replace(&mut entry.watch, watch),
            false => watch,
        };
        // The new watch may be invalid already: the change was reported before the range was
        // entered, so no callback has met the range. Callbacks of later changes find the entry.
        if entry.is_met(true) && entry.watch.is_some() {
            self.add_dirty(entry.meet(counted(start, len), marks));
        }
        let is_stale = entry.stale.is_some() | self.limit(&mut table);
        // A watch that is not needed is dropped without the lock held, because the drop takes a
        // lock of the kernel source.
        drop(table);
        drop(unused);
        is_stale
    }

    /// Removes one registration of `start..start + len`, if there is one.
    pub(crate) fn unsubscribe(&self, start: u64, len: u64) {
        let mut table = self.lock();
        table.has_unsubscribed = true;
        let entry = table.classes[class(len)].get_mut(&key(start, len));
        let Some(entry) = entry.filter(|entry| entry.count != 0) else {
            return;
        };
        entry.count -= 1;
        entry.newer = entry.newer.min(entry.count);
        if entry.count == 0 {
            let removed = self.remove(&mut table, key(start, len));
            drop(table);
            drop(removed);
        }
    }

    /// Notes that every cache has dropped the registrations of a range that were there when
    /// [`stale`](Self::stale) returned it.
    pub(crate) fn dropped(&self, stale: Stale) {
        let mut table = self.lock();
        if stale.is_everything() {
            if std::mem::take(&mut table.has_parents) {
                // ORDER(dropin-dirty): Relaxed suffices, because every change holds the lock.
                self.dirty.fetch_sub(1, Ordering::Relaxed);
            }
            return;
        }
        let key = key(stale.start, stale.len);
        let Some(entry) = table.classes[class(stale.len)].get_mut(&key) else {
            return;
        };
        // The range was entered anew, or another change has met newer registrations: they may
        // still be cached.
        if entry.stale.is_none() || entry.mark != stale.mark {
            return;
        }
        if entry.newer != 0 {
            entry.count = entry.count.min(entry.newer);
            entry.newer = 0;
            entry.stale = None;
            // ORDER(dropin-dirty): Relaxed suffices, because every change holds the lock.
            self.dirty.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let removed = self.remove(&mut table, key);
        drop(table);
        drop(removed);
    }

    /// Removes an entry. The caller must drop the entry without the lock if it has a watch, because
    /// the drop of a watch takes a lock of the kernel source.
    fn remove(&self, table: &mut Table, key: Key) -> Option<Entry> {
        let class = class(key.1);
        table.parked.take_if(|parked| *parked == key);
        let removed = table.classes[class].remove(&key)?;
        if table.classes[class].is_empty() {
            table.used &= !(1 << class);
        }
        if removed.stale.is_some() {
            // ORDER(dropin-dirty): Relaxed suffices, because every change holds the lock.
            self.dirty.fetch_sub(1, Ordering::Relaxed);
        }
        Some(removed)
    }

    fn add_dirty(&self, is_new: bool) {
        // ORDER(dropin-dirty): Release. Partner: `is_clean`.
        self.dirty.fetch_add(usize::from(is_new), Ordering::Release);
    }

    /// Tells whether no range is stale and no note is pending. Costs two loads.
    #[inline]
    pub(crate) fn is_clean(&self) -> bool {
        // ORDER(dropin-dirty): Acquire, `pending` first. A change that happens before this call is
        // counted in `dirty`, or noted in `pending` if its callback did not get the lock. If the
        // first load sees the note, the result is false. If `enter_notes` has cleared the note, it
        // added to `dirty` first, which the second load sees. If `dirty` were loaded first, both
        // could be missed. Partner: `mark`, `enter_notes`.
        self.pending.load(Ordering::Acquire) == 0 && self.dirty.load(Ordering::Acquire) == 0
    }

    /// Looks up `start..start + len`: stale if a reported change or its watch says that the range
    /// has changed since it was subscribed. Runs no callback.
    #[cfg(test)]
    fn look(&self, start: u64, len: u64) -> Verdict {
        let table = self.lock();
        let entry = table.classes[class(len)].get(&key(start, len));
        let entry = entry.filter(|entry| entry.count != 0);
        entry.map_or(Verdict::Unknown, |entry| entry.verdict(start, len))
    }

    /// Looks a registration up for a cache. The caller holds the lock of all caches. If the result
    /// is not `Valid`, libfabric drops the registration before it unlocks. So a range with a single
    /// registration is parked, or removed if it has no watch.
    ///
    /// # Blocking
    /// If the range is parked, waits as [`Watch::renew`] does.
    #[cold]
    pub(crate) fn ask(&self, start: u64, len: u64) -> Verdict {
        let mut table = self.lock();
        // The entry can be of another cache, while libfabric asks for a registration of the parent.
        if table.has_parents {
            return Verdict::Unknown;
        }
        let key = key(start, len);
        let entry = table.classes[class(len)].get_mut(&key);
        let Some(entry) = entry.filter(|entry| entry.count != 0) else {
            return Verdict::Unknown;
        };
        let verdict = entry.verdict(start, len);
        if verdict == Verdict::Valid || entry.count > 1 {
            return verdict;
        }
        let Some(mut watch) = entry.watch.take() else {
            // The next subscription makes a watch, if there can be one.
            self.remove(&mut table, key);
            return verdict;
        };
        entry.count = 0;
        entry.newer = 0;
        if entry.stale.take().is_some() {
            // ORDER(dropin-dirty): Relaxed suffices, because every change holds the lock.
            self.dirty.fetch_sub(1, Ordering::Relaxed);
        }
        drop(table);
        // libfabric registers the range anew, and then subscribes. The watch sees each change that
        // begins from here on, also between these two steps. The renewal waits for older changes,
        // because libfabric could otherwise register pages that a change under way is about to
        // remove. After an error the watch stays invalid, so the next registration is stale at
        // once.
        let _ = watch.renew();
        self.park(key, watch);
        verdict
    }

    /// Parks a range that was refused, unless another thread has registered it meanwhile.
    fn park(&self, key: Key, watch: Watch) {
        let mut table = self.lock();
        let entry = table.classes[class(key.1)].get_mut(&key);
        let entry = entry.filter(|entry| entry.count == 0 && entry.watch.is_none());
        let unused = match entry {
            Some(entry) => {
                entry.watch = Some(watch);
                let before = table.parked.replace(key);
                let removed = before.and_then(|before| self.remove(&mut table, before));
                removed.and_then(|entry| entry.watch)
            }
            None => Some(watch),
        };
        // A watch is dropped without the lock held, because the drop takes a lock of the kernel
        // source.
        drop(table);
        drop(unused);
    }

    /// Marks the ranges that `change` overlaps as stale. Returns whether a range may be newly
    /// stale.
    ///
    /// For callbacks: allocates nothing and waits for no thread.
    pub(crate) fn changed(&self, change: Change) -> bool {
        for _ in 0..TURNS {
            if let Ok(mut table) = self.table.try_lock() {
                return self.mark(&mut table, change);
            }
            std::hint::spin_loop();
        }
        // ORDER(dropin-dirty): Release: the change itself follows this note. Partner: `is_clean`,
        // `lock`.
        self.pending
            .fetch_or(granules(change.range), Ordering::AcqRel);
        true
    }

    /// Whether the caches may hold registrations that a parent made before a fork.
    pub(crate) fn has_parents(&self) -> bool {
        self.lock().has_parents
    }

    /// Returns the ranges that are stale. The caller makes every cache drop them, and then calls
    /// [`dropped`](Self::dropped).
    pub(crate) fn stale(&self) -> Vec<Stale> {
        let mut table = self.lock();
        let parents = table.has_parents.then_some(EVERYTHING);
        let all = table.classes.iter_mut().flatten();
        let stale =
            all.filter(|(_, entry)| entry.stale.is_some())
                .map(|((start, len, tag), entry)| {
                    // `notify`, which the caller calls next, drops the newer registrations, too.
                    entry.newer = 0;
                    Stale {
                        start: start ^ tag,
                        len: *len,
                        mark: entry.mark,
                    }
                });
        parents.into_iter().chain(stale).collect()
    }

    /// How many ranges there are; `None` if the lock is held, perhaps by a thread that was stopped.
    pub(crate) fn count(&self) -> Option<usize> {
        let table = self.table.try_lock().ok()?;
        let entries = table.classes.iter().flatten();
        Some(entries.filter(|(_, entry)| entry.count != 0).count())
    }

    /// Locks the table and enters every note.
    fn lock(&self) -> MutexGuard<'_, Table> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        // ORDER(dropin-dirty): Acquire. Partner: `changed`.
        if self.pending.load(Ordering::Acquire) != 0 {
            self.enter_notes(&mut table);
        }
        table
    }

    #[cold]
    fn enter_notes(&self, table: &mut Table) {
        // Take the notes before the walk: a note that is set during the walk can be of a change
        // after its range was looked at. Meanwhile the table counts as dirty.
        // ORDER(dropin-dirty): Relaxed: the next line publishes it.
        self.dirty.fetch_add(1, Ordering::Relaxed);
        // ORDER(dropin-dirty): Acquire of the notes; Release: publishes the new `dirty` before the
        // bits are cleared. Partners: `changed`, `is_clean`.
        let bits = self.pending.swap(0, Ordering::AcqRel);
        let mut marked = 0;
        let Table { classes, marks, .. } = table;
        for ((start, len, _), entry) in classes.iter_mut().flatten() {
            let Some(range) = covering(*start, *len) else {
                continue;
            };
            if granules(range) & bits != 0 && entry.is_met(self.sees_all) {
                let change = Change {
                    event: "a change nearby",
                    range,
                };
                marked += usize::from(entry.meet(change, marks));
            }
        }
        #[cfg(test)]
        tests::after_the_walk(self);
        // ORDER(dropin-dirty): Release: the marks come first. Partner: `is_clean`.
        self.dirty
            .fetch_add(marked.wrapping_sub(1), Ordering::Release);
    }

    fn mark(&self, table: &mut Table, change: Change) -> bool {
        let start = change.range.start().get();
        // `None` is the end of the address space.
        let end = change.range.end().map(|end| end.get());
        let (mut marked, mut is_met) = (0, false);
        let Table {
            classes,
            marks,
            used,
            ..
        } = table;
        let mut used = *used;
        while used != 0 {
            let class = used.trailing_zeros() as usize;
            used &= used - 1;
            let longest = (2_u64 << class).wrapping_sub(1);
            let from = start.saturating_sub(longest);
            let entries = classes[class].range_mut((from, 0, 0)..);
            let entries = entries.take_while(|((at, ..), _)| end.is_none_or(|end| *at < end));
            for ((at, len, _), entry) in entries {
                if at.saturating_add(*len) > start && entry.is_met(self.sees_all) {
                    marked += usize::from(entry.meet(change, marks));
                    is_met = true;
                }
            }
        }
        if marked != 0 {
            // ORDER(dropin-dirty): Release. Partner: `is_clean`.
            self.dirty.fetch_add(marked, Ordering::Release);
        }
        is_met
    }
}

/// A change that the kernel source has counted and not reported yet.
fn counted(start: u64, len: u64) -> Change {
    Change {
        event: "a change that the kernel counted",
        range: covering(start, len).unwrap_or(VaRange::ALL),
    }
}

fn class(len: u64) -> usize {
    len.max(1).ilog2() as usize
}

fn covering(start: u64, len: u64) -> Option<VaRange> {
    VaRange::covering(Va::untagged(start), len).ok()
}

/// One bit for each granule of 2 MiB that a range overlaps, modulo 64.
fn granules(range: VaRange) -> u64 {
    const SHIFT: u32 = 21;
    let first = range.start().get() >> SHIFT;
    let last = range.end().map_or(u64::MAX, |end| end.get() - 1) >> SHIFT;
    if last - first >= 63 {
        return u64::MAX;
    }
    let bits = (2_u64 << (last - first)) - 1;
    bits.rotate_left((first % 64) as u32)
}

#[cfg(test)]
mod tests;
