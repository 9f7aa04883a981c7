//! How tasks are made and replaced: fork, clone, vfork and execve.

use std::mem;
use std::rc::Rc;

use super::super::decode::Then;
use super::super::proc;
use super::super::space::{Break, Space};
use super::super::sys::{self, NewTask, Resume, Stop};
use super::super::task::{Life, OpenCall, Tracee};
use super::{Error, ExitStatus, Observer, Pid, Scope, Task, TaskEvent, Tracer, kernel, resume};

/// The first report of a task that its parent's event has not named yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Report {
    Stopped(Stop),
    Ended(ExitStatus),
}

/// A task that no event has named yet. The kernel reports the stop of a child and the event of its
/// parent in either order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parked {
    report: Report,
    family: Family,
    /// The time of the task's first report, on the tracer's clock.
    since: u64,
    /// Whether the tasks that could name the child were interrupted, so that each of them reports
    /// once more.
    asked: bool,
}

/// What is known of a task's origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Family {
    process: Option<Pid>,
    parent: Option<Pid>,
}

impl Parked {
    pub(super) fn is_stopped(self) -> bool {
        matches!(self.report, Report::Stopped(_))
    }
}

impl<O: Observer> Tracer<O> {
    /// Stores the report of an unknown task, except in three cases, which are handled at once. The
    /// task stays stopped until its parent's event names it, or until no task can name it any more.
    pub(super) fn park(&mut self, tid: Pid, report: Report) -> Result<(), Error> {
        let before = self.parked.get(&tid).copied();
        let family = before.map_or_else(|| self.family(tid), |parked| parked.family);
        match report {
            // The task was made with `CLONE_PTRACE`. No event will name it, and children are not
            // traced.
            Report::Stopped(stop) if !self.options.follow => {
                let signal = if let Stop::Signal(signal) = stop {
                    signal
                } else {
                    0
                };
                return resume(tid, Resume::Detach, signal);
            }
            // This thread ends before an event named it, so it was killed and never ran. The kill
            // was for the whole process and discarded the event that would have named the thread.
            // The thread must end now: the end of its process waits for it.
            Report::Stopped(Stop::Exit) if self.is_thread_of_ours(tid, family) => {
                self.parked.remove(&tid);
                return resume(tid, Resume::Cont, 0);
            }
            // Either not a tracee, or a tracee that never ran.
            Report::Ended(_) if family.process.is_none() => {
                self.parked.remove(&tid);
                return Ok(());
            }
            _ => {}
        }
        let parked = Parked {
            report,
            family,
            since: self.clock,
            asked: false,
        };
        let parked = before.map_or(parked, |before| Parked { report, ..before });
        self.parked.insert(tid, parked);
        Ok(())
    }

    /// Looks up the process and the parent of a task in `/proc`. If `/proc` does not say, asks the
    /// kernel about each known process.
    fn family(&self, tid: Pid) -> Family {
        if let Some((process, parent)) = proc::family(tid) {
            return Family {
                process: Some(process),
                parent: Some(parent),
            };
        }
        let mut pids: Vec<Pid> = self.tasks.values().map(|tracee| tracee.task.pid).collect();
        pids.sort_unstable();
        pids.dedup();
        Family {
            process: pids.into_iter().find(|pid| sys::is_thread_of(*pid, tid)),
            parent: None,
        }
    }

    fn is_thread_of_ours(&self, tid: Pid, family: Family) -> bool {
        let is_ours = |pid| pid != tid && self.tasks.values().any(|tracee| tracee.task.pid == pid);
        family.process.is_some_and(is_ours)
    }

    /// Takes in the parked tasks that no event will name any more.
    ///
    /// After a task has made a child, its next report is the event that names the child, unless the
    /// task is killed first. So a task that has reported since the child's first report will not
    /// name the child. If a killed task may have left the child, this function examines the tasks
    /// that have not reported since. A sleeping task is not making a child. Any other task is
    /// interrupted, so that it reports.
    pub(super) fn adopt_unnamed(&mut self) -> Result<(), Error> {
        let children: Vec<Pid> = self.parked.keys().copied().collect();
        for child in children {
            let Some(parked) = self.parked.get(&child).copied() else {
                continue;
            };
            let mut makers: Vec<Pid> = self
                .tasks
                .values()
                .filter(|tracee| can_name(tracee, child, &parked))
                .map(|t| t.task.tid)
                .collect();
            if self.lost_a_maker && !parked.asked && !self.is_thread_of_ours(child, parked.family) {
                makers.retain(|maker| !self.is_asleep(*maker));
                for maker in &makers {
                    sys::interrupt(*maker).map_err(kernel("PTRACE_INTERRUPT", *maker))?;
                }
                if let Some(parked) = self.parked.get_mut(&child) {
                    parked.asked = true;
                }
            }
            if makers.is_empty() {
                self.adopt(child, parked.family)?;
            }
        }
        Ok(())
    }

