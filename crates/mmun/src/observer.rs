//! The trace as a subscriber: every task gets the notifier of its address space when it appears,
//! and puts the notifier when it ends.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use mmu_notifier::{GetError, InvalidateRange, Mm, MmWithUser, Notifier, Subscription, Subsystem};
use mmu_source::process::{Observer, Task, TaskEvent, current};

use crate::record::{Kind, Mapping, Record, Span};
use crate::recorder::Recorder;

type Alloc = Box<dyn Fn(&MmWithUser) -> Result<TraceNotifier, Infallible> + Send + Sync>;

/// The notifier of one address space. It records the invalidations there; its drop records `free`.
#[derive(Debug)]
pub(crate) struct TraceNotifier {
    recorder: Arc<Recorder>,
    mm: u64,
    /// The task of the latest put, for the record of `free`, which runs on behalf of no task.
    put_by: AtomicU64,
}

impl TraceNotifier {
    fn record(&self, mm: &Mm, kind: Kind) {
        if let Some(current) = current() {
            self.recorder.record(&Record {
                task: current.task,
                mm: mm.id(),
                kind,
            });
        }
    }
}

impl Notifier for TraceNotifier {
    fn release(&self, mm: &Mm) {
        // After a detach the task's memory lives on.
        if current().is_none_or(|current| current.cause != "detach") {
            self.record(mm, Kind::MmRelease);
        }
    }

    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        let Some(current) = current() else { return };
        if let Some(span) = Span::new(range, current.cause) {
            self.record(range.mm(), Kind::Start(span));
        }
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        let Some(current) = current() else { return };
        if let Some(span) = Span::new(range, current.cause) {
            self.record(range.mm(), Kind::End(span, current.result));
        }
    }
}

impl Drop for TraceNotifier {
    fn drop(&mut self) {
        let task = unpack(*self.put_by.get_mut());
        self.recorder.record(&Record {
            task,
            mm: self.mm,
            kind: Kind::Free,
        });
    }
}

/// The maximum count of subscriptions in [`TraceObserver::last`], and the time after which the next
/// event puts them.
const MOST_LAST: usize = 128;
const LONGEST_LAST: Duration = Duration::from_millis(20);

/// Subscribes every task, and records the life of tasks.
pub(crate) struct TraceObserver {
    recorder: Arc<Recorder>,
    subsystem: Subsystem<TraceNotifier, Infallible, Alloc>,
    /// The subscriptions of tasks that have left. They are put after the address space had the
    /// chance to end. The kernel has the same order: an exiting task first drops its `mm`, which
    /// runs `release`, and then closes its files, which put.
    leaving: Vec<(Task, Subscription<TraceNotifier>)>,
    /// The last subscription of each address space whose tasks have all left. These subscriptions
    /// are put several at a time, because each put wakes the thread that waits for a grace period,
    /// and the barriers of that thread interrupt this thread. Separate puts cost a program that
    /// forks all the time a tenth of its speed.
    last: Vec<Subscription<TraceNotifier>>,
    /// When the first of `last` came.
    since: Instant,
    /// The count of system calls that could not be read.
    missed: u64,
}

impl TraceObserver {
    pub(crate) fn new(recorder: Arc<Recorder>) -> TraceObserver {
        let shared = Arc::clone(&recorder);
        let alloc = move |mm: &MmWithUser| {
            Ok(TraceNotifier {
                recorder: Arc::clone(&shared),
                mm: mm.id(),
                put_by: AtomicU64::new(0),
            })
        };
        TraceObserver {
            recorder,
            subsystem: Subsystem::new(Box::new(alloc)),
            leaving: Vec::new(),
            last: Vec::new(),
            since: Instant::now(),
            missed: 0,
        }
    }

    /// Puts the remaining subscriptions, and waits until every notifier is freed and its `free` is
    /// recorded.
    pub(crate) fn finish(&mut self) {
        self.put_left();
        self.put_last();
        if let Err(error) = self.subsystem.synchronize() {
            unreachable!(
                "no section is open in the tracing thread once everything was put: {error}"
            );
        }
    }

