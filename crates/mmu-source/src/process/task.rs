//! What the tracer keeps about one task.
//!
//! A task is in one of these states. It is stopped while the tracer works on it and runs otherwise.
//!
//! | state | is | leaves it by |
//! | --- | --- | --- |
//! | parked | stopped or ended before the event of its parent has named it; in no table of tasks yet | its parent's event, or the death of its parent |
//! | [`Life::Fresh`] | known and not entered yet; no event is served in this state | entering |
//! | [`Life::In`] | in an address space; the observer holds something for it | `execve`, its exit event, its end, detaching |
//! | [`Life::Left`] | past its exit event, its status not reported yet | its end |
//!
//! In the state `In` a call can be open ([`Tracee::call`]): from the entry stop of a memory call to its exit stop. A task
//! without an open call and with a filter runs without stopping at system calls.

use std::fmt;
use std::rc::Rc;

use mmu_notifier::{Mm, OwnedBracket};

use super::births::Birth;
use super::decode::Then;
use super::space::Space;
use super::sys::Resume;
use super::{ExitStatus, Task};

/// One task that is traced.
pub(super) struct Tracee<H> {
    pub(super) task: Task,
    /// Its memory calls stop by a filter. Without one, every call stops.
    pub(super) filtered: bool,
    pub(super) life: Life<H>,
    pub(super) call: Option<OpenCall>,
    /// It waits for its child to leave its memory, and can be stopped by nothing.
    pub(super) in_vfork: bool,
    /// How it is about to end, known from its exit event.
    pub(super) exit: Option<ExitStatus>,
}

/// Where a task stands.
pub(super) enum Life<H> {
    Fresh(Rc<Space>),
    In(Rc<Space>, H),
    Left(Mm),
}

impl<H> Tracee<H> {
    pub(super) fn fresh(task: Task, space: Rc<Space>, filtered: bool) -> Tracee<H> {
        Tracee { task, filtered, life: Life::Fresh(space), call: None, in_vfork: false, exit: None }
    }

    /// Its address space, while it has one.
    pub(super) fn space(&self) -> Option<&Rc<Space>> {
        match &self.life {
            Life::Fresh(space) | Life::In(space, _) => Some(space),
            Life::Left(_) => None,
        }
    }

    /// The handle of the address space it is in or was in last.
    pub(super) fn mm(&self) -> &Mm {
        match &self.life {
            Life::Fresh(space) | Life::In(space, _) => &space.mm,
            Life::Left(mm) => mm,
        }
    }

    /// How it goes on from a stop.
    pub(super) fn resume(&self) -> Resume {
        if self.call.is_some() || !self.filtered { Resume::Syscall } else { Resume::Cont }
    }
}

impl<H> fmt::Debug for Tracee<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let life = match &self.life {
            Life::Fresh(_) => "fresh",
            Life::In(..) => "in",
            Life::Left(_) => "left",
        };
        f.debug_struct("Tracee")
            .field("task", &self.task)
            .field("life", &life)
            .field("mm", &self.mm().id())
            .field("call", &self.call)
            .finish_non_exhaustive()
    }
}

/// A memory call between its entry stop and its exit stop.
#[derive(Debug)]
pub(super) struct OpenCall {
    pub(super) cause: &'static str,
    pub(super) brackets: Vec<OwnedBracket>,
    /// The address space the brackets are on, unless that has ended meanwhile.
    pub(super) space: Option<Rc<Space>>,
    pub(super) then: Then,
    /// What it maps, if that is to be told.
    pub(super) birth: Option<Birth>,
    /// Only the low half of the result counts.
    pub(super) compat: bool,
}
