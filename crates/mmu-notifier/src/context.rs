//! What this thread is in the middle of, so that a wait which could never end is refused instead.

use crate::Mm;
use crate::lockdep::Section;
use crate::sync::per_thread;
use std::cell::Cell;

per_thread! {
    /// How many brackets, releases and frees of any address space this thread is inside of.
    static DEPTH: Cell<u32> = Cell::new(0);
    /// Whether this thread is running a deferred free, so on the reclaimer.
    static FREEING: Cell<bool> = Cell::new(false);
}

/// Marks this thread as being inside a callback section, until dropped.
#[derive(Debug)]
pub(crate) struct Inside {
    _section: Section,
}

impl Inside {
    /// A bracket or callback of `mm`.
    #[inline]
    pub(crate) fn enter(mm: &Mm) -> Self {
        Self::enter_section(Section::enter(Some(mm.id())))
    }

    #[inline]
    fn enter_section(section: Section) -> Self {
        DEPTH.with(|depth| depth.set(depth.get() + 1));
        Self { _section: section }
    }
}

impl Drop for Inside {
    #[inline]
    fn drop(&mut self) {
        DEPTH.with(|depth| depth.set(depth.get() - 1));
    }
}

/// Tells whether this thread is inside a bracket, a release or a free of any address space, or runs deferred work at all.
pub(crate) fn is_inside() -> bool {
    DEPTH.with(Cell::get) != 0 || srcu::is_reclaimer()
}

/// Runs `f`, marked as a deferred free.
pub(crate) fn freeing<R>(f: impl FnOnce() -> R) -> R {
    /// Also if `f` panics.
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            FREEING.with(|freeing| freeing.set(self.0));
        }
    }
    let _inside = Inside::enter_section(Section::enter(None));
    let _restore = Restore(FREEING.with(|freeing| freeing.replace(true)));
    f()
}

/// Tells whether this thread is running a deferred free.
pub(crate) fn is_freeing() -> bool {
    FREEING.with(Cell::get)
}
