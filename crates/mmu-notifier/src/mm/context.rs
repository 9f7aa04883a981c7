//! The brackets, callbacks and deferred frees that this thread is inside of. They determine which
//! waits could never end and must be refused.

use crate::Mm;
use crate::lockdep::Section;

srcu::thread_word! {
    /// How many brackets, callbacks outside of brackets, and deferred frees this thread is inside
    /// of, for any address space.
    static DEPTH: u64 = 0;
    /// One if this thread is running a deferred free. Only the background thread runs those, or a
    /// thread that acts in its place.
    static FREEING: u64 = 0;
}

/// Records that this thread is inside a callback section, until dropped.
#[derive(Debug)]
pub(crate) struct Inside {
    _section: Section,
}

impl Inside {
    /// Enters a bracket or callback of `mm`.
    #[inline]
    pub(crate) fn enter(mm: &Mm) -> Self {
        Self::enter_section(Section::enter(Some(mm.id())))
    }

    #[inline]
    fn enter_section(section: Section) -> Self {
        DEPTH.add::<1>();
        Self { _section: section }
    }
}

impl Drop for Inside {
    #[inline]
    fn drop(&mut self) {
        DEPTH.add::<-1>();
    }
}

/// Tells whether this thread is inside a bracket, a callback or a deferred free of any address
/// space, or is the background thread.
pub(crate) fn is_inside() -> bool {
    DEPTH.get() != 0 || srcu::is_reclaimer()
}

/// Runs `f`, and records it as a deferred free.
pub(crate) fn freeing<R>(f: impl FnOnce() -> R) -> R {
    /// Restores the mark even if `f` panics.
    struct Restore(u64);
    impl Drop for Restore {
        fn drop(&mut self) {
            FREEING.set(self.0);
        }
    }
    let _inside = Inside::enter_section(Section::enter(None));
    let _restore = Restore(FREEING.get());
    FREEING.set(1);
    f()
}

/// Tells whether this thread is running a deferred free.
pub(crate) fn is_freeing() -> bool {
    FREEING.get() != 0
}
