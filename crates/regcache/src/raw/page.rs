//! The page that a look-up begins with. The child of a fork finds it zeroed: there is no table,
//! nothing is a hit.

use super::table::{Table, Tables, View};
use crate::granule::Lead;
use crate::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::io;
use std::ops::Deref;
use std::ptr::NonNull;

/// What the page holds. All of it is written rarely, so that every processor keeps its copy.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct Fields {
    /// The first entry of the table in use; null if there is none.
    table: AtomicPtr<AtomicU64>,
    /// What makes granules of addresses at the level that has the most regions.
    mask: AtomicU64,
    factor: AtomicU64,
    /// A bit for each level that the table has regions of.
    pub(crate) levels: AtomicU64,
    /// One; zero in the child of a fork.
    alive: AtomicU32,
}

/// The page, and the tables that it leads to.
#[derive(Debug)]
pub(crate) struct Page {
    fields: Mapped,
    tables: Tables,
}

/// What look-ups read of a page.
///
/// # Invariants
/// `table` is null, or what `Table::first` returned, of a table that lives for `'a`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shown<'a>(&'a Fields);

/// # Invariants
/// Points to a page of our own, of which the beginning is valid `Fields` also when it is zeroed.
#[derive(Debug)]
struct Mapped(NonNull<Fields>);

// SAFETY: It is an owner of atomics.
unsafe impl Send for Mapped {}
// SAFETY: As above.
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

    /// What look-ups read. To be taken once: the compiler would load the pointer again behind every
    /// fence.
    #[inline(always)]
    pub(crate) fn fields(&self) -> Shown<'_> {
        // INVARIANT: Only `install` stores something else than null in `table`: what leads to
        // tables that live as long as `self`.
        Shown(&self.fields)
    }

    /// The table, if there is one.
    pub(crate) fn view(&self) -> Option<View<'_>> {
        self.fields().view()
    }

    pub(crate) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Makes look-ups use `table`, which takes over what is in the present one. The caller holds
    /// the lock of the cache.
    pub(crate) fn install(&self, table: Box<Table>) {
        let first = self.tables.install(table).first();
        // ORDER(cache-table): Release for the entries. Partner: the Acquire in `View::load`.
        self.fields.table.store(
            first,
            crate::sync::unless("install_relaxed", Ordering::Release),
        );
    }

    /// Makes every look-up a miss from now on.
    pub(crate) fn close(&self) {
        self.fields
            .table
            .store(std::ptr::null_mut(), Ordering::Relaxed);
    }

    /// Whether this process is the child of a fork of the one that made the page.
    #[inline]
    pub(crate) fn is_inherited(&self) -> bool {
        self.fields.alive.load(Ordering::Relaxed) == 0
    }
}

impl Fields {
    /// What makes granules of addresses at the level that has the most regions. While it changes it
    /// may be half of each, which finds nothing.
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
    /// The table, if there is one.
    #[inline(always)]
    pub(crate) fn view(self) -> Option<View<'a>> {
        // SAFETY: It must hold what `Table::first` returned, of tables that live as long as the
        // borrow: type invariant.
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
        // SAFETY: The kernel chooses a place where nothing is.
        let place =
            unsafe { mmap_anonymous(std::ptr::null_mut(), SIZE, flags, MapFlags::PRIVATE) }?;
        // INVARIANT: It was just mapped, zeroed; `Fields` are integers and a pointer that may be
        // null.
        let page = Self(NonNull::new(place.cast()).expect("the kernel maps nothing at null"));
        // SAFETY: The page is ours, and the advice changes nothing in this process.
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
        // SAFETY: A reference needs live, valid `Fields`: type invariant.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Mapped {
    #[cfg(not(mmun_loom))]
    fn drop(&mut self) {
        // SAFETY: The page is ours, and its owner is being dropped. A failure leaks it, which is
        // all one can do.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), SIZE) };
    }

    #[cfg(mmun_loom)]
    fn drop(&mut self) {
        // SAFETY: It came from a box and its owner is being dropped.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}
