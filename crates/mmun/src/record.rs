//! The records of a trace, and their description.

use mmu_notifier::{Blocking, InvalidateRange, VaRange};
use mmu_source::process::{ExitStatus, Task};

use crate::events;
use crate::kind::LineKind;

/// The records, for `--help` and the man page. `docs/trace-json.md` has every key.
pub(crate) const HELP: &str = "\
Records (--json writes one object a line; docs/trace-json.md has the schema):
  v            version of this format: 1
  t            nanoseconds since the trace began; never decreases from line to line
  pid, tid     the process and the task that made the call or to which it happened
  mm           id of the address space, counted from 1; threads and vfork children share one
  comm         the name of the task

  mm_new       an address space is created: the program starts, forks or executes another one; program
  get          a task subscribes to its address space; users: the references there are then
  start, end   around one invalidated range of one system call
                 event, cause    what kind of change, and the system call behind it
                 start, end      addresses, half-open; blockable: whether subscribers may sleep
                 address, bytes  the same as numbers
                 result          (end only) what the call returned, -errno if it failed;
                                 absent if the task died or the trace ended in the call
                 what, resident, file, huge, swapped, site (start only) and self (end only): --details, -k
  map          (with --births) a mapping is made or has grown; cause, start, end (of a heap that has grown: all of it)
  fork         a task or process is created; child_pid, child_tid, child_mm
  exec         the process enters a new address space; old_mm: the one it left; program
  exit         a task ends; code, or signal if it was killed
  detach       the trace of a task ends before the task does: it lives on, and so does its address
               space, which has no mm_release then
  put          a task gives its subscription back; users: the references there are then
  mm_release   an address space ends: its last task is gone
  free         the notifier of an address space is freed, after its last put and a grace period;
               pid and tid are those of the last put, users is 0
  stack        (with -k, at the end) the frames of a site
  summary      (with --summary) totals; the last line

Text output joins start and end into one line, as strace does: time in seconds, task, address space,
event, range, size, call, result and duration: with --details the time in the call itself, else that from start to end.

How long (self): the time the kernel counted for the task between its stop before the call and its stop after it, less
what a call that does nothing takes, which is measured when the trace begins. Wrong by up to 0.5 us for a small call
and by 1 to 4 % for a large one; other programs on a busy machine do not count. Calls for which the scheduler kept the
program and mmun on different processors are less exact, in a virtual machine by 10 us: taskset keeps them together.
--wall is the time on the clock, the stops of the tracer included.
How much (resident): the bytes of the range that were in memory before the call; those of the zero page are not counted.";

/// One line of a trace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    pub(crate) task: Task,
    pub(crate) mm: u64,
    pub(crate) kind: Kind,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// `parent`: the task that forked.
    MmNew {
        parent: Option<Task>,
    },
    MmRelease,
    Get {
        users: u32,
    },
    Put {
        users: u32,
    },
    Free,
    Start(Span),
    /// `None`: the call did not return, because the task died or the trace ended.
    End(Span, Option<i64>),
    /// A mapping was made or has grown.
    Map(Mapping),
    Fork {
        child: Task,
        child_mm: u64,
    },
    Exec {
        old_mm: u64,
    },
    Exit(ExitStatus),
    Detach,
}

impl Kind {
    pub(crate) fn of_line(self) -> LineKind {
        match self {
            Kind::MmNew { .. } => LineKind::MmNew,
            Kind::MmRelease => LineKind::MmRelease,
            Kind::Get { .. } => LineKind::Get,
            Kind::Put { .. } => LineKind::Put,
            Kind::Free => LineKind::Free,
            Kind::Start(_) => LineKind::Start,
            Kind::End(..) => LineKind::End,
            Kind::Map(_) => LineKind::Map,
            Kind::Fork { .. } => LineKind::Fork,
            Kind::Exec { .. } => LineKind::Exec,
            Kind::Exit(_) => LineKind::Exit,
            Kind::Detach => LineKind::Detach,
        }
    }
}

impl Record {
    /// The range of a start or an end.
    pub(crate) fn span(&self) -> Option<&Span> {
        match &self.kind {
            Kind::Start(span) | Kind::End(span, _) => Some(span),
            _ => None,
        }
    }
}

/// The optional keys of a record: names, and what `--details` and `-k` add.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Extra<'a> {
    /// The name of the task; empty if it is not known.
    pub(crate) comm: &'a str,
    /// The file that the process runs.
    pub(crate) program: Option<&'a str>,
    /// The first mapping of the range.
    pub(crate) what: Option<&'a str>,
    pub(crate) pages: Option<Pages>,
    /// The index of the stack.
    pub(crate) site: Option<u32>,
    /// The time the task ran in the call; only the last end of a call has it.
    pub(crate) own: Option<u64>,
}

/// The bytes of a range, by the kind of their pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pages {
    /// In memory, in total, without the zero page.
    pub(crate) resident: u64,
    /// Of `resident`, the bytes of files or of shared memory.
    pub(crate) file: u64,
    /// Of `resident`, the bytes in huge pages.
    pub(crate) huge: u64,
    pub(crate) swapped: u64,
}

impl Pages {
    /// Whether no page was in memory or swapped.
    pub(crate) fn is_empty(&self) -> bool {
        self.resident == 0 && self.swapped == 0
    }
}

/// A mapping, and the system call that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) cause: &'static str,
    /// The whole heap, if the heap has grown.
    pub(crate) range: VaRange,
}

/// One range of one system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Position in [`events::NAMES`].
    pub(crate) event: usize,
    pub(crate) cause: &'static str,
    pub(crate) range: VaRange,
    pub(crate) blocking: Blocking,
}

impl Span {
    /// `None` for an event this version of the program has no name for.
    pub(crate) fn new(range: &InvalidateRange<'_>, cause: &'static str) -> Option<Span> {
        Some(Span {
            event: events::number(range.event())?,
            cause,
            range: range.range(),
            blocking: range.blocking(),
        })
    }

    pub(crate) fn event_name(&self) -> &'static str {
        events::NAMES[self.event]
    }

    pub(crate) fn start(&self) -> u64 {
        self.range.start().get()
    }

    /// The last address plus one: 2^64 for a range that includes the last address.
    pub(crate) fn end(&self) -> u128 {
        u128::from(self.range.last().get()) + 1
    }
}