    /// Tells whether a task sleeps in the kernel, as far as `/proc` says. Sleeping counts as a
    /// report.
    fn is_asleep(&mut self, tid: Pid) -> bool {
        let is_asleep = matches!(proc::state(tid), Some(b'S' | b'D'));
        if let Some(tracee) = self.tasks.get_mut(&tid).filter(|_| is_asleep) {
            tracee.reported = self.clock;
        }
        is_asleep
    }

    /// Takes in a task that its parent's event never named, with what the kernel says about it.
    fn adopt(&mut self, tid: Pid, family: Family) -> Result<(), Error> {
        let pid = family.process.unwrap_or(tid);
        let of_process = self
            .tasks
            .values()
            .find(|tracee| tracee.task.pid == pid && tracee.space().is_some());
        let known = of_process.and_then(|tracee| tracee.space().cloned());
        let space = known.or_else(|| self.space_shared_with(tid).ok());
        // The parent has left the table, and the table may be empty. If the process spawned last
        // has a filter and no task in the table lacks one, the child has inherited the filter.
        let filtered = self.filters && self.tasks.values().all(|tracee| tracee.filtered);
        let is_new = space.is_none();
        let space = space.unwrap_or_else(|| self.space_of_its_own(tid));
        self.welcome(Task { pid, tid }, space, filtered, is_new, None, "fork");
        self.replay(tid)
    }

    /// Returns the address space of a traced task that shares its memory with `tid`.
    ///
    /// # Errors
    /// If no address space is known to be that of `tid`. The error holds the address spaces for
    /// which the kernel does not say.
    pub(super) fn space_shared_with(&self, tid: Pid) -> Result<Rc<Space>, Vec<Rc<Space>>> {
        let mut unknown = Vec::new();
        for tracee in self.tasks.values() {
            let Some(space) = tracee.space() else {
                continue;
            };
            match sys::same_memory(tid, tracee.task.tid) {
                Some(true) => return Ok(Rc::clone(space)),
                Some(false) => {}
                None => unknown.push(Rc::clone(space)),
            }
        }
        unknown.sort_unstable_by_key(|space| space.mm.id());
        unknown.dedup_by_key(|space| space.mm.id());
        Err(unknown)
    }

    /// Makes an address space for `tid`, which shares no known address space. If the kernel does
    /// not say whether two address spaces are the same, both stay in doubt.
    fn space_of_its_own(&mut self, tid: Pid) -> Rc<Space> {
        let unknown = self.space_shared_with(tid).err().unwrap_or_default();
        self.in_doubt |= !unknown.is_empty();
        Rc::new(Space::doubtful(&unknown))
    }

    /// Handles the event of a task that has made a child.
    pub(super) fn cloned(&mut self, parent: Pid, kind: NewTask) -> Result<(), Error> {
        let message = sys::event_message(parent, Stop::NewTask(kind))
            .map_err(kernel("PTRACE_GETEVENTMSG", parent))?;
        let (Some(child), Some(tracee)) = (message, self.tasks.get_mut(&parent)) else {
            return Ok(());
        };
        let child = child as Pid;
        tracee.in_vfork = kind == NewTask::Vfork;
        let Some(space) = tracee.space().cloned() else {
            return Ok(());
        };
        let (task, filtered) = (tracee.task, tracee.filtered);
        let cause = tracee.call.as_ref().map_or(kind.name(), |call| call.cause);
        let is_thread = || kind == NewTask::Clone && sys::is_thread_of(task.pid, child);
        let asked = || {
            if is_thread() {
                Some(true)
            } else {
                sys::same_memory(parent, child)
            }
        };
        // Every call that copies an address space stops at its entry, so the call is open now. The
        // exception is a task that was attached to in the middle of such a call: the tracer has not
        // seen its entry.
        let shares = match &tracee.call {
            Some(OpenCall {
                then: Then::Copy, ..
            }) => Some(false),
            None if !tracee.in_unseen_call => Some(true),
            _ => asked(),
        };
        let pid = if shares == Some(true) && is_thread() {
            task.pid
        } else {
            child
        };
        if let Some(known) = self.tasks.get(&child) {
            if let Some(space) = known.space().filter(|_| shares == Some(false)) {
                space.is_its_own();
            }
            self.report_fork(task, &space, child, cause);
        } else {
            let child_space = match shares {
                Some(true) => Rc::clone(&space),
                Some(false) => Rc::new(Space::new(space.brk.get().inherited())),
                None => {
                    self.in_doubt = true;
                    Rc::new(Space::doubtful([&space]))
                }
            };
            let child_task = Task { pid, tid: child };
            self.welcome(
                child_task,
                child_space,
                filtered,
                shares != Some(true),
                Some((task, &space)),
                cause,
            );
        }
        self.copy_ends(parent, child);
        self.replay(child)
    }

