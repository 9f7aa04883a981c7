//! A change: one range of one call, from its start to its end, with the details of the range.

use std::collections::HashMap;

use mmu_source::process::{Pid, Task};

use crate::intern::Name;
use crate::record::{Pages, Record, Span};

/// One range of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) task: Task,
    pub(crate) span: Span,
    /// When the change began and ended, in nanoseconds since the trace began.
    pub(crate) began: u64,
    pub(crate) ended: u64,
    /// `None`: the call did not return, because the task died or the trace ended.
    pub(crate) result: Option<i64>,
    pub(crate) seen: Seen,
    /// The time that the task ran in the call, if it was measured. If a call has several ranges,
    /// only the range that ends last has the time.
    pub(crate) own: Option<u64>,
    /// Whether this range represents its call: of the ranges of a call, the last one to end does.
    pub(crate) is_call: bool,
}

/// The details that were recorded before the call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The first mapping of the range.
    pub(crate) what: Option<Name>,
    pub(crate) pages: Option<Pages>,
    /// The stack of the call.
    pub(crate) site: Option<u32>,
}

impl Change {
    /// The kernel refused the call.
    pub(crate) fn failed(&self) -> bool {
        self.result
            .is_some_and(|result| (-4095..0).contains(&result))
    }

    /// The call did not return, because the task died or the trace ended. Its effect is not known.
    pub(crate) fn is_cut(&self) -> bool {
        self.result.is_none()
    }

    /// The call returned without an error.
    pub(crate) fn is_done(&self) -> bool {
        !self.failed() && !self.is_cut()
    }

    pub(crate) fn bytes(&self) -> u64 {
        u64::try_from(self.span.end() - u128::from(self.span.start())).unwrap_or(u64::MAX)
    }

    /// How many bytes in memory the call removed or changed; 0 if the call failed or did not
    /// return, or if the count is not known.
    pub(crate) fn resident(&self) -> u64 {
        self.seen
            .pages
            .filter(|_| self.is_done())
            .map_or(0, |pages| pages.resident)
    }

    pub(crate) fn wall(&self) -> u64 {
        self.ended - self.began
    }
}

/// Divides the time of a call among its ranges, in proportion to their memory: a fork copies the
/// whole heap and a page of data in one call.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    /// For each task whose call has ended some of its ranges but not all: the mappings of the ended
    /// ranges, and their weights.
    open: HashMap<Pid, Vec<(Option<Name>, u64)>>,
}

impl Shares {
    /// Takes the next change. `time` is the time of the call, if this change represents the call.
    /// As soon as the time is known, `add` gets each range's mapping and its share of the time.
    pub(crate) fn take(
        &mut self,
        change: &Change,
        time: u64,
        mut add: impl FnMut(Option<Name>, u64),
    ) {
        // Plus one, because the kernel also walks page tables of a range without memory.
        let weight = change.resident().saturating_add(1);
        if !change.is_call {
            let others = self.open.entry(change.task.tid).or_default();
            return others.push((change.seen.what, weight));
        }
        let others = self.open.remove(&change.task.tid).unwrap_or_default();
        let mut weights = u128::from(weight);
        weights += others
            .iter()
            .map(|(_, weight)| u128::from(*weight))
            .sum::<u128>();
        let mut left = time;
        for (what, weight) in others {
            let share = u128::from(time) * u128::from(weight) / weights;
            left -= share as u64;
            add(what, share as u64);
        }
        add(change.seen.what, left);
    }
}

/// Finds the start that an end belongs to.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    open: HashMap<Pid, Vec<Open>>,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    mm: u64,
    span: Span,
    began: u64,
    seen: Seen,
}

impl Pairs {
    pub(crate) fn begin(&mut self, t: u64, record: &Record, span: Span, seen: Seen) {
        let open = Open {
            mm: record.mm,
            span,
            began: t,
            seen,
        };
        self.open.entry(record.task.tid).or_default().push(open);
    }

    /// Returns the change that ends now; `None` if the trace does not have its start.
    pub(crate) fn end(
        &mut self,
        t: u64,
        record: &Record,
        span: Span,
        result: Option<i64>,
    ) -> Option<Change> {
        let opens = self.open.get_mut(&record.task.tid)?;
        // The ranges of a call end in reverse order.
        let at = opens
            .iter()
            .rposition(|open| open.mm == record.mm && open.span == span)?;
        let open = opens.remove(at);
        let is_call = opens.is_empty();
        if is_call {
            self.open.remove(&record.task.tid);
        }
        Some(Change {
            task: record.task,
            span,
            began: open.began,
            ended: t,
            result,
            seen: open.seen,
            own: None,
            is_call,
        })
    }

    /// How many ranges of this task's call are open.
    pub(crate) fn open(&self, tid: Pid) -> usize {
        self.open.get(&tid).map_or(0, Vec::len)
    }
}

#[cfg(test)]
mod tests {
    use mmu_notifier::{Blocking, Va, VaRange};

    use super::*;
    use crate::record::Kind;

    #[test]
    fn ranges_of_one_call_end_in_reverse_and_one_stands_for_the_call() {
        let span = |page: u64| Span {
            event: 0,
            cause: "munmap",
            range: VaRange::covering(Va::new(page << 12), 4096).expect("a page"),
            blocking: Blocking::Allowed,
        };
        let record = |kind| Record {
            task: Task { pid: 1, tid: 1 },
            mm: 1,
            kind,
        };
        let mut pairs = Pairs::default();
        for page in [1, 2, 1] {
            pairs.begin(
                page,
                &record(Kind::Start(span(page))),
                span(page),
                Seen::default(),
            );
        }
        let mut end = |page| {
            let change = pairs.end(
                9,
                &record(Kind::MmNew { parent: None }),
                span(page),
                Some(0),
            );
            change.map(|change| (change.began, change.is_call))
        };
        assert_eq!(
            (end(3), end(1), end(2), end(1)),
            (None, Some((1, false)), Some((2, false)), Some((1, true)))
        );
        assert_eq!(pairs.open(1), 0);
    }
}
