//! The hash table from granules to regions: open addressing, read without a lock, written under the
//! cache's.
//!
//! An entry is one word: the region's name in the upper half, the granule's hash in the lower. A
//! region's name is its number plus one, so that zero is none. A look-up that runs while an entry
//! moves may miss it, or meet it twice. A miss asks again under the lock, and a region that is
//! found is checked, so the entries need no order among each other.
//!
//! A table that has become too small stays until the cache is dropped, as look-ups may still be in
//! it. Each is twice the one before, so all of them together are smaller than the one in use.

use super::memory::{Array, Zero};
use crate::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::marker::PhantomData;
use std::ptr::{self, NonNull};

const PER_LINE: usize = 8;
/// The smallest table, as a power of two.
pub(super) const SMALLEST: u32 = if cfg!(mmun_loom) { 3 } else { 9 };
/// The largest, so that the hash has bits left to tell entries apart.
const LARGEST: u32 = 31;

/// A cache line of entries.
#[derive(Debug)]
#[repr(C, align(64))]
struct Line([AtomicU64; PER_LINE]);

// SAFETY: Zeroes are the value of integers.
unsafe impl Zero for Line {
    fn zero() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

/// A table. Its entries are written under the lock of the cache.
#[derive(Debug)]
pub(crate) struct Table {
    /// One line whose last word is their number, then the entries.
    lines: Array<Line>,
    used: AtomicUsize,
    /// The one that this one took over from.
    previous: AtomicPtr<Table>,
}

/// The table in use, and all before it, in the order of their sizes.
///
/// # Invariants
/// Null, or the newest of the tables that were installed, which are freed with this.
#[derive(Debug)]
pub(crate) struct Tables(AtomicPtr<Table>);

/// A table as a look-up sees it.
///
/// # Invariants
/// There are live entries from `first` on, and in front of them the line that [`Table`] says, with
/// their number, a power of two.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    first: NonNull<AtomicU64>,
    table: PhantomData<&'a Table>,
}

impl<'a> View<'a> {
    /// The table whose entries `first` points to, if any.
    ///
    /// # Safety
    /// What is stored there comes from [`Table::first`], of tables that live for `'a`.
    #[inline(always)]
    pub(super) unsafe fn load(first: &'a AtomicPtr<AtomicU64>) -> Option<Self> {
        // ORDER(cache-table): Acquire for the entries. Partner: the Release in `Page::install`.
        let first = NonNull::new(first.load(Ordering::Acquire))?;
        // INVARIANT: `Table::new` wrote its size there.
        Some(Self {
            first,
            table: PhantomData,
        })
    }

    #[inline(always)]
    fn len(self) -> usize {
        // SAFETY: The result must lie in the allocation: there is a line in front of the entries.
        let len = unsafe { self.first.sub(1) };
        // SAFETY: A reference needs a live integer: the last one of that line.
        unsafe { len.as_ref() }.load(Ordering::Relaxed) as usize
    }

    /// Where a hash is to be found: the upper bits of it, without a shift by a variable, which is
    /// slow on some processors.
    #[inline(always)]
    fn home(self, hash: u32) -> usize {
        ((u64::from(hash) * self.len() as u64) >> 32) as usize
    }

