//! Examines a call while its task is stopped: before the call, the mappings in its range and how
//! much of the range is in memory; after the call, how long the task ran in it.

pub(crate) mod ioctl;
pub(crate) mod place;
pub(crate) mod runtime;

use std::collections::HashMap;

use mmu_source::process::{Pid, Task};

use self::ioctl::Which;
use self::place::Place;
use self::runtime::Runtime;
use crate::change::Seen;
use crate::intern::{Name, Names};
use crate::record::Span;

/// Examines address spaces.
#[derive(Debug, Default)]
pub(crate) struct Capture {
    places: HashMap<u64, Place>,
    /// The address space that each task is in.
    mms: HashMap<Pid, u64>,
    /// The count of ranges whose address space could not be examined.
    pub(crate) unseen: u64,
    pub(crate) names: Names,
    pub(crate) runtime: Runtime,
}

/// The maximum count of address spaces whose files are kept open: two files each.
const MOST_OPEN: usize = 128;

impl Capture {
    /// A task has entered an address space.
    pub(crate) fn entered(&mut self, task: Task, mm: u64) {
        if self.mms.insert(task.tid, mm).is_none() {
            self.runtime.entered(task);
        }
    }

    /// A task has ended, or is not traced any more.
    pub(crate) fn left(&mut self, task: Task) {
        if self.mms.remove(&task.tid).is_some() {
            self.runtime.left(task);
        }
    }

    /// The address space that a task is in.
    pub(crate) fn mm(&self, tid: Pid) -> Option<u64> {
        self.mms.get(&tid).copied()
    }

    /// An address space is gone.
    pub(crate) fn released(&mut self, mm: u64) {
        self.places.remove(&mm);
    }

    /// Examines a range of `mm` that a call of `task` is about to change.
    pub(crate) fn look(&mut self, task: Task, mm: u64, span: &Span) -> Seen {
        let (start, end) = (span.start(), u64::try_from(span.end()).unwrap_or(u64::MAX));
        let what = self.what(task.tid, mm, start, end);
        self.unseen += u64::from(!self.places.contains_key(&mm));
        let pages = self
            .place(task.tid, mm)
            .and_then(|place| place.pages(start, end));
        Seen {
            what,
            pages,
            site: None,
        }
    }

    /// The name of the first mapping in a range, or [`NOTHING`] if the range has none; `None` if
    /// the address space cannot be examined.
    pub(crate) fn what(&mut self, tid: Pid, mm: u64, start: u64, end: u64) -> Option<Name> {
        let vma = self.place(tid, mm)?.mapping(start, Which::HoldingOrNext);
        let name = match &vma {
            Some(vma) if vma.start < end => kind(vma),
            _ => NOTHING,
        };
        Some(self.names.number(name))
    }

    pub(crate) fn place(&mut self, tid: Pid, mm: u64) -> Option<&mut Place> {
        if !self.places.contains_key(&mm) {
            if self.places.len() >= MOST_OPEN {
                self.places.clear();
            }
            // A call can act on another process (`process_madvise`): then use a task of that
            // process.
            let is_there = |tid: Pid| self.mms.get(&tid) == Some(&mm);
            let tid = if is_there(tid) {
                tid
            } else {
                *self.mms.keys().find(|tid| is_there(**tid))?
            };
            self.places.insert(mm, Place::of(tid)?);
        }
        self.places.get_mut(&mm)
    }
}

/// The name for a range without a mapping.
pub(crate) const NOTHING: &str = "nothing";

/// The name of a mapping, for the user. A named anonymous mapping is `[anon:NAME]`.
fn kind(vma: &ioctl::Vma) -> &str {
    match vma.name.as_str() {
        "" if vma.inode == 0 => "anonymous",
        "" => "file",
        name => name,
    }
}
