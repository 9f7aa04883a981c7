//! The tracer: its table of tasks, its event loop, and the calls of its tracees.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{io, mem};

use mmu_notifier::VaRange;

use super::copied::LastMaps;
use super::current::Scope;
use super::filter::Traced;
use super::space::Space;
use super::sys::{self, Resume, Stop, SyscallInfo, Wait};
use super::task::{Life, Tracee};
use super::{Error, ExitStatus, Observer, Pid, Task, TaskEvent, filter};

mod attach;
mod calls;
mod detach;
mod family;
mod reaper;
mod start;

pub use detach::Keeper;

/// How to trace.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Options {
    /// Also traces the children and threads that tracees make. Without `follow` the tracer uses no
    /// filter, because children would inherit the filter. If a thread that is not traced runs
    /// `execve`, it replaces the whole process, and the trace of that process ends.
    pub follow: bool,
    /// Gives spawned processes a filter, so that they stop only at memory calls. Without the filter
    /// they stop at every system call. Needs `follow`.
    pub seccomp: bool,
    /// Also stops at calls that only make a mapping, and reports the mapping as
    /// [`TaskEvent::Mapped`].
    pub births: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            follow: true,
            seccomp: true,
            births: false,
        }
    }
}

impl Options {
    fn traced(self) -> Traced {
        if self.births {
            Traced::ChangesAndBirths
        } else {
            Traced::Changes
        }
    }
}

/// Why [`Tracer::run`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Done {
    /// No tracee is left.
    AllExited,
    /// `stop` was true. A tracee stops at its next event and stays stopped until the tracer runs
    /// again or detaches.
    Stopped,
}

/// Traces processes, and notifies the subscribers of their address spaces before and after each
/// change.
///
/// A tracer cannot leave the thread that made it:
///
/// ```compile_fail,E0277
/// fn send<T: Send>() {}
/// struct Silent;
/// # impl mmu_source::process::Observer for Silent {
/// #     type Held = ();
/// #     fn enter(&mut self, _: mmu_source::process::Task, _: &mmu_notifier::MmWithUser) {}
/// #     fn leave(&mut self, _: mmu_source::process::Task, (): ()) {}
/// # }
/// send::<mmu_source::process::Tracer<Silent>>();
/// ```
#[doc(alias = "ptrace")]
pub struct Tracer<O: Observer> {
    observer: O,
    options: Options,
    tasks: HashMap<Pid, Tracee<O::Held>>,
    /// The first reports of tasks that no parent's event has named yet.
    parked: HashMap<Pid, family::Parked>,
    /// A clock that counts the reports of all tasks.
    clock: u64,
    /// Whether a task has ended that may have made a child which no event has named.
    lost_a_maker: bool,
    /// Whether an address space exists that may be identical to another one.
    in_doubt: bool,
    /// Tasks that were stopped outside of `run`. `run` resumes them.
    held: Vec<Pid>,
    /// The process spawned last, and how it ended.
    root: Option<(Pid, Option<ExitStatus>)>,
    /// Whether the process spawned last, and so each of its descendants, has the filter.
    filters: bool,
    last_maps: LastMaps,
    /// Reused storage for the ranges of one call.
    ranges: Vec<VaRange>,
    /// Makes the tracer `!Send`: the kernel ties ptrace to one thread.
    _thread: PhantomData<*const ()>,
}

