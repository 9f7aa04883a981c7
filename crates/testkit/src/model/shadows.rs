//! Shadows with one sequence for all pages that they watch.

use super::{Answer, Callback, Kind, Model, Notifier, meet};

/// The state of a shadow with a sequence.
#[derive(Debug, Default)]
pub(super) struct Shadow {
    /// The number of open invalidations that overlap the watched range.
    in_progress: u32,
    /// The smallest range that covers every such invalidation since `in_progress` was last 0.
    hull: (u64, u64),
    /// The number of ended invalidations that overlapped the watched range, plus the number of
    /// changes of the watched range.
    seq: u64,
    pub(super) released: bool,
}

impl Model {
    pub(super) fn shadow_start(&mut self, notifier: usize, watched: (u64, u64), pages: (u64, u64)) {
        if !meet(watched, pages) {
            return;
        }
        let shadow = &mut self.notifiers[notifier].shadow;
        let hull = (shadow.hull.0.min(pages.0), shadow.hull.1.max(pages.1));
        shadow.hull = if shadow.in_progress == 0 { pages } else { hull };
        shadow.in_progress += 1;
        self.calls.push(Callback::Zap(notifier));
    }

    pub(super) fn shadow_end(&mut self, notifier: usize, watched: (u64, u64), pages: (u64, u64)) {
        if meet(watched, pages) {
            self.notifiers[notifier].shadow.in_progress -= 1;
            self.notifiers[notifier].shadow.seq += 1;
        }
    }

    /// `InvalidateSeq::snapshot`.
    #[must_use]
    pub fn snapshot_shadow(&self, notifier: usize) -> u64 {
        self.notifiers[notifier].shadow.seq
    }

    /// `InvalidateSeq::try_install`.
    ///
    /// # Panics
    /// If the notifier is not a shadow.
    #[must_use]
    pub fn install_shadow(&self, notifier: usize, seq: u64, pages: (u64, u64)) -> Answer {
        let Notifier {
            shadow,
            kind: Kind::Shadow { watched },
            ..
        } = &self.notifiers[notifier]
        else {
            panic!("it is not a shadow")
        };
        let invalidating = shadow.in_progress > 0 && meet(shadow.hull, pages);
        if shadow.released || invalidating || shadow.seq != seq {
            Answer::Retry
        } else if watched.0 <= pages.0 && pages.1 <= watched.1 {
            Answer::Done
        } else {
            Answer::NotWatched
        }
    }

    /// Tells whether a shadow's address space has ended. After the end, the core may skip the end
    /// callbacks of brackets that are still open.
    #[must_use]
    pub fn is_released(&self, notifier: usize) -> bool {
        self.notifiers[notifier].shadow.released
    }

    /// `InvalidateSeq::watch`.
    pub fn watch(&mut self, thread: usize, notifier: usize, watched: (u64, u64)) -> Answer {
        if self.is_inside_any(thread) {
            return Answer::WouldDeadlock;
        }
        self.notifiers[notifier].kind = Kind::Shadow { watched };
        self.notifiers[notifier].shadow.seq += 1;
        Answer::Done
    }
}