    /// An entry; without a check.
    ///
    /// # Safety
    /// `at` is less than `len`.
    #[inline(always)]
    unsafe fn at_unchecked(self, at: usize) -> &'a AtomicU64 {
        // SAFETY: The result must lie in the allocation: type invariant, and the caller's promise.
        let entry = unsafe { self.first.add(at) };
        // SAFETY: A reference needs a live integer that is only ever shared: as above.
        unsafe { entry.as_ref() }
    }

    /// The entry at `at`, wrapped around.
    #[inline(always)]
    fn at(self, at: usize) -> &'a AtomicU64 {
        // SAFETY: It must be less than `len`, which is a power of two.
        unsafe { self.at_unchecked(at & (self.len() - 1)) }
    }

    /// Calls `f` with the name of each region entered under `hash`, and perhaps of others, until it
    /// returns something.
    #[inline(always)]
    pub(crate) fn probe_names<T>(
        self,
        hash: u32,
        mut f: impl FnMut(u32) -> Option<T>,
    ) -> Option<T> {
        let mut at = self.home(hash);
        // SAFETY: It must be less than `len`: it is less than a 2^32th of 2^32 of it.
        let mut entry = unsafe { self.at_unchecked(at) }.load(Ordering::Relaxed);
        // An entry is empty sooner or later, as half of them are.
        while entry != 0 {
            if entry as u32 == hash {
                if let Some(found) = f((entry >> 32) as u32) {
                    return Some(found);
                }
            }
            at += 1;
            entry = self.at(at).load(Ordering::Relaxed);
        }
        None
    }

    /// The same with the regions' numbers.
    #[inline(always)]
    pub(crate) fn probe<T>(self, hash: u32, mut f: impl FnMut(u32) -> Option<T>) -> Option<T> {
        self.probe_names(hash, |name| f(name - 1))
    }
}

fn entry(hash: u32, region: u32) -> u64 {
    u64::from(region + 1) << 32 | u64::from(hash)
}

impl Table {
    /// An empty table of `1 << log2` entries.
    pub(crate) fn new(log2: u32) -> Box<Self> {
        let log2 = log2.clamp(SMALLEST, LARGEST);
        let lines = Array::<Line>::zeroes(1 + (1 << log2) / PER_LINE);
        lines[0].0[PER_LINE - 1].store(1 << log2, Ordering::Relaxed);
        Box::new(Self {
            lines,
            used: AtomicUsize::new(0),
            previous: AtomicPtr::new(ptr::null_mut()),
        })
    }

    fn len(&self) -> usize {
        (self.lines.len() - 1) * PER_LINE
    }

    pub(crate) fn log2(&self) -> u32 {
        self.len().ilog2()
    }

    /// Whether `more` entries can be added without it becoming slow.
    pub(crate) fn has_room(&self, more: usize) -> bool {
        (self.used.load(Ordering::Relaxed) + more) * 2 <= self.len()
    }

    pub(crate) fn view(&self) -> View<'_> {
        let first = NonNull::new(self.first()).expect("an entry is not at null");
        // INVARIANT: A line is an array of entries, without padding.
        View {
            first,
            table: PhantomData,
        }
    }

    /// The first entry, as look-ups want it.
    pub(super) fn first(&self) -> *mut AtomicU64 {
        // From the whole array: look-ups read the line before, too.
        let first = self.lines.as_ptr().cast::<AtomicU64>().cast_mut();
        first.wrapping_add(PER_LINE)
    }

    /// Enters a region. The caller holds the lock of the cache and has seen that there is room.
    pub(crate) fn insert(&self, hash: u32, region: u32) {
        self.add(entry(hash, region));
    }

    fn add(&self, entry: u64) {
        let entries = self.view();
        let mut at = entries.home(entry as u32);
        while entries.at(at).load(Ordering::Relaxed) != 0 {
            at += 1;
        }
        entries.at(at).store(entry, Ordering::Relaxed);
        self.used.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes a region out that was entered under `hash`, and moves up what was pushed aside by it.
    pub(crate) fn remove(&self, hash: u32, region: u32) {
        let entries = self.view();
        let mask = entries.len() - 1;
        let wanted = entry(hash, region);
        let mut hole = entries.home(hash);
        loop {
            let found = entries.at(hole).load(Ordering::Relaxed);
            if found == wanted {
                break;
            }
            assert!(
                found != 0,
                "a region is in the table under each of its granules"
            );
            hole += 1;
        }
        let mut at = hole;
        loop {
            at += 1;
            let next = entries.at(at).load(Ordering::Relaxed);
            if next == 0 {
                break;
            }
            // It may move up if the hole does not lie before its home.
            let distance = at.wrapping_sub(entries.home(next as u32)) & mask;
            if distance >= (at.wrapping_sub(hole) & mask) {
                entries.at(hole).store(next, Ordering::Relaxed);
                hole = at;
            }
        }
        entries.at(hole).store(0, Ordering::Relaxed);
        self.used.fetch_sub(1, Ordering::Relaxed);
    }

    /// Takes over all entries of a smaller table.
    fn take_over(&self, previous: &Table) {
        for at in 0..previous.len() {
            let entry = previous.view().at(at).load(Ordering::Relaxed);
            if entry != 0 {
                self.add(entry);
            }
        }
    }
}

