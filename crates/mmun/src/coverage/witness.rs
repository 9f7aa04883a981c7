//! The subscriber: reads the state of the page in its callback.

use std::sync::OnceLock;

use mmu_notifier::{InvalidateRange, Notifier, Va};

use super::page::{Page, State};
use super::report::Seen;

/// A subscriber that reads the state of one page. Its callback can run in the middle of `free`, so
/// it allocates nothing.
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

    /// From now on callbacks count. `before` is the state of the page.
    pub(crate) fn begin(&self, before: State) {
        let _ = self.before.set(before);
    }

    /// The state of the page before the change.
    pub(crate) fn before(&self) -> Option<State> {
        self.before.get().copied()
    }

    /// When the change was reported, if it was.
    pub(crate) fn seen(&self) -> Option<Seen> {
        self.seen.get().copied()
    }
}

impl Notifier for Witness {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        let Some(before) = self.before() else { return };
        if range.range().contains(Va::new(self.page.address() as u64)) {
            // The state of a page of this process can always be read, because its files are open.
            let now = self.page.state();
            let seen = if now.is_ok_and(|now| now == before) {
                Seen::Before
            } else {
                Seen::After
            };
            // Only the first callback counts, because a real subscriber would have dropped its
            // entry then.
            let _ = self.seen.set(seen);
        }
    }
}
