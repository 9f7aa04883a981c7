//! Spawning a program under the tracer.

use std::os::fd::AsRawFd;
use std::ptr;
use std::rc::Rc;
use std::{io, iter};

use super::super::command::Layout;
use super::super::space::{Break, Space};
use super::super::sys::{self, Child, Resume, Step, Stop, Wait};
use super::super::task::Tracee;
use super::super::{Command, filter};
use super::{Error, Observer, Options, Pid, Scope, Task, TaskEvent, Tracer, resume};

impl<O: Observer> Tracer<O> {
    /// Starts a program under the tracer and returns its process.
    ///
    /// The new process is stopped before the first instruction of its program, until
    /// [`Tracer::run`] resumes it.
    ///
    /// # Blocking
    /// Sleeps until the kernel has loaded the program.
    /// # Errors
    /// [`Error::Exec`] if the program cannot be executed. [`Error::Spawn`] if the process cannot be
    /// made or traced, or ends before its program runs. [`Error::Kernel`] if the process cannot be
    /// resumed meanwhile.
    pub fn spawn(&mut self, command: Command) -> Result<Pid, Error> {
        let layout = command
            .layout()
            .map_err(|source| exec_error(&command, source))?;
        let program = (self.options.follow && self.options.seccomp)
            .then(|| filter::program(self.options.traced()));
        let (go_read, go_write) = sys::pipe(0).map_err(spawn_error("pipe2"))?;
        let (report_read, report_write) =
            sys::pipe(libc::O_NONBLOCK).map_err(spawn_error("pipe2"))?;
        // Copy the descriptors to descriptors above 2, so that setting up one standard stream does
        // not overwrite the source of the next.
        let mut copies = Vec::new();
        let mut stdio = [None; 3];
        for (slot, fd) in stdio.iter_mut().zip(&command.stdio) {
            if let Some(fd) = fd {
                let copy = sys::above_stdio(fd.as_raw_fd()).map_err(spawn_error("fcntl"))?;
                *slot = Some(copy.as_raw_fd());
                copies.push(copy);
            }
        }
        let go_in_child = sys::above_stdio(go_read.as_raw_fd()).map_err(spawn_error("fcntl"))?;
        let report_in_child =
            sys::above_stdio(report_write.as_raw_fd()).map_err(spawn_error("fcntl"))?;
        let child = Child {
            go: (go_in_child.as_raw_fd(), go_write.as_raw_fd()),
            report: report_in_child.as_raw_fd(),
            stdio,
            ignores_sigpipe: command.ignores_sigpipe,
            dir: layout.dir.as_ref(),
            filter: program.as_deref(),
            candidates: &layout.candidates,
            argv: pointers(&layout, |layout| &layout.argv),
            envp: pointers(&layout, |layout| &layout.envp),
        };
        let pid = sys::fork(&child).map_err(spawn_error("fork"))?;
        drop(report_in_child);
        drop(report_write);
        if let Err(source) = sys::seize(pid, ptrace_options(self.options, program.is_some())) {
            // The child reads the end of the pipe and exits.
            drop(go_write);
            while !matches!(
                sys::wait_for(pid),
                Ok(Wait::Ended(..) | Wait::NoTracee) | Err(_)
            ) {}
            return Err(Error::Spawn {
                call: "PTRACE_SEIZE",
                source,
            });
        }
        sys::say_go(&go_write);
        let execed = until_exec(pid)?;
        let mut filtered = program.is_some();
        while let Some((step, source)) = sys::read_report(&report_read) {
            match step {
                step if step == Step::Filter as u8 => filtered = false,
                step if step == Step::Stdio as u8 => {
                    return Err(Error::Spawn {
                        call: "dup2",
                        source,
                    });
                }
                step if step == Step::Dir as u8 => {
                    return Err(Error::Spawn {
                        call: "chdir",
                        source,
                    });
                }
                _ => return Err(exec_error(&command, source)),
            }
        }
        if !execed {
            let source = io::Error::from(io::ErrorKind::Interrupted);
            return Err(Error::Spawn {
                call: "execve",
                source,
            });
        }
        let task = Task { pid, tid: pid };
        self.root = Some((pid, None));
        self.filters = filtered;
        self.begin(
            task,
            Rc::new(Space::new(Break::of_new_program())),
            filtered,
            "execve",
        );
        self.appear(pid);
        self.held.push(pid);
        Ok(pid)
    }

    /// Adds a task to the table that has no parent there.
    pub(super) fn begin(
        &mut self,
        task: Task,
        space: Rc<Space>,
        filtered: bool,
        cause: &'static str,
    ) {
        let is_new = !self.tasks.values().any(|tracee| tracee.mm() == &*space.mm);
        self.tasks
            .insert(task.tid, Tracee::fresh(task, Rc::clone(&space), filtered));
        if is_new {
            let _scope = Scope::new(task, cause, None);
            self.observer.event(&TaskEvent::MmNew {
                task,
                mm: &space.mm,
                parent: None,
            });
        }
    }
}

/// Serves a new process until its program is loaded. Returns false if the process ended before
/// that.
fn until_exec(pid: Pid) -> Result<bool, Error> {
    loop {
        match sys::wait_for(pid).map_err(spawn_error("waitpid"))? {
            Wait::Stopped(_, Stop::Exec) => return Ok(true),
            Wait::Stopped(_, Stop::Signal(signal)) => resume(pid, Resume::Cont, signal)?,
            Wait::Stopped(_, Stop::Group) => resume(pid, Resume::Listen, 0)?,
            Wait::Stopped(..) => resume(pid, Resume::Cont, 0)?,
            Wait::Ended(..) | Wait::NoTracee => return Ok(false),
            Wait::Interrupted => {}
        }
    }
}

pub(super) fn ptrace_options(options: Options, filter: bool) -> i32 {
    let mut bits =
        libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACEEXEC | libc::PTRACE_O_TRACEEXIT;
    if options.follow {
        bits |= libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK | libc::PTRACE_O_TRACECLONE;
    }
    if filter {
        bits |= libc::PTRACE_O_TRACESECCOMP;
    }
    bits
}

/// Returns null-terminated pointers to strings of `layout`. The layout must outlive them.
fn pointers(
    layout: &Layout,
    strings: fn(&Layout) -> &Vec<std::ffi::CString>,
) -> Vec<*const libc::c_char> {
    strings(layout)
        .iter()
        .map(|string| string.as_ptr())
        .chain(iter::once(ptr::null()))
        .collect()
}

fn exec_error(command: &Command, source: io::Error) -> Error {
    Error::Exec {
        program: command.program().to_owned(),
        source,
    }
}

fn spawn_error(call: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Spawn { call, source }
}
