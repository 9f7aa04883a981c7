//! The hash table from granules to regions, with open addressing. Look-ups read it without a lock.
//! Writers hold the lock of the cache.
//!
//! An entry is one word: the upper half is the region's name, the lower half the granule's hash. A
//! region's name is its number plus one, so zero is no region. A look-up that runs while an entry
//! moves may miss that entry, or meet it twice. That does no harm: a miss searches again under the
//! lock, and a hit checks the region. So the entries need no order among each other.
//!
//! A table that has become too small stays until the cache is dropped, because look-ups may still
//! be reading it. Each table is at least twice as large as the one before, so all old tables
//! together are smaller than the current one.

use super::memory::{Array, Zero};
use crate::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::marker::PhantomData;
use std::ptr::{self, NonNull};

const PER_LINE: usize = 8;
/// The size of the smallest table, as a power of two.
pub(super) const SMALLEST: u32 = if cfg!(mmun_loom) { 3 } else { 9 };
/// The size of the largest table, as a power of two. The position of an entry is then 31 bits of
/// its hash, and one more bit distinguishes entries.
const LARGEST: u32 = 31;

/// A cache line of entries.
#[derive(Debug)]
#[repr(C, align(64))]
struct Line([AtomicU64; PER_LINE]);

// SAFETY: zeroes are valid integers.
unsafe impl Zero for Line {
    fn zero() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

/// A table. Writers of its entries hold the lock of the cache.
#[derive(Debug)]
pub(crate) struct Table {
    /// One line whose last word is the number of entries, followed by the entries.
    lines: Array<Line>,
    used: AtomicUsize,
    /// The table that this one replaced.
    previous: AtomicPtr<Table>,
}

/// The current table and all earlier ones, in the order of their sizes.
///
/// # Invariants
/// Null, or the newest installed table. All installed tables are freed with this value.
#[derive(Debug)]
pub(crate) struct Tables(AtomicPtr<Table>);

/// A table as a look-up sees it.
///
/// # Invariants
/// `first` points to the first of the live entries. Before the entries is the line that [`Table`]
/// describes. Its last word is the number of entries, a power of two.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    first: NonNull<AtomicU64>,
    table: PhantomData<&'a Table>,
}

impl<'a> View<'a> {
    /// Returns the table whose entries `first` points to, if any.
    ///
    /// # Safety
    /// Every pointer stored in `first` comes from [`Table::first`], of tables that live for `'a`.
    #[inline(always)]
    pub(super) unsafe fn load(first: &'a AtomicPtr<AtomicU64>) -> Option<Self> {
        // ORDER(cache-table): Acquire, for the entries. Partner: the Release in `Page::install`.
        let first = NonNull::new(first.load(Ordering::Acquire))?;
        // INVARIANT: `Table::new` has written the number of entries before them.
        Some(Self {
            first,
            table: PhantomData,
        })
    }

    #[inline(always)]
    fn len(self) -> usize {
        // SAFETY: the result must be inside the allocation. By the invariant there is a line before
        // the entries.
        let len = unsafe { self.first.sub(1) };
        // SAFETY: a reference needs a live integer. `len` points to the last word of that line.
        unsafe { len.as_ref() }.load(Ordering::Relaxed) as usize
    }

    /// Returns the position at which the search for a hash begins: the hash's upper bits. A
    /// multiplication extracts them, because a shift by a variable is slow on some processors.
    #[inline(always)]
    fn home(self, hash: u32) -> usize {
        ((u64::from(hash) * self.len() as u64) >> 32) as usize
    }

