//! Attaching to a process that is already running.

use std::io;
use std::rc::Rc;

use super::super::proc;
use super::super::space::{Break, Space};
use super::super::sys;
use super::reaper::Reaper;
use super::start::ptrace_options;
use super::{Error, ExitStatus, Observer, Pid, Task, Tracer};

/// How often the tracer tries to seize a task that is alive and cannot be seized. Each try waits
/// for an `execve` in progress, so only a program that runs `execve` again and again uses up all
/// tries.
const TRIES: u32 = 200;

impl<O: Observer> Tracer<O> {
    /// Traces a running process, with all its threads. Each of them stops at every system call.
    ///
    /// The observer learns of the threads at once. The tracer handles each thread's first stop in
    /// [`Tracer::run`], and sees only the calls that the thread begins after that stop.
    ///
    /// # Blocking
    /// Sleeps while the process is in `execve`.
    /// # Errors
    /// [`Error::Attach`], whose source is:
    /// * `ESRCH` if no such process exists;
    /// * `EPERM` if tracing the process is refused or it already has a tracer;
    /// * an error without an errno, of the kind [`io::ErrorKind::InvalidInput`], if `pid` is a
    ///   thread of another process; the message names that process;
    /// * [`io::ErrorKind::Deadlock`] if the process traces this one, directly or through other
    ///   tracers, because each would stop and wait for the other;
    /// * another error if `/proc` does not list the threads, or if a helper thread cannot be
    ///   started.
    pub fn attach(&mut self, pid: Pid) -> Result<(), Error> {
        let refused = |source| Error::Attach { pid, source };
        if !sys::is_thread_of(pid, pid) {
            return Err(refused(match proc::thread_group(pid) {
                Some(group) if group != pid => {
                    let what = format!("{pid} is a thread of process {group}");
                    io::Error::new(io::ErrorKind::InvalidInput, what)
                }
                _ => io::Error::from_raw_os_error(libc::ESRCH),
            }));
        }
        if proc::traces(pid, std::process::id() as Pid) {
            let what = format!("process {pid} traces this one: each would wait for the other");
            return Err(refused(io::Error::new(io::ErrorKind::Deadlock, what)));
        }
        let mut reaper = None;
        let seized = self.seize_all(pid, &mut reaper);
        let ended = reaper.map_or(Vec::new(), Reaper::finish);
        self.forget_all(ended);
        seized.map_err(refused)?;
        if !self.tasks.values().any(|tracee| tracee.task.pid == pid) {
            return Err(refused(io::Error::from_raw_os_error(libc::ESRCH)));
        }
        Ok(())
    }

    /// Seizes all threads of a process. A thread that is not traced yet can make another thread or
    /// run `execve` at any time, so this function repeats until it finds no thread that is not
    /// traced.
    fn seize_all(&mut self, pid: Pid, reaper: &mut Option<Reaper>) -> io::Result<()> {
        let mut tries = 0;
        loop {
            let mut refusal = None;
            let mut is_new = false;
            for tid in proc::threads(pid).map_err(|error| self.unlisted(pid, error))? {
                let ended = reaper.as_ref().map_or(Vec::new(), Reaper::ended);
                self.forget_all(ended);
                if self.is_traced(pid, tid) {
                    continue;
                }
                match sys::seize(
                    tid,
                    ptrace_options(self.options, false) & !libc::PTRACE_O_TRACEEXIT,
                ) {
                    Ok(()) => {
                        is_new = true;
                        self.seized(pid, tid);
                        let reaper = match reaper {
                            Some(reaper) => reaper,
                            None => reaper.insert(Reaper::start()?),
                        };
                        if tid != pid {
                            reaper.watch(tid);
                        }
                    }
                    // A traced thread made this one, so the event of its maker will name it.
                    Err(_) if is_ours(tid) => {}
                    // The thread has ended. Or it is a leader that has ended before its threads:
                    // such a leader cannot be traced and makes no calls.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    Err(_) if proc::has_ended(tid) == Some(true) => {}
                    Err(error) => {
                        refusal =
                            Some((error, proc::tracer_of(tid).is_some_and(|tracer| tracer > 0)))
                    }
                }
            }
            match refusal {
                // Seizing a task that an `execve` has just replaced is also refused.
                Some((_, false)) if tries < TRIES => {}
                Some((error, _)) => return Err(error),
                None if !is_new => return Ok(()),
                None => {}
            }
            tries += 1;
        }
    }

    /// Removes threads from the table that have ended while the tracer waited for another one.
    fn forget_all(&mut self, ended: Vec<(Pid, ExitStatus)>) {
        for (tid, status) in ended {
            self.forget(tid, "exit", status);
        }
    }

    /// Tells whether a thread is in the table and is still the same task.
    fn is_traced(&mut self, pid: Pid, tid: Pid) -> bool {
        if !self.tasks.contains_key(&tid) {
            return false;
        }
        // If a leader has lost its tracer, the `execve` of another thread has replaced it. The
        // kernel does not report the leader's end.
        let is_replaced = tid == pid && !is_ours(tid);
        if is_replaced {
            self.forget(tid, "execve", ExitStatus::Code(0));
        }
        !is_replaced
    }

    /// Handles a thread that is traced from now on.
    fn seized(&mut self, pid: Pid, tid: Pid) {
        // While the tracer waited for this thread, the thread ran `execve` and took over the
        // identifier of its process.
        let is_replaced = tid != pid && !is_ours(tid);
        let tid = if is_replaced { pid } else { tid };
        if is_replaced && self.tasks.contains_key(&pid) {
            self.forget(pid, "execve", ExitStatus::Code(0));
        }
        // A thread is in the address space of its leader. If the leader has ended, no `execve` has
        // replaced its threads.
        let of_leader = self
            .tasks
            .get(&pid)
            .and_then(|leader| leader.space().cloned());
        let space = of_leader.or_else(|| self.space_shared_with(tid).ok());
        let space = space.unwrap_or_else(|| Rc::new(Space::new(Break::default())));
        self.begin(Task { pid, tid }, space, false, "attach");
        if let Some(tracee) = self.tasks.get_mut(&tid) {
            tracee.in_unseen_call = true;
        }
        self.appear(tid);
        // This cannot fail: even a tracee that has ended remains until its tracer reaps it.
        let _ = sys::interrupt(tid);
    }

    /// Explains why the list of threads cannot be read.
    fn unlisted(&self, pid: Pid, error: io::Error) -> io::Error {
        if !sys::is_thread_of(pid, pid) {
            return io::Error::from_raw_os_error(libc::ESRCH);
        }
        io::Error::new(
            error.kind(),
            format!("its threads are not listed in /proc/{pid}/task ({error})"),
        )
    }
}

/// Tells whether this thread traces a task. If so, the task will stop.
fn is_ours(tid: Pid) -> bool {
    matches!(sys::interrupt(tid), Ok(Some(())))
}
