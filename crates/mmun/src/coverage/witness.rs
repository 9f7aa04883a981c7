//! The subscriber: looks at the page at the moment it is told.

use std::sync::OnceLock;

use mmu_notifier::{InvalidateRange, Notifier, Va};

use super::page::{Page, State};
use super::report::Seen;

/// Looks at one page. Its callback can run in the middle of `free`: it allocates nothing.
#[derive(Debug)]
pub(crate) struct Witness {
    page: Page,
    /// The state before the change. Set when the change begins.
    before: OnceLock<State>,
    seen: OnceLock<Seen>,
}

impl Witness {
    pub(crate) fn new(page: Page) -> Witness {
        Witness {
            page,
            before: OnceLock::new(),
            seen: OnceLock::new(),
        }
    }

    pub(crate) fn page(&self) -> &Page {
        &self.page
    }

    /// From now on what is told counts. `before` is what the page is like.
    pub(crate) fn begin(&self, before: State) {
        let _ = self.before.set(before);
    }

    /// What the page was like.
    pub(crate) fn before(&self) -> Option<State> {
        self.before.get().copied()
    }

    /// When it was told, if it was.
    pub(crate) fn seen(&self) -> Option<Seen> {
        self.seen.get().copied()
    }
}

impl Notifier for Witness {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        let Some(before) = self.before() else { return };
        if range.range().contains(Va::new(self.page.address() as u64)) {
            // That of a page of this process can always be read: the file is open.
            let now = self.page.state();
            let seen = if now.is_ok_and(|now| now == before) {
                Seen::Before
            } else {
                Seen::After
            };
            // The first time counts: what is told once is let go of.
            let _ = self.seen.set(seen);
        }
    }
}
