//! How tasks come to be and become others: fork, clone, vfork and execve.

use std::mem;
use std::rc::Rc;

use super::super::decode::Then;
use super::super::proc;
use super::super::space::{Break, Space};
use super::super::sys::{self, NewTask, Resume, Stop};
use super::super::task::{Life, Tracee};
use super::{Error, ExitStatus, Observer, Pid, Scope, Task, TaskEvent, Tracer, kernel, resume};

/// What was reported of a task before its parent named it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Report {
    Stopped(Stop),
    Ended(ExitStatus),
}

/// A task that nobody has named yet. The kernel reports the stop of a child and the event of its parent in either order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parked {
    report: Report,
    /// Its process and that one's parent, if it could still be asked.
    family: Option<(Pid, Pid)>,
}

impl Parked {
    pub(super) fn is_stopped(self) -> bool {
        matches!(self.report, Report::Stopped(_))
    }
}

impl<O: Observer> Tracer<O> {
    /// Remembers what an unknown task reported. It stays stopped until its parent's event names it.
    pub(super) fn park(&mut self, tid: Pid, report: Report) -> Result<(), Error> {
        let family = self.parked.get(&tid).map_or_else(|| proc::family(tid), |parked| parked.family);
        // A thread that ends before it was named was killed, and never ran: a kill is for the whole process, and took with it
        // the event that would have named the thread. It must not wait for the end of its process, which waits for its own.
        let is_thread = || family.is_some_and(|(pid, _)| pid != tid && self.tasks.values().any(|t| t.task.pid == pid));
        if report == Report::Stopped(Stop::Exit) && is_thread() {
            self.parked.remove(&tid);
            return resume(tid, Resume::Cont, 0);
        }
        self.parked.insert(tid, Parked { report, family });
        // A parent that was killed before its event, and reaped, will never name it. The kernel may have given the child to
        // another tracee by then, a subreaper, which is not in the middle of making it. One that is adopted too early is
        // known when its parent names it.
        let may_be_named = self.tasks.values().any(|tracee| match family {
            Some((process, _)) if process == tracee.task.pid => true,
            Some((_, parent)) if parent == tracee.task.pid => {
                tracee.call.as_ref().is_some_and(|call| call.then == Then::Copy)
                    || sys::same_memory(tid, tracee.task.tid) == Some(true)
            }
            _ => false,
        });
        if may_be_named { Ok(()) } else { self.adopt(tid) }
    }

    /// A task of `pid` has ended: takes in the children it can have left unnamed. If another task names one later, it is
    /// known by then.
    pub(super) fn adopt_orphans_of(&mut self, pid: Option<Pid>) -> Result<(), Error> {
        let Some(pid) = pid else { return Ok(()) };
        let orphans: Vec<Pid> =
            self.parked.iter().filter(|(_, parked)| is_of_family(parked.family, pid)).map(|(tid, _)| *tid).collect();
        orphans.into_iter().try_for_each(|tid| self.adopt(tid))
    }

    /// Takes in a task whose parent's event never came, by what the kernel tells about it.
    fn adopt(&mut self, tid: Pid) -> Result<(), Error> {
        let family = self.parked.get(&tid).and_then(|parked| parked.family);
        let Some((pid, _)) = family else {
            // It has ended and nobody knows it: not a tracee of ours, or one that never ran.
            self.parked.remove(&tid);
            return Ok(());
        };
        let shares = |tracee: &&Tracee<O::Held>| {
            tracee.space().is_some() && (tracee.task.pid == pid || sys::same_memory(tid, tracee.task.tid) == Some(true))
        };
        let space = self.tasks.values().find(shares).and_then(|tracee| tracee.space().cloned());
        // Its parent is not in the table any more, and perhaps nobody is.
        let filtered = self.filters && self.tasks.values().all(|tracee| tracee.filtered);
        let task = Task { pid, tid };
        let is_new = space.is_none();
        let space = space.unwrap_or_else(|| Rc::new(Space::new(Break::default())));
        self.welcome(task, space, filtered, is_new, None, "fork");
        self.replay(tid)
    }