impl<O: Observer> Tracer<O> {
    /// Makes a tracer without tracees.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on a machine other than x86-64 and aarch64.
    pub fn new(options: Options, observer: O) -> Result<Self, Error> {
        if !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            return Err(Error::Unsupported {
                what: "the process source on this processor",
            });
        }
        Ok(Tracer {
            observer,
            options,
            tasks: HashMap::new(),
            parked: HashMap::new(),
            clock: 0,
            lost_a_maker: false,
            in_doubt: false,
            held: Vec::new(),
            root: None,
            filters: false,
            last_maps: LastMaps::default(),
            ranges: Vec::new(),
            _thread: PhantomData,
        })
    }

    /// Returns the observer.
    pub fn observer(&self) -> &O {
        &self.observer
    }

    /// Returns the observer mutably.
    pub fn observer_mut(&mut self) -> &mut O {
        &mut self.observer
    }

    /// Returns how the process spawned last ended. Returns `None` while it runs, and if none was
    /// spawned.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.root?.1
    }

    /// Serves the tracees until none is left or `stop` is true.
    ///
    /// A signal handler can set `stop`, because the signal interrupts the wait. If the signal
    /// arrives just before the wait begins, `stop` takes effect only at the next event. If that is
    /// too late, a timer must repeat the signal.
    ///
    /// # Blocking
    /// Sleeps until a tracee stops. Runs the callbacks of subscribers and the methods of the
    /// observer.
    /// # Errors
    /// [`Error::Kernel`] if a system call of the tracer fails, except because a tracee has died.
    pub fn run(&mut self, stop: &AtomicBool) -> Result<Done, Error> {
        for tid in mem::take(&mut self.held) {
            self.resume(tid, 0)?;
        }
        loop {
            // ORDER: Relaxed: the flag publishes no data. A handler on this thread is ordered with
            // the load anyway.
            if stop.load(Ordering::Relaxed) {
                return Ok(Done::Stopped);
            }
            let known = !self.tasks.is_empty() || !self.parked.is_empty();
            let event = if known {
                sys::wait()
            } else {
                sys::wait_for_unknown()
            };
            self.clock += 1;
            match event.map_err(|source| Error::Kernel {
                call: "waitpid",
                tid: None,
                source,
            })? {
                Wait::Stopped(tid, stop) => self.stopped(tid, stop)?,
                Wait::Ended(tid, status) => self.ended(tid, status)?,
                Wait::Interrupted => continue,
                Wait::NoTracee => {
                    debug_assert!(
                        self.tasks.is_empty() || !self.options.follow,
                        "a tracee vanished: {:?}",
                        self.tasks
                    );
                    // A thread that is not traced has run `execve` and replaced its leader. The
                    // kernel does not report the end of that leader.
                    for tid in self.tasks.keys().copied().collect::<Vec<_>>() {
                        let status = self.tasks.get(&tid).and_then(|tracee| tracee.exit);
                        self.forget(tid, "execve", status.unwrap_or(ExitStatus::Code(0)));
                    }
                    return Ok(Done::AllExited);
                }
            }
            if !self.parked.is_empty() {
                self.adopt_unnamed()?;
            }
        }
    }

    /// Serves one stop of one task and resumes the task. A task that is not known yet is parked
    /// instead.
    fn stopped(&mut self, tid: Pid, stop: Stop) -> Result<(), Error> {
        if stop == Stop::Exec {
            return self.execed(tid);
        }
        let Some(tracee) = self.tasks.get_mut(&tid) else {
            return self.park(tid, family::Report::Stopped(stop));
        };
        tracee.reported = self.clock;
        if !mem::replace(&mut tracee.stops_at_exit, true) {
            let options = start::ptrace_options(self.options, false);
            sys::set_options(tid, options).map_err(kernel("PTRACE_SETOPTIONS", tid))?;
        }
        // The task has reported an event, so it does not wait in `vfork` any more.
        tracee.in_vfork = false;
        match stop {
            Stop::Seccomp | Stop::Syscall => {
                tracee.in_unseen_call = false;
                match sys::syscall_info(tid).map_err(kernel("PTRACE_GET_SYSCALL_INFO", tid))? {
                    // A filter of the program itself asks for a tracer that knows that filter.
                    // There is no such tracer, so the call fails as it would without a tracer.
                    Some(SyscallInfo::Entry {
                        datum: Some(datum), ..
                    }) if datum != filter::DATUM => {
                        sys::skip_call(tid).map_err(kernel("PTRACE_SETREGSET", tid))?;
                    }
                    Some(SyscallInfo::Entry { call, datum }) => {
                        self.call_begins(tid, call, datum.is_some())
                    }
                    Some(SyscallInfo::Exit { result, place }) => {
                        self.call_returns(tid, result, place)
                    }
                    Some(SyscallInfo::None) | None => {}
                }
            }
            Stop::NewTask(kind) => self.cloned(tid, kind)?,
            Stop::Exit => {
                self.keep_status(tid)?;
                self.depart(tid, "exit");
            }
            Stop::Group => return resume(tid, Resume::Listen, 0),
            Stop::Signal(signal) => return self.resume(tid, signal),
            Stop::Trap | Stop::Other | Stop::Exec => {}
        }
        self.resume(tid, 0)
    }

    fn resume(&self, tid: Pid, signal: i32) -> Result<(), Error> {
        match self.tasks.get(&tid) {
            Some(tracee) => resume(tid, tracee.resume(), signal),
            None => Ok(()),
        }
    }

    /// Lets a task enter its address space, if it is new or has just run `execve`.
    fn appear(&mut self, tid: Pid) {
        let Some(tracee) = self.tasks.get_mut(&tid) else {
            return;
        };
        let Life::Fresh(space) = &tracee.life else {
            return;
        };
        let space = Rc::clone(space);
        let _scope = Scope::new(tracee.task, "enter", None);
        space.tasks.set(space.tasks.get() + 1);
        let held = self.observer.enter(tracee.task, &space.mm);
        tracee.life = Life::In(space, held);
    }

    /// Handles a task that leaves its address space. If it was the last task there, the address
    /// space exits.
    fn depart(&mut self, tid: Pid, cause: &'static str) {
        self.calls_are_cut(tid);
        match self.tasks.get(&tid) {
            Some(Tracee {
                life: Life::In(space, _),
                ..
            }) if space.tasks.get() == 1 && space.from_elsewhere.get() > 0 => {
                let space = Rc::clone(space);
                self.close_from_elsewhere(&space);
            }
            _ => {}
        }
        let Some(tracee) = self.tasks.get_mut(&tid) else {
            return;
        };
        let task = tracee.task;
        let _scope = Scope::new(task, cause, None);
        let left = Life::Left(tracee.mm().clone());
        match mem::replace(&mut tracee.life, left) {
            Life::Left(_) => {}
            // Dropping the last share runs `release`.
            Life::Fresh(space) => drop(space),
            Life::In(space, held) => {
                self.observer.leave(task, held);
                space.tasks.set(space.tasks.get() - 1);
                drop(space);
            }
        }
    }

    /// Keeps the status of a task that is about to end, unless the task is alone in its address
    /// space. The kernel does not report the status again if another thread then runs `execve` and
    /// replaces the leader.
    fn keep_status(&mut self, tid: Pid) -> Result<(), Error> {
        let sees_all = self.options.follow && !self.in_doubt;
        let is_alone = |space: &Rc<Space>| sees_all && space.tasks.get() == 1;
        let Some(tracee) = self.tasks.get_mut(&tid) else {
            return Ok(());
        };
        if tracee.space().is_some_and(is_alone) {
            return Ok(());
        }
        let message =
            sys::event_message(tid, Stop::Exit).map_err(kernel("PTRACE_GETEVENTMSG", tid))?;
        tracee.exit = message.and_then(|status| sys::exit_status(status as i32));
        Ok(())
    }

    /// Handles the end of a task.
    fn ended(&mut self, tid: Pid, status: ExitStatus) -> Result<(), Error> {
        let Some(tracee) = self.tasks.get(&tid) else {
            return self.park(tid, family::Report::Ended(status));
        };
        // A task that ends by its own call is not in the middle of making a child. A signal, or
        // another thread of its process, may have ended it while it was making one.
        let pid = tracee.task.pid;
        let is_alone = !self
            .tasks
            .values()
            .any(|other| other.task.pid == pid && other.task.tid != tid);
        self.lost_a_maker |= pid != tid || !is_alone || matches!(status, ExitStatus::Signal(_));
        if let Some((_, end)) = self.root.as_mut().filter(|(root, _)| *root == tid) {
            *end = Some(status);
        }
        let pid = self.forget(tid, "exit", status);
        // The kernel reports the end of a leader after that of its threads. If a thread is still in
        // the table, it had replaced the leader by `execve` when it was killed.
        let rest: Vec<Pid> = self
            .tasks
            .values()
            .filter(|t| pid == Some(tid) && t.task.pid == tid)
            .map(|t| t.task.tid)
            .collect();
        for thread in rest {
            self.forget(thread, "exit", status);
        }
        Ok(())
    }

    /// Removes a task that has ended from the table, and returns its process.
    fn forget(&mut self, tid: Pid, cause: &'static str, status: ExitStatus) -> Option<Pid> {
        self.depart(tid, cause);
        let tracee = self.tasks.remove(&tid)?;
        let task = tracee.task;
        let _scope = Scope::new(task, cause, None);
        self.observer.event(&TaskEvent::Exit {
            task,
            mm: tracee.mm(),
            status,
        });
        Some(task.pid)
    }
}

impl<O: Observer + fmt::Debug> fmt::Debug for Tracer<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer")
            .field("observer", &self.observer)
            .field("tasks", &self.tasks)
            .finish_non_exhaustive()
    }
}

/// Resumes a task. If the task has died meanwhile, that is no error.
fn resume(tid: Pid, how: Resume, signal: i32) -> Result<(), Error> {
    sys::resume(tid, how, signal)
        .map(drop)
        .map_err(kernel("PTRACE_CONT", tid))
}

/// Adds the call and the task to an error.
fn kernel(call: &'static str, tid: Pid) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Kernel {
        call,
        tid: Some(tid),
        source,
    }
}