    /// Handles a child whose memory is a copy. The copying is over. If the call's result is known,
    /// closes the call's brackets, and the call needs no stop at its exit. Otherwise the brackets
    /// stay open until that stop.
    fn copy_ends(&mut self, parent: Pid, child: Pid) {
        let Some(tracee) = self.tasks.get_mut(&parent) else {
            return;
        };
        if !tracee.may_be_forking() || tracee.call.is_none() {
            return;
        }
        // The result is the child's pid in the parent's pid namespace. It differs from the child's
        // pid here only if the parent is in another pid namespace than the tracer.
        if tracee.numbers_agree.is_none() {
            tracee.numbers_agree = proc::shares_pid_namespace(parent);
        }
        if tracee.numbers_agree == Some(true) {
            if let Some(call) = tracee.call.take() {
                self.finish(parent, call, Some(child.into()));
            }
        }
    }

    /// Adds a new task to the table and lets it enter its address space.
    fn welcome(
        &mut self,
        task: Task,
        space: Rc<Space>,
        filtered: bool,
        is_new: bool,
        parent: Option<(Task, &Space)>,
        cause: &'static str,
    ) {
        self.tasks
            .insert(task.tid, Tracee::fresh(task, Rc::clone(&space), filtered));
        if is_new {
            let _scope = Scope::new(task, cause, None);
            self.observer.event(&TaskEvent::MmNew {
                task,
                mm: &space.mm,
                parent: parent.map(|(task, _)| task),
            });
        }
        if let Some((parent, parent_space)) = parent {
            self.report_fork(parent, parent_space, task.tid, cause);
        }
        self.appear(task.tid);
    }

    fn report_fork(&mut self, task: Task, space: &Space, child: Pid, cause: &'static str) {
        let Some(child) = self.tasks.get(&child) else {
            return;
        };
        let _scope = Scope::new(task, cause, None);
        self.observer.event(&TaskEvent::Fork {
            task,
            child: child.task,
            mm: &space.mm,
            child_mm: child.mm(),
        });
    }

    /// Serves the report that a task made before it was known.
    fn replay(&mut self, tid: Pid) -> Result<(), Error> {
        match self.parked.remove(&tid).map(|parked| parked.report) {
            Some(Report::Stopped(stop)) => self.stopped(tid, stop),
            Some(Report::Ended(status)) => self.ended(tid, status),
            None => Ok(()),
        }
    }

    /// Handles a task that has run `execve`. The other threads have ended, and the task now has the
    /// identifier of the process.
    pub(super) fn execed(&mut self, pid: Pid) -> Result<(), Error> {
        let message =
            sys::event_message(pid, Stop::Exec).map_err(kernel("PTRACE_GETEVENTMSG", pid))?;
        let Some(former) = message.map(|tid| tid as Pid) else {
            return Ok(());
        };
        if former != pid && self.tasks.contains_key(&former) {
            // The kernel does not report the end of the old leader, because this task has replaced
            // it.
            let status = self
                .tasks
                .get(&pid)
                .and_then(|leader| leader.exit)
                .unwrap_or(ExitStatus::Code(0));
            self.forget(pid, "execve", status);
            // The `execve` killed threads that may have been making children.
            self.lost_a_maker = true;
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
        tracee.in_unseen_call = false;
        tracee.reported = self.clock;
        let old = mem::replace(&mut tracee.life, Life::Fresh(Rc::clone(&space)));
        self.tasks.insert(pid, tracee);
        let scope = Scope::new(task, "execve", None);
        self.observer.event(&TaskEvent::MmNew {
            task,
            mm: &space.mm,
            parent: None,
        });
        if let Life::Left(old_mm) = &old {
            self.observer.event(&TaskEvent::Exec {
                task,
                mm: &space.mm,
                old_mm,
            });
        }
        drop(scope);
        self.appear(pid);
        self.resume(pid, 0)
    }
}

/// Tells whether the next report of `tracee` can be the event that names `child`.
fn can_name<H>(tracee: &Tracee<H>, child: Pid, parked: &Parked) -> bool {
    let is_making = tracee.space().is_some() && tracee.reported < parked.since;
    let pid = tracee.task.pid;
    match parked.family {
        _ if !is_making => false,
        Family {
            process: Some(process),
            ..
        } if process == pid => true,
        Family {
            parent: Some(parent),
            ..
        } if parent != pid => false,
        _ => tracee.may_be_forking() || sys::same_memory(child, tracee.task.tid) != Some(false),
    }
}
