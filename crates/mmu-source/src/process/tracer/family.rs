//! How tasks come to be and become others: fork, clone, vfork and execve.

use std::mem;
use std::rc::Rc;

use super::super::decode::Then;
use super::super::proc;
use super::super::space::{Break, Space};
use super::super::sys::{self, NewTask, Resume, Stop};
use super::super::task::{Life, OpenCall, Tracee};
use super::{Error, ExitStatus, Observer, Pid, Scope, Task, TaskEvent, Tracer, kernel, resume};

/// What was reported of a task before its parent named it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Report {
    Stopped(Stop),
    Ended(ExitStatus),
}

/// A task that no other one has named yet. The kernel reports the stop of a child and the event of
/// its parent in either order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parked {
    report: Report,
    family: Family,
    /// When it reported first, on the tracer's clock.
    since: u64,
    /// The tasks that could name it were interrupted, so that each reports once more.
    asked: bool,
}

/// What is known of where a task comes from.
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
    /// Remembers what an unknown task reported. It stays stopped until its parent's event names it,
    /// or no task can any more.
    pub(super) fn park(&mut self, tid: Pid, report: Report) -> Result<(), Error> {
        let before = self.parked.get(&tid).copied();
        let family = before.map_or_else(|| self.family(tid), |parked| parked.family);
        match report {
            // Made with `CLONE_PTRACE`: no event will name it, and no task is to be followed.
            Report::Stopped(stop) if !self.options.follow => {
                let signal = if let Stop::Signal(signal) = stop {
                    signal
                } else {
                    0
                };
                return resume(tid, Resume::Detach, signal);
            }
            // A thread that ends before it was named was killed, and never ran: a kill is for the
            // whole process, and took with it the event that would have named the thread. It must
            // not wait for the end of its process, which waits for its own.
            Report::Stopped(Stop::Exit) if self.is_thread_of_ours(tid, family) => {
                self.parked.remove(&tid);
                return resume(tid, Resume::Cont, 0);
            }
            // Not a tracee, or one that never ran.
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

    /// Asks `/proc`, or if that does not say, the kernel about the processes that are known.
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

    /// Takes in the parked tasks that no other task is going to name.
    ///
    /// The next report of a task that has just made another one is the event that names the child,
    /// unless it was killed. So a task that has reported anything since the child did will not name
    /// it. Where a killed task may have left the child, the tasks that have not reported are looked
    /// at: one that sleeps is not making a task, any other one is made to report.
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

    /// Tells whether a task is known to sleep in the kernel. That counts as a report.
    fn is_asleep(&mut self, tid: Pid) -> bool {
        let is_asleep = matches!(proc::state(tid), Some(b'S' | b'D'));
        if let Some(tracee) = self.tasks.get_mut(&tid).filter(|_| is_asleep) {
            tracee.reported = self.clock;
        }
        is_asleep
    }

    /// Takes in a task whose parent's event never came, by what the kernel tells about it.
    fn adopt(&mut self, tid: Pid, family: Family) -> Result<(), Error> {
        let pid = family.process.unwrap_or(tid);
        let of_process = self
            .tasks
            .values()
            .find(|tracee| tracee.task.pid == pid && tracee.space().is_some());
        let known = of_process.and_then(|tracee| tracee.space().cloned());
        let space = known.or_else(|| self.space_shared_with(tid).ok());
        // Its parent is not in the table any more, and the table may be empty.
        let filtered = self.filters && self.tasks.values().all(|tracee| tracee.filtered);
        let is_new = space.is_none();
        let space = space.unwrap_or_else(|| self.space_of_its_own(tid));
        self.welcome(Task { pid, tid }, space, filtered, is_new, None, "fork");
        self.replay(tid)
    }

    /// The address space of a traced task that shares its memory with `tid`.
    ///
    /// # Errors
    /// If no address space is known to be that of `tid`: the address spaces for which the kernel
    /// does not say whether they are.
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

    /// A new address space for `tid`, which is not known to share that of another task, nor perhaps
    /// not to.
    fn space_of_its_own(&mut self, tid: Pid) -> Rc<Space> {
        let unknown = self.space_shared_with(tid).err().unwrap_or_default();
        self.in_doubt |= !unknown.is_empty();
        Rc::new(Space::doubtful(&unknown))
    }

    /// A task has made another one.
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
        // Every call that copies an address space stops at its entry, so that one is open; but the
        // entry of a call in which the task was attached to has not been seen.
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

    /// A task has made a child whose memory is a copy: the copying is over, so its brackets close,
    /// and the call needs no stop at its exit if its result is known.
    fn copy_ends(&mut self, parent: Pid, child: Pid) {
        let Some(tracee) = self.tasks.get_mut(&parent) else {
            return;
        };
        if !tracee.may_be_forking() || tracee.call.is_none() {
            return;
        }
        // Only where tasks have other numbers for the parent than for the tracer is the result not
        // the child's number.
        if tracee.numbers_agree.is_none() {
            tracee.numbers_agree = proc::shares_pid_namespace(parent);
        }
        if tracee.numbers_agree == Some(true) {
            if let Some(call) = tracee.call.take() {
                self.finish(parent, call, Some(child.into()));
            }
        }
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
        self.tasks
            .insert(task.tid, Tracee::fresh(task, Rc::clone(&space), filtered));
        if is_new {
            let _scope = Scope::new(task, cause, None);
            self.observer.event(&TaskEvent::MmNew {
                task,
                mm: &space.mm,
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

    /// Serves what a task reported before it was known.
    fn replay(&mut self, tid: Pid) -> Result<(), Error> {
        match self.parked.remove(&tid).map(|parked| parked.report) {
            Some(Report::Stopped(stop)) => self.stopped(tid, stop),
            Some(Report::Ended(status)) => self.ended(tid, status),
            None => Ok(()),
        }
    }

    /// A task has run `execve`. Its other threads are gone, and it has the identifier of the
    /// process now.
    pub(super) fn execed(&mut self, pid: Pid) -> Result<(), Error> {
        let message =
            sys::event_message(pid, Stop::Exec).map_err(kernel("PTRACE_GETEVENTMSG", pid))?;
        let Some(former) = message.map(|tid| tid as Pid) else {
            return Ok(());
        };
        if former != pid && self.tasks.contains_key(&former) {
            // The old leader's end is not reported: this task has taken its place.
            let status = self
                .tasks
                .get(&pid)
                .and_then(|leader| leader.exit)
                .unwrap_or(ExitStatus::Code(0));
            self.forget(pid, "execve", status);
            // Threads that were killed for it may have been making tasks.
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