impl Tables {
    pub(crate) fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    /// The table in use. Certain for who holds the lock of the cache.
    pub(crate) fn newest(&self) -> Option<&Table> {
        // ORDER: Relaxed is enough: a writer of the table holds the lock, under which the table was
        // installed.
        let newest = NonNull::new(self.0.load(Ordering::Relaxed))?;
        // SAFETY: A reference needs a live table without a `&mut` to it: type invariant; tables are
        // only ever shared.
        Some(unsafe { newest.as_ref() })
    }

    /// Puts a table in the place of the one in use, which is kept for the look-ups in it. The
    /// caller holds the lock of the cache.
    pub(super) fn install(&self, table: Box<Table>) -> &Table {
        if let Some(previous) = self.newest() {
            table.take_over(previous);
        }
        table
            .previous
            .store(self.0.load(Ordering::Relaxed), Ordering::Relaxed);
        let table = Box::into_raw(table);
        // INVARIANT: It is the newest now, and leads to the others.
        self.0.store(table, Ordering::Relaxed);
        // SAFETY: As in `newest`.
        unsafe { &*table }
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        let mut next = self.0.load(Ordering::Relaxed);
        while let Some(table) = NonNull::new(next) {
            // SAFETY: A box needs the unique pointer that came from one: `install` leaked it, and
            // its owner is being dropped.
            let table = unsafe { Box::from_raw(table.as_ptr()) };
            next = table.previous.load(Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, not(mmun_loom)))]
mod tests {
    use super::*;

    fn found(table: &Table, hash: u32) -> Vec<u32> {
        let mut all = Vec::new();
        table.view().probe(hash, |region| {
            all.push(region);
            None::<()>
        });
        all
    }

    #[test]
    fn what_was_entered_is_found_until_it_is_removed() {
        let table = Table::new(SMALLEST);
        // All of them want the same place or its neighbours, around the end of the table.
        let hashes: Vec<u32> = (0..100)
            .map(|n: u32| u32::MAX << 24 | (n % 7) << 22 | n)
            .collect();
        for (region, hash) in (0..).zip(&hashes) {
            table.insert(*hash, region);
        }
        for (region, hash) in (0..).zip(&hashes) {
            assert_eq!(found(&table, *hash), [region]);
            table.remove(*hash, region);
            assert!(found(&table, *hash).is_empty());
            for (other, hash) in (0..).zip(&hashes).skip(region as usize + 1) {
                assert_eq!(found(&table, *hash), [other], "after {region} was removed");
            }
        }
        assert_eq!(table.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_larger_table_takes_all_entries_over() {
        let small = Table::new(SMALLEST);
        let hashes: Vec<u32> = (0..200_u32).map(|n| n.wrapping_mul(0x9e37_79b9)).collect();
        for (region, hash) in (0..).zip(&hashes) {
            small.insert(*hash, region);
        }
        assert!(small.has_room(56) && !small.has_room(57));
        let large = Table::new(small.log2() + 1);
        large.take_over(&small);
        for (region, hash) in (0..).zip(&hashes) {
            assert!(found(&large, *hash).contains(&region));
        }
    }
}