    /// Returns an entry without a bounds check.
    ///
    /// # Safety
    /// `at` is less than `len`.
    #[inline(always)]
    unsafe fn at_unchecked(self, at: usize) -> &'a AtomicU64 {
        // SAFETY: the result must be inside the allocation. The invariant and the caller's promise
        // guarantee that.
        let entry = unsafe { self.first.add(at) };
        // SAFETY: a reference needs a live integer. By the invariant the entries live for `'a`, and
        // they are atomics, so other threads may change them meanwhile.
        unsafe { entry.as_ref() }
    }

    /// Returns the entry at `at`, wrapped around.
    #[inline(always)]
    fn at(self, at: usize) -> &'a AtomicU64 {
        // SAFETY: `at` must be less than `len`. The mask ensures that, because `len` is a power of
        // two.
        unsafe { self.at_unchecked(at & (self.len() - 1)) }
    }

    /// Calls `f` with the name of each region that has an entry with `hash`, until `f` returns a
    /// result. May also call `f` with names of other regions.
    #[inline(always)]
    pub(crate) fn probe_names<T>(
        self,
        hash: u32,
        mut f: impl FnMut(u32) -> Option<T>,
    ) -> Option<T> {
        let mut at = self.home(hash);
        // SAFETY: `at` must be less than `len`. `home` returns a 32-bit hash times `len`, divided
        // by 2^32, which is less than `len`.
        let mut entry = unsafe { self.at_unchecked(at) }.load(Ordering::Relaxed);
        // The loop ends: at least half of the entries are empty.
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

    /// Like `probe_names`, with the regions' numbers.
    #[inline(always)]
    pub(crate) fn probe<T>(self, hash: u32, mut f: impl FnMut(u32) -> Option<T>) -> Option<T> {
        self.probe_names(hash, |name| f(name - 1))
    }
}

fn entry(hash: u32, region: u32) -> u64 {
    u64::from(region + 1) << 32 | u64::from(hash)
}

impl Table {
    /// Makes an empty table of `1 << log2` entries.
    pub(crate) fn new(log2: u32) -> Box<Self> {
        let log2 = log2.clamp(SMALLEST, LARGEST);
        let lines = Array::<Line>::zeroes(1 + (1 << log2) / PER_LINE)
            .unwrap_or_else(|_| std::alloc::handle_alloc_error(std::alloc::Layout::new::<Line>()));
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

    /// Tells whether `more` entries fit without making the table slow.
    pub(crate) fn has_room(&self, more: usize) -> bool {
        (self.used.load(Ordering::Relaxed) + more) * 2 <= self.len()
    }

    pub(crate) fn view(&self) -> View<'_> {
        let first = NonNull::new(self.first()).expect("an entry is not at null");
        // INVARIANT: a line is an array of entries without padding.
        View {
            first,
            table: PhantomData,
        }
    }

    /// Returns the first entry, in the form that look-ups use.
    pub(super) fn first(&self) -> *mut AtomicU64 {
        // Derive the pointer from the whole array, because look-ups also read the line before.
        let first = self.lines.as_ptr().cast::<AtomicU64>().cast_mut();
        first.wrapping_add(PER_LINE)
    }

    /// Adds an entry. The caller holds the lock of the cache and has checked that there is room.
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

    /// Removes the entry of a region under `hash`, and moves the entries that it had displaced
    /// closer to their home positions.
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
            // An entry may move into the hole unless the hole lies before the entry's home.
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

    /// Returns the current table. This is the latest table only for a caller that holds the lock of
    /// the cache.
    pub(crate) fn newest(&self) -> Option<&Table> {
        // ORDER: Relaxed: a writer of the table holds the lock, under which the table was
        // installed.
        let newest = NonNull::new(self.0.load(Ordering::Relaxed))?;
        // SAFETY: a reference needs a live table without a `&mut` to it. By the invariant the
        // newest table lives as long as `self`, and after `install` no code makes a `&mut` to it.
        Some(unsafe { newest.as_ref() })
    }

    /// Makes `table` the current table. The old table is kept for the look-ups that still read it.
    /// The caller holds the lock of the cache.
    pub(super) fn install(&self, table: Box<Table>) -> &Table {
        if let Some(previous) = self.newest() {
            table.take_over(previous);
        }
        table
            .previous
            .store(self.0.load(Ordering::Relaxed), Ordering::Relaxed);
        let table = Box::into_raw(table);
        // INVARIANT: `table` is now the newest and leads to the others.
        self.0.store(table, Ordering::Relaxed);
        // SAFETY: a reference needs a live table without a `&mut` to it. The table was just leaked,
        // and lives as long as `self`.
        unsafe { &*table }
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        let mut next = self.0.load(Ordering::Relaxed);
        while let Some(table) = NonNull::new(next) {
            // SAFETY: `from_raw` needs the unique pointer of a leaked box. `install` leaked the
            // box, and `self`, its only owner, is being dropped.
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
        // All of these hash to the same position or its neighbours, around the end of the table.
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
