//! The objects that readers use and updaters replace.

use super::{Counts, add};
use srcu::{Head, Srcu};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

pub(crate) const DOMAINS: usize = 3;
const CELLS: usize = 8;
const ALIVE: u64 = 0x600d_600d_600d_600d;
const FREED: u64 = 0xdead_dead_dead_dead;
/// How many freed objects are kept allocated, so that a late reader finds the poison.
const KEPT: usize = 20_000;

#[derive(Debug)]
#[repr(C)]
pub(crate) struct Object {
    pub(crate) head: Head,
    state: AtomicU64,
    world: &'static World,
}

/// An object that a section has found, or that an updater has unlinked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found(NonNull<Object>);

// SAFETY: `Object` is `Sync`. A thread uses the pointer only in a section that protects the object,
// or after the object was unlinked. This program tests that the crate makes this safe.
unsafe impl Send for Found {}

#[derive(Debug)]
pub(crate) struct World {
    /// The domains. In the first domain, no section is handed to another thread: children of a fork
    /// use that domain, and there such a section would stay open.
    pub(crate) domains: [Srcu; DOMAINS],
    cells: [[AtomicPtr<Object>; CELLS]; DOMAINS],
    /// The objects that were freed last, poisoned. The ring has no lock, because after a fork a
    /// lock could stay locked in the child.
    kept: Box<[AtomicPtr<Object>]>,
    next_kept: AtomicUsize,
    pub(crate) counts: Counts,
    pub(crate) broken: bool,
}

impl World {
    pub(crate) fn new(broken: bool) -> Self {
        Self {
            domains: [const { Srcu::new() }; DOMAINS],
            cells: [const { [const { AtomicPtr::new(std::ptr::null_mut()) }; CELLS] }; DOMAINS],
            kept: std::iter::repeat_with(AtomicPtr::default)
                .take(KEPT)
                .collect(),
            next_kept: AtomicUsize::new(0),
            counts: Counts::default(),
            broken,
        }
    }

    /// Reads a cell as a reader of `domain`, and checks the object.
    pub(crate) fn find(&self, domain: usize, cell: usize) -> Option<Found> {
        let found =
            NonNull::new(self.cells[domain][cell % CELLS].load(Ordering::Acquire)).map(Found);
        found.inspect(|found| self.check(*found))
    }

    /// Counts an error if the object was freed.
    pub(crate) fn check(&self, found: Found) {
        // SAFETY: The object must be allocated. The caller is in the section in which it found the
        // object. If the crate is broken, the object may be freed already, but its memory stays
        // allocated until many more objects are freed.
        let state = unsafe { found.0.as_ref() }.state.load(Ordering::Relaxed);
        if state != ALIVE {
            add(&self.counts.errors);
        }
    }

    /// Puts a new object into a cell and returns the old one.
    pub(crate) fn replace(&'static self, domain: usize, cell: usize) -> Option<Found> {
        let object = Object {
            head: Head::new(),
            state: AtomicU64::new(ALIVE),
            world: self,
        };
        let new = Box::into_raw(Box::new(object));
        NonNull::new(self.cells[domain][cell % CELLS].swap(new, Ordering::AcqRel)).map(Found)
    }

    /// Frees an object whose grace period is over.
    pub(crate) fn free(&self, found: Found) {
        // SAFETY: The call needs a leaked box that no other code frees. `replace` has leaked every
        // object, and only the thread that has unlinked an object frees it, once.
        let object = unsafe { Box::from_raw(found.0.as_ptr()) };
        let before = object.state.swap(FREED, Ordering::Relaxed);
        if before != ALIVE {
            add(&self.counts.errors);
        }
        add(&self.counts.freed);
        let place = &self.kept[self.next_kept.fetch_add(1, Ordering::Relaxed) % KEPT];
        let oldest = place.swap(Box::into_raw(object), Ordering::AcqRel);
        if !oldest.is_null() {
            // SAFETY: The call needs a leaked box that no other code has. `into_raw` has leaked the
            // box, and the swap has removed it from the ring, so only this thread has it.
            drop(unsafe { Box::from_raw(oldest) });
        }
    }

    /// Frees the remaining objects. All other threads have ended.
    pub(crate) fn finish(&'static self) {
        for srcu in &self.domains {
            srcu.drain_until_idle().expect("outside of sections");
        }
        for cell in self.cells.iter().flatten() {
            if let Some(last) = NonNull::new(cell.swap(std::ptr::null_mut(), Ordering::AcqRel)) {
                self.free(Found(last));
            }
        }
    }
}

impl Found {
    pub(crate) fn head(self) -> NonNull<Head> {
        self.0.cast()
    }

    /// Frees the object of a head.
    ///
    /// # Safety
    /// The head is that of an unlinked object whose grace period is over, and no other code frees
    /// it.
    pub(crate) unsafe fn free(head: NonNull<Head>) {
        let found = Found(head.cast());
        // SAFETY: A reference needs an allocated object. The caller promises that no other code
        // frees the object.
        let world = unsafe { found.0.as_ref() }.world;
        world.free(found);
    }
}
