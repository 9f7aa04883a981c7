//! What the tracer keeps about one task.
//!
//! A task is in one of these states. It is stopped while the tracer works on it and runs otherwise.
//!
//! | state | is | leaves it by |
//! | --- | --- | --- |
//! | parked | stopped or ended before the event of its parent has named it; in no table of tasks yet | its parent's event, or that no task can name it any more |
//! | [`Life::Fresh`] | known and not entered yet; no event is served in this state | entering |
//! | [`Life::In`] | in an address space; the observer holds something for it | `execve`, its exit event, its end, detaching |
//! | [`Life::Left`] | past its exit event, its status not reported yet | its end |
//!
//! In the state `In` a call can be open ([`Tracee::call`]): from the entry stop of a memory call to
//! its exit stop. A task without an open call and with a filter runs without stopping at system
//! calls.
//!
//! A call that a signal interrupts can leave the kernel to be made again, after the signal's
//! handler: at its exit stop it goes to [`Tracee::again`] with its brackets open, and comes back at
//! its next entry stop. The handler may make calls in between, and these can be interrupted as
//! well: the list is a stack. While it holds anything, the task stops at every system call.

use std::fmt;
use std::rc::Rc;

use mmu_notifier::{Mm, OwnedBracket};

use super::births::Birth;
use super::decode::Then;
use super::space::Space;
use super::sys::{Place, RawCall, Resume};
use super::{ExitStatus, Task};

/// One task that is traced.
pub(super) struct Tracee<H> {
    pub(super) task: Task,
    /// Its memory calls stop by a filter. Without one, every call stops.
    pub(super) filtered: bool,
    /// Whether the task stops before it ends. A task that was attached to, or that such a task made
    /// before its first stop, does not yet.
    pub(super) stops_at_exit: bool,
    pub(super) life: Life<H>,
    pub(super) call: Option<OpenCall>,
    /// The calls that the kernel is going to make again.
    pub(super) again: Vec<OpenCall>,
    /// Whether the task was attached to, and may be in a call whose entry was not seen.
    pub(super) in_unseen_call: bool,
    /// Its process numbers processes as the tracer does; `None` if that was not asked yet or cannot
    /// be known.
    pub(super) numbers_agree: Option<bool>,
    /// When it reported last, on the tracer's clock of reports.
    pub(super) reported: u64,
    /// Whether the task waits in `vfork` for its child. Nothing can stop it then.
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
        Tracee {
            task,
            filtered,
            stops_at_exit: filtered,
            life: Life::Fresh(space),
            call: None,
            again: Vec::new(),
            in_unseen_call: false,
            numbers_agree: None,
            reported: 0,
            in_vfork: false,
            exit: None,
        }
    }

    /// Tells whether it may be making a task that is not a thread of its own process.
    pub(super) fn may_be_forking(&self) -> bool {
        self.in_unseen_call
            || self
                .call
                .as_ref()
                .is_some_and(|call| matches!(call.then, Then::Copy | Then::MayCopy))
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

    /// How it continues from a stop.
    pub(super) fn resume(&self) -> Resume {
        let every_call = self.call.is_some() || !self.again.is_empty() || !self.filtered;
        if every_call {
            Resume::Syscall
        } else {
            Resume::Cont
        }
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

/// A memory call between its entry stop and its exit stop, or between that and its next entry stop.
#[derive(Debug)]
pub(super) struct OpenCall {
    pub(super) raw: RawCall,
    pub(super) cause: &'static str,
    /// The caller's address space, and what is open there.
    pub(super) space: Rc<Space>,
    pub(super) brackets: Vec<OwnedBracket>,
    /// The other ones it acts on, unless they have ended meanwhile.
    pub(super) elsewhere: Vec<Elsewhere>,
    pub(super) then: Then,
    /// What it maps, if that is to be told.
    pub(super) birth: Option<Birth>,
    /// Only the low half of the result counts.
    pub(super) compat: bool,
}

/// What a call holds open on an address space that is not the caller's.
#[derive(Debug)]
pub(super) struct Elsewhere {
    space: Rc<Space>,
    brackets: Vec<OwnedBracket>,
}

impl Elsewhere {
    pub(super) fn new(space: Rc<Space>, brackets: Vec<OwnedBracket>) -> Elsewhere {
        space.from_elsewhere.set(space.from_elsewhere.get() + 1);
        Elsewhere { space, brackets }
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        while self.brackets.pop().is_some() {}
        self.space
            .from_elsewhere
            .set(self.space.from_elsewhere.get() - 1);
    }
}

impl OpenCall {
    /// Closes all brackets, the last one first.
    pub(super) fn close(&mut self) {
        while self.elsewhere.pop().is_some() {}
        while self.brackets.pop().is_some() {}
    }

    /// Closes the brackets on an address space that is not the caller's.
    pub(super) fn close_on(&mut self, space: &Rc<Space>) {
        self.elsewhere
            .retain(|elsewhere| !Rc::ptr_eq(&elsewhere.space, space));
    }

    /// Tells whether `next`, which the task is about to make, is this call made again.
    pub(super) fn is_made_again(&self, next: &RawCall) -> bool {
        self.raw == *next
    }

    /// Tells whether a task that stands at `place` has given up making this call again: its handler
    /// did not return.
    ///
    /// A handler runs on the interrupted stack, further down, or on a stack of its own. A task that
    /// stands at or above the call on the same stack has left the handler by a jump.
    pub(super) fn is_given_up_at(&self, place: Place) -> bool {
        const NEAR: u64 = 1 << 20;
        place
            .stack
            .checked_sub(self.raw.place.stack)
            .is_some_and(|above| above < NEAR)
    }
}

/// Tells whether the result at an exit stop says that the kernel is going to make the call again.
///
/// # Source
/// `ERESTARTSYS`, `ERESTARTNOINTR`, `ERESTARTNOHAND`, `ERESTART_RESTARTBLOCK`,
/// include/linux/errno.h. 515 is another thing.
pub(super) fn means_again(result: i64) -> bool {
    matches!(-result, 512..=514 | 516)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::space::Break;

    #[test]
    fn a_call_is_made_again_from_where_it_was_made_or_given_up() {
        let place = |stack| Place {
            instruction: 0x1002,
            stack,
        };
        let raw = RawCall {
            arch: 1,
            number: 57,
            args: [0; 6],
            place: place(0x7000_0000),
        };
        let call = OpenCall {
            raw,
            cause: "fork",
            space: Rc::new(Space::new(Break::default())),
            brackets: Vec::new(),
            elsewhere: Vec::new(),
            then: Then::Copy,
            birth: None,
            compat: false,
        };
        assert!(call.is_made_again(&raw));
        assert!(!call.is_made_again(&RawCall { number: 11, ..raw }));
        assert!(
            !call.is_given_up_at(place(0x7000_0000 - 0x500)),
            "a handler on the same stack"
        );
        assert!(
            !call.is_given_up_at(place(0x1000_0000)),
            "a handler on a stack of its own"
        );
        assert!(
            call.is_given_up_at(place(0x7000_0000)),
            "another call of the same function"
        );
        assert!(
            call.is_given_up_at(place(0x7000_0100)),
            "a jump out of the handler"
        );
    }

    #[test]
    fn only_what_restarts_means_again() {
        let again: Vec<i64> = (-600..=600).filter(|result| means_again(*result)).collect();
        assert_eq!(again, [-516, -514, -513, -512]);
    }
}
