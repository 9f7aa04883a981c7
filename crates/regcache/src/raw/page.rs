//! The header page, where a look-up begins. The kernel zeroes it in the child of a fork. There it
//! has no table, so every look-up is a miss.

use super::table::{Table, Tables, View};
use crate::granule::Lead;
use crate::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::io;
use std::ops::Deref;
use std::ptr::NonNull;

/// The content of the page. The page is rarely written, so it stays in every processor's cache.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct Fields {
    /// The first entry of the current table, or null if there is none.
    table: AtomicPtr<AtomicU64>,
    /// The constants that hash addresses at the level with the most regions.
    mask: AtomicU64,
    factor: AtomicU64,
    /// A bit for each level at which the table has regions.
    pub(crate) levels: AtomicU64,
    /// One, but zero in the child of a fork.
    alive: AtomicU32,
}

/// The page, and the tables that it leads to.
#[derive(Debug)]
pub(crate) struct Page {
    fields: Mapped,
    tables: Tables,
}

/// The fields as a look-up reads them.
///
/// # Invariants
/// `table` is null or comes from `Table::first`, of a table that lives for `'a`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shown<'a>(&'a Fields);

/// # Invariants
/// Points to a page that this value owns. The beginning of the page is a valid `Fields`, even after
/// the kernel has zeroed it.
#[derive(Debug)]
struct Mapped(NonNull<Fields>);

// SAFETY: the page contains only atomics.
unsafe impl Send for Mapped {}
// SAFETY: the page contains only atomics.
unsafe impl Sync for Mapped {}

#[cfg(not(mmun_loom))]
const SIZE: usize = 4096;

impl Page {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            fields: Mapped::new()?,
            tables: Tables::new(),
        })
    }

    /// Returns the fields that look-ups read. Call this function once for each look-up, because
    /// the compiler would reload the pointer to the page after every fence.
    #[inline(always)]
    pub(crate) fn fields(&self) -> Shown<'_> {
        // INVARIANT: only `install` stores a non-null `table`, and it points into a table that
        // lives as long as `self`.
        Shown(&self.fields)
    }

    /// Returns the current table, if there is one.
    pub(crate) fn view(&self) -> Option<View<'_>> {
        self.fields().view()
    }

    pub(crate) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Makes `table` the current table. `table` takes over the entries of the present table. The
    /// caller holds the lock of the cache.
    pub(crate) fn install(&self, table: Box<Table>) {
        let first = self.tables.install(table).first();
        // ORDER(cache-table): Release, for the entries. Partner: the Acquire in `View::load`.
        self.fields.table.store(
            first,
            crate::sync::unless("install_relaxed", Ordering::Release),
        );
    }

    /// Makes every look-up from now on a miss.
    pub(crate) fn close(&self) {
        self.fields
            .table
            .store(std::ptr::null_mut(), Ordering::Relaxed);
    }

    /// Tells whether this process is the child of a fork, and the parent made the page.
    #[inline]
    pub(crate) fn is_inherited(&self) -> bool {
        self.fields.alive.load(Ordering::Relaxed) == 0
    }
}

impl Fields {
    /// Returns the constants that hash addresses at the level with the most regions. If `set_lead`
    /// runs at the same time, the result can have the mask of one level and the factor of another.
    /// Then the fast path fails, and the slow path searches all levels.
    #[inline(always)]
    pub(crate) fn lead(&self) -> Lead {
        Lead {
            mask: self.mask.load(Ordering::Relaxed),
            factor: self.factor.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn set_lead(&self, lead: Lead) {
        self.mask.store(lead.mask, Ordering::Relaxed);
        self.factor.store(lead.factor, Ordering::Relaxed);
    }
}

impl<'a> Shown<'a> {
    /// Returns the current table, if there is one.
    #[inline(always)]
    pub(crate) fn view(self) -> Option<View<'a>> {
        // SAFETY: the pointer must come from `Table::first`, of tables that live as long as the
        // borrow. The type's invariant guarantees that.
        unsafe { View::load(&self.0.table) }
    }
}

impl Deref for Shown<'_> {
    type Target = Fields;

    #[inline(always)]
    fn deref(&self) -> &Fields {
        self.0
    }
}

impl Deref for Page {
    type Target = Fields;

    #[inline(always)]
    fn deref(&self) -> &Fields {
        &self.fields
    }
}

impl Mapped {
    #[cfg(not(mmun_loom))]
    fn new() -> io::Result<Self> {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses an address where nothing is mapped.
        let place =
            unsafe { mmap_anonymous(std::ptr::null_mut(), SIZE, flags, MapFlags::PRIVATE) }?;
        // INVARIANT: the page was just mapped and is zeroed. `Fields` consists of integers and a
        // pointer that may be null.
        let page = Self(NonNull::new(place.cast()).expect("the kernel maps nothing at null"));
        // SAFETY: this value owns the page, and the advice changes nothing in this process.
        unsafe { madvise(place, SIZE, Advice::LinuxWipeOnFork) }?;
        page.alive.store(1, Ordering::Relaxed);
        Ok(page)
    }

    #[cfg(mmun_loom)]
    fn new() -> io::Result<Self> {
        let fields = Fields {
            table: AtomicPtr::new(std::ptr::null_mut()),
            mask: AtomicU64::new(0),
            factor: AtomicU64::new(0),
            levels: AtomicU64::new(0),
            alive: AtomicU32::new(1),
        };
        Ok(Self(NonNull::from(Box::leak(Box::new(fields)))))
    }
}

impl Deref for Mapped {
    type Target = Fields;

    #[inline(always)]
    fn deref(&self) -> &Fields {
        // SAFETY: a reference needs live, valid `Fields`, which the type's invariant guarantees.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Mapped {
    #[cfg(not(mmun_loom))]
    fn drop(&mut self) {
        // SAFETY: this value owns the page and is being dropped. If the call fails, the page is
        // leaked.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), SIZE) };
    }

    #[cfg(mmun_loom)]
    fn drop(&mut self) {
        // SAFETY: `from_raw` needs the unique pointer of a leaked box. `new` leaked the box, and
        // `self`, its only owner, is being dropped.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}