    /// A task has made another one.
    pub(super) fn cloned(&mut self, parent: Pid, kind: NewTask) -> Result<(), Error> {
        let message = sys::event_message(parent, Stop::NewTask(kind)).map_err(kernel("PTRACE_GETEVENTMSG", parent))?;
        let (Some(child), Some(tracee)) = (message, self.tasks.get_mut(&parent)) else { return Ok(()) };
        let child = child as Pid;
        tracee.in_vfork = kind == NewTask::Vfork;
        let Some(space) = tracee.space().cloned() else { return Ok(()) };
        // Every call that copies an address space stops at its entry, so that one is open; but the entry of a call in which
        // the task was attached to has not been seen.
        let copies = match &tracee.call {
            Some(call) => call.then == Then::Copy,
            None => !tracee.filtered && sys::same_memory(parent, child) == Some(false),
        };
        let cause = tracee.call.as_ref().map_or(kind.name(), |call| call.cause);
        let (task, filtered) = (tracee.task, tracee.filtered);
        let is_thread = !copies && kind == NewTask::Clone && sys::is_thread_of(task.pid, child);
        let child_task = Task { pid: if is_thread { task.pid } else { child }, tid: child };
        if self.tasks.contains_key(&child) {
            self.report_fork(task, &space, child, cause);
        } else {
            let child_space = if copies { Rc::new(Space::new(space.brk.get().inherited())) } else { Rc::clone(&space) };
            self.welcome(child_task, child_space, filtered, copies, Some((task, &space)), cause);
        }
        self.replay(child)
    }

    /// Puts a new task in the table and lets it enter.
    fn welcome(
        &mut self,
        task: Task,
        space: Rc<Space>,
        filtered: bool,
        is_new: bool,
        parent: Option<(Task, &Space)>,
        cause: &'static str,
    ) {
        self.tasks.insert(task.tid, Tracee::fresh(task, Rc::clone(&space), filtered));
        if is_new {
            let _scope = Scope::new(task, cause, None);
            self.observer.event(&TaskEvent::MmNew { task, mm: &space.mm });
        }
        if let Some((parent, parent_space)) = parent {
            self.report_fork(parent, parent_space, task.tid, cause);
        }
        self.appear(task.tid);
    }

    fn report_fork(&mut self, task: Task, space: &Space, child: Pid, cause: &'static str) {
        let Some(child) = self.tasks.get(&child) else { return };
        let _scope = Scope::new(task, cause, None);
        self.observer.event(&TaskEvent::Fork { task, child: child.task, mm: &space.mm, child_mm: child.mm() });
    }

    /// Serves what a task reported before it was known.
    fn replay(&mut self, tid: Pid) -> Result<(), Error> {
        match self.parked.remove(&tid).map(|parked| parked.report) {
            Some(Report::Stopped(stop)) => self.stopped(tid, stop),
            Some(Report::Ended(status)) => self.ended(tid, status),
            None => Ok(()),
        }
    }

    /// A task has run `execve`. Its other threads are gone, and it has the identifier of the process now.
    pub(super) fn execed(&mut self, pid: Pid) -> Result<(), Error> {
        let message = sys::event_message(pid, Stop::Exec).map_err(kernel("PTRACE_GETEVENTMSG", pid))?;
        let Some(former) = message.map(|tid| tid as Pid) else { return Ok(()) };
        if former != pid && self.tasks.contains_key(&former) {
            // The old leader's end is not reported: this task has taken its place.
            let status = self.tasks.get(&pid).and_then(|leader| leader.exit).unwrap_or(ExitStatus::Code(0));
            self.forget(pid, "execve", status);
        }
        self.depart(former, "execve");
        let Some(mut tracee) = self.tasks.remove(&former) else {
            return self.park(pid, Report::Stopped(Stop::Trap));
        };
        let task = Task { pid, tid: pid };
        let space = Rc::new(Space::new(Break::of_new_program()));
        tracee.task = task;
        tracee.in_vfork = false;
        tracee.exit = None;
        let old = mem::replace(&mut tracee.life, Life::Fresh(Rc::clone(&space)));
        self.tasks.insert(pid, tracee);
        let scope = Scope::new(task, "execve", None);
        self.observer.event(&TaskEvent::MmNew { task, mm: &space.mm });
        if let Life::Left(old_mm) = &old {
            self.observer.event(&TaskEvent::Exec { task, mm: &space.mm, old_mm });
        }
        drop(scope);
        self.appear(pid);
        self.resume(pid, 0)
    }
}

/// Tells whether a task with this process and parent can have been made by a task of `pid`.
fn is_of_family(family: Option<(Pid, Pid)>, pid: Pid) -> bool {
    family.is_some_and(|(process, parent)| process == pid || parent == pid)
}
