//! Intervals, and the windows in which their sequence does not change.

use super::{Answer, Callback, Model, meet};

/// One interval that was ever made.
#[derive(Debug)]
pub(super) struct Interval {
    pub(super) mm: usize,
    pages: (u64, u64),
    in_tree: bool,
    seq: u64,
    refuses: bool,
}

/// The sequence number that never matches.
const NEVER: u64 = 0;

impl Model {
    fn hit(&self, mm: usize, pages: (u64, u64)) -> Vec<usize> {
        let mut hit: Vec<_> = self.mms[mm]
            .intervals
            .iter()
            .copied()
            .filter(|i| meet(self.intervals[*i].pages, pages))
            .collect();
        hit.sort_by_key(|i| self.intervals[*i].pages.0);
        hit
    }

    /// Calls the intervals `told`, and then the second pass of those `finishing` that have an odd
    /// index.
    fn tell_intervals(&mut self, mm: usize, told: &[usize], finishing: &[usize]) {
        for interval in told {
            self.intervals[*interval].seq = self.mms[mm].seq;
            self.calls.push(Callback::Interval(*interval));
        }
        self.calls.extend(
            finishing
                .iter()
                .filter(|i| **i % 2 == 1)
                .map(|i| Callback::Finish(*i)),
        );
    }

    pub(super) fn window_start(&mut self, mm: usize, pages: (u64, u64)) {
        let hit = self.hit(mm, pages);
        self.mms[mm].active += 1;
        if !hit.is_empty() {
            self.mms[mm].seq |= 1;
        }
        self.tell_intervals(mm, &hit, &hit);
    }

    /// Tells whether the model cannot know which intervals a non-blockable start calls, because an
    /// interval refuses and another interval begins at the same page. The order of these two is
    /// not specified.
    #[must_use]
    pub fn is_ambiguous(&self, mm: usize, pages: (u64, u64)) -> bool {
        let hit = self.hit(mm, pages);
        let first = hit
            .iter()
            .find(|i| self.intervals[**i].refuses)
            .map(|i| self.intervals[*i].pages.0);
        first.is_some_and(|first| {
            hit.iter()
                .filter(|i| self.intervals[**i].pages.0 == first)
                .count()
                > 1
        })
    }

    /// Like [`window_start`](Self::window_start), for a non-blockable start. The first interval
    /// that refuses is the last interval that is called. Returns whether no interval refused.
    pub(super) fn window_try_start(&mut self, mm: usize, pages: (u64, u64)) -> bool {
        let hit = self.hit(mm, pages);
        let Some(refuses) = hit.iter().position(|i| self.intervals[*i].refuses) else {
            self.window_start(mm, pages);
            return true;
        };
        self.mms[mm].active += 1;
        self.mms[mm].seq |= 1;
        self.tell_intervals(mm, &hit[..=refuses], &hit[..refuses]);
        self.window_end(mm);
        false
    }

    pub(super) fn window_end(&mut self, mm: usize) {
        self.mms[mm].active -= 1;
        if self.mms[mm].active > 0 || self.mms[mm].seq & 1 == 0 {
            return;
        }
        self.mms[mm].seq += 1;
        for interval in std::mem::take(&mut self.mms[mm].deferred) {
            self.intervals[interval].in_tree = true;
            self.mms[mm].intervals.push(interval);
        }
    }

    /// Tells whether an interval was ever inserted. Only the first insert waits.
    #[must_use]
    pub fn has_intervals(&self, mm: usize) -> bool {
        self.mms[mm].has_intervals
    }

    /// `IntervalNotifier::insert`. `pages` are the first and the last page.
    pub fn insert(&mut self, thread: usize, mm: usize, pages: (u64, u64), refuses: bool) -> Answer {
        if !self.mms[mm].has_intervals {
            if self.is_inside(thread, mm) {
                return Answer::WouldDeadlock;
            }
            self.mms[mm].has_intervals = true;
        }
        let interval = self.intervals.len();
        let full = self.mms[mm].seq & 1 == 1;
        let idle = self.mms[mm].active == 0;
        if !idle {
            self.mms[mm].seq |= 1;
        }
        let seq = if idle {
            self.mms[mm].seq - 1
        } else {
            self.mms[mm].seq
        };
        self.intervals.push(Interval {
            mm,
            pages,
            in_tree: !full,
            seq,
            refuses,
        });
        if full {
            self.mms[mm].deferred.push(interval)
        } else {
            self.mms[mm].intervals.push(interval)
        }
        Answer::Got(interval, 1)
    }

    /// Returns how many intervals were ever inserted.
    #[must_use]
    pub fn intervals_made(&self) -> usize {
        self.intervals.len()
    }

    /// `IntervalNotifier::remove`.
    pub fn remove(&mut self, thread: usize, interval: usize) -> Answer {
        let mm = self.intervals[interval].mm;
        let full = self.mms[mm].seq & 1 == 1;
        if full && self.intervals[interval].in_tree && self.is_inside(thread, mm) {
            return Answer::WouldDeadlock;
        }
        self.mms[mm].intervals.retain(|one| *one != interval);
        self.mms[mm].deferred.retain(|one| *one != interval);
        Answer::Done
    }

    /// Tells whether `IntervalNotifier::read_begin` has to wait for a window.
    #[must_use]
    pub fn is_invalidating(&self, interval: usize) -> bool {
        let Interval { mm, seq, .. } = self.intervals[interval];
        seq == self.mms[mm].seq
    }

    /// `IntervalNotifier::read_begin`.
    #[must_use]
    pub fn read_begin(&self, thread: usize, interval: usize) -> u64 {
        let Interval { mm, seq, .. } = self.intervals[interval];
        if self.is_invalidating(interval) && self.is_inside(thread, mm) {
            NEVER
        } else {
            seq
        }
    }

    /// `IntervalNotifier::try_install`.
    #[must_use]
    pub fn try_install(&self, interval: usize, seq: u64) -> Answer {
        if self.intervals[interval].seq == seq {
            Answer::Done
        } else {
            Answer::Retry
        }
    }

    /// Returns the address space of an interval.
    #[must_use]
    pub fn mm_of_interval(&self, interval: usize) -> usize {
        self.intervals[interval].mm
    }

    /// Returns the sequence of an address space's intervals, and the number of its open windows.
    #[must_use]
    pub fn snapshot(&self, mm: usize) -> (u64, u64) {
        (self.mms[mm].seq, u64::from(self.mms[mm].active))
    }
}