    /// The count of system calls that could not be read; their changes are missing in the trace.
    pub(crate) fn missed(&self) -> u64 {
        self.missed
    }

    fn put_left(&mut self) {
        for (task, subscription) in self.leaving.drain(..) {
            subscription.put_by.store(pack(task), Relaxed);
            // Only this thread gets and puts, so the count is exact.
            let users = subscription.users() - 1;
            self.recorder.record(&Record {
                task,
                mm: subscription.mm().id(),
                kind: Kind::Put { users },
            });
            if users > 0 {
                subscription.put();
                continue;
            }
            if self.last.is_empty() {
                self.since = Instant::now();
            }
            self.last.push(subscription);
        }
        if self.last.len() >= MOST_LAST
            || !self.last.is_empty() && self.since.elapsed() >= LONGEST_LAST
        {
            self.put_last();
        }
    }

    fn put_last(&mut self) {
        self.last.drain(..).for_each(Subscription::put);
    }

    fn record(&self, task: Task, mm: &Mm, kind: Kind) {
        self.recorder.record(&Record {
            task,
            mm: mm.id(),
            kind,
        });
    }
}

impl fmt::Debug for TraceObserver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TraceObserver").finish_non_exhaustive()
    }
}

impl Observer for TraceObserver {
    /// `None` only if 2^32 tasks share the address space already.
    type Held = Option<Subscription<TraceNotifier>>;

    fn enter(&mut self, task: Task, mm: &MmWithUser) -> Self::Held {
        self.put_left();
        // A task may enter an address space whose last subscription still waits in `last`. Put that
        // subscription first, so that the users count the tasks only.
        if self.last.iter().any(|last| last.mm().id() == mm.id()) {
            self.put_last();
        }
        let subscription = match self.subsystem.get(mm) {
            Ok(subscription) => subscription,
            Err(GetError::Overflow) => return None,
            Err(error) => unreachable!(
                "the first task of an address space enters it before anything is invalidated there: {error}"
            ),
        };
        self.record(
            task,
            mm,
            Kind::Get {
                users: subscription.users(),
            },
        );
        Some(subscription)
    }

    fn leave(&mut self, task: Task, held: Self::Held) {
        self.put_left();
        self.leaving
            .extend(held.map(|subscription| (task, subscription)));
    }

    fn event(&mut self, event: &TaskEvent<'_>) {
        self.put_left();
        match *event {
            TaskEvent::MmNew {
                task, mm, parent, ..
            } => self.record(task, mm, Kind::MmNew { parent }),
            TaskEvent::Fork {
                task,
                child,
                mm,
                child_mm,
                ..
            } => {
                self.record(
                    task,
                    mm,
                    Kind::Fork {
                        child,
                        child_mm: child_mm.id(),
                    },
                );
            }
            TaskEvent::Exec {
                task, mm, old_mm, ..
            } => self.record(
                task,
                mm,
                Kind::Exec {
                    old_mm: old_mm.id(),
                },
            ),
            TaskEvent::Exit {
                task, mm, status, ..
            } => self.record(task, mm, Kind::Exit(status)),
            TaskEvent::Mapped {
                task, mm, range, ..
            } => {
                if let Some(current) = current() {
                    self.record(
                        task,
                        mm,
                        Kind::Map(Mapping {
                            cause: current.cause,
                            range,
                        }),
                    );
                }
            }
            TaskEvent::Detach { task, mm, .. } => self.record(task, mm, Kind::Detach),
            TaskEvent::UnknownAbi { .. } => self.missed += 1,
            _ => {}
        }
    }
}

fn pack(task: Task) -> u64 {
    u64::from(task.pid as u32) << 32 | u64::from(task.tid as u32)
}

fn unpack(packed: u64) -> Task {
    Task {
        pid: (packed >> 32) as i32,
        tid: packed as i32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_survives_packing() {
        let task = Task {
            pid: 4_194_304,
            tid: i32::MAX,
        };
        let back = unpack(pack(task));
        assert_eq!((back.pid, back.tid), (task.pid, task.tid));
    }
}
