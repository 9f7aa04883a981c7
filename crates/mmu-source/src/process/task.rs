//! What the tracer keeps about one task.
//!
//! A task is in one of these states. The task is stopped while the tracer serves it, and runs
//! otherwise.
//!
//! | state | meaning | left by |
//! | --- | --- | --- |
//! | parked | the task has stopped or ended before its parent's event named it; it is in no table of tasks yet | its parent's event, or the certainty that no task can name it any more |
//! | [`Life::Fresh`] | the task is known and has not entered its address space; no event is served in this state | entering |
//! | [`Life::In`] | the task is in an address space, and the observer holds a value for it | `execve`, its exit event, its end, detaching |
//! | [`Life::Left`] | the task is past its exit event, and its status has not been reported | its end |
//!
//! In the state `In` a task can have an open call ([`Tracee::call`]): from the entry stop of a
//! memory call to its exit stop. A task that has a filter and no open call does not stop at system
//! calls, except at those that the filter selects.
//!
//! If a signal interrupts a call, the kernel may restart that call after the signal's handler. Then
//! the exit stop moves the call, with its brackets open, to [`Tracee::again`], and the next entry
//! stop of the same call moves it back. The handler may make calls in between, which may be
//! interrupted too, so the list is a stack. While the stack is not empty, the task stops at every
//! system call.

use std::fmt;
use std::rc::Rc;

use mmu_notifier::{Mm, OwnedBracket};

use super::births::Birth;
use super::decode::Then;
use super::space::Space;
use super::sys::{Place, RawCall, Resume};
use super::{ExitStatus, Task};

/// One traced task.
pub(super) struct Tracee<H> {
    pub(super) task: Task,
    /// Whether a filter selects the calls at which the task stops. Without a filter, the task stops
    /// at every call.
    pub(super) filtered: bool,
    /// Whether the tracer has made sure that the task stops before it ends. A task that was
    /// attached to, or a child that such a task made before its first stop, may lack this stop
    /// until its own first stop.
    pub(super) stops_at_exit: bool,
    pub(super) life: Life<H>,
    pub(super) call: Option<OpenCall>,
    /// The calls that the kernel is going to restart.
    pub(super) again: Vec<OpenCall>,
    /// Whether the task was attached to and may be in a call whose entry the tracer has not seen.
    pub(super) in_unseen_call: bool,
    /// Whether the task is in the tracer's pid namespace. `None` if the tracer has not asked yet or
    /// cannot know.
    pub(super) numbers_agree: Option<bool>,
    /// The time of the task's last report, on the tracer's clock of reports.
    pub(super) reported: u64,
    /// Whether the task waits in `vfork` for its child. The tracer cannot stop it during that time.
    pub(super) in_vfork: bool,
    /// How the task is about to end, from its exit event, if the kernel may not report it again.
    pub(super) exit: Option<ExitStatus>,
}

/// The state of a task: see the table above.
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

    /// Tells whether the task may be making a child whose memory is a copy.
    pub(super) fn may_be_forking(&self) -> bool {
        self.in_unseen_call
            || self
                .call
                .as_ref()
                .is_some_and(|call| matches!(call.then, Then::Copy | Then::MayCopy))
    }

    /// Returns the task's address space, while it has one.
    pub(super) fn space(&self) -> Option<&Rc<Space>> {
        match &self.life {
            Life::Fresh(space) | Life::In(space, _) => Some(space),
            Life::Left(_) => None,
        }
    }

    /// Returns the handle of the address space that the task is in, or was in last.
    pub(super) fn mm(&self) -> &Mm {
        match &self.life {
            Life::Fresh(space) | Life::In(space, _) => &space.mm,
            Life::Left(mm) => mm,
        }
    }

    /// Tells how the task continues from a stop.
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

/// A memory call between its entry stop and its exit stop, or between its interruption and its
/// restart.
#[derive(Debug)]
pub(super) struct OpenCall {
    pub(super) raw: RawCall,
    pub(super) cause: &'static str,
    /// The caller's address space. `brackets` are open on it.
    pub(super) space: Rc<Space>,
    pub(super) brackets: Vec<OwnedBracket>,
    /// The other address spaces that the call acts on, unless they have exited meanwhile.
    pub(super) elsewhere: Vec<Elsewhere>,
    pub(super) then: Then,
    /// The mapping that the call makes, if the observer asked for mappings.
    pub(super) birth: Option<Birth>,
    /// Whether only the low half of the result is valid.
    pub(super) compat: bool,
}

/// The brackets that a call holds open on an address space other than the caller's.
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
    /// Closes all brackets, in reverse order of opening.
    pub(super) fn close(&mut self) {
        while self.elsewhere.pop().is_some() {}
        while self.brackets.pop().is_some() {}
    }

    /// Closes the brackets on `space`, which is not the caller's address space.
    pub(super) fn close_on(&mut self, space: &Rc<Space>) {
        self.elsewhere
            .retain(|elsewhere| !Rc::ptr_eq(&elsewhere.space, space));
    }

    /// Tells whether `next`, which the task is about to make, is this call restarted.
    pub(super) fn is_made_again(&self, next: &RawCall) -> bool {
        self.raw == *next
    }

    /// Tells whether a task that is now at `place` will never restart this call, because its signal
    /// handler did not return.
    ///
    /// A handler runs on the interrupted stack at a lower address, or on a stack of its own. If the
    /// task's stack pointer is that of the call, or less than a MiB above it, the task is on the
    /// interrupted stack and has left the handler by a jump.
    pub(super) fn is_given_up_at(&self, place: Place) -> bool {
        const NEAR: u64 = 1 << 20;
        place
            .stack
            .checked_sub(self.raw.place.stack)
            .is_some_and(|above| above < NEAR)
    }
}

/// Tells whether the result at an exit stop means that the kernel is going to restart the call.
///
/// # Source
/// `ERESTARTSYS`, `ERESTARTNOINTR`, `ERESTARTNOHAND`, `ERESTART_RESTARTBLOCK`,
/// include/linux/errno.h. 515 has another meaning.
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
    fn only_restart_codes_mean_a_restart() {
        let again: Vec<i64> = (-600..=600).filter(|result| means_again(*result)).collect();
        assert_eq!(again, [-516, -514, -513, -512]);
    }
}
