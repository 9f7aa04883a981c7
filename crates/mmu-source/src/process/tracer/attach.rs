//! How tracing begins with a process that runs already.

use std::io;
use std::rc::Rc;

use super::super::proc;
use super::super::space::{Break, Space};
use super::super::sys;
use super::reaper::Reaper;
use super::start::ptrace_options;
use super::{Error, ExitStatus, Observer, Pid, Task, Tracer};

/// How often a task that cannot be seized and lives is looked at again. Each time waits for an
/// `execve` that is under way, so that many of them must follow one another without a pause.
const TRIES: u32 = 200;

impl<O: Observer> Tracer<O> {
    /// Traces a process that runs already, with all its threads. Every system call of it stops.
    ///
    /// The observer is told of its threads at once. Each of them is seen from its first stop on,
    /// which [`Tracer::run`] serves: a call that it is in until then is not seen.
    ///
    /// # Blocking
    /// Sleeps while the process is in `execve`.
    /// # Errors
    /// [`Error::Attach`]: `ESRCH` if there is no such process, `EPERM` if tracing it is refused or
    /// it is traced already; of the kind [`io::ErrorKind::InvalidInput`], without a number, if it
    /// is a thread of another process, which the message names; [`io::ErrorKind::Deadlock`] if it
    /// traces this process, itself or through tracers in between: each would stop and wait for the
    /// other. Another error if `/proc` does not list its threads.
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

    /// A thread that is not traced yet can make another one, or execute another program, at any
    /// time: looks until all that are there are traced.
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
                    // Made by a thread that is traced by now: its maker's event names it.
                    Err(_) if is_ours(tid) => {}
                    // Gone, or a leader that has ended while its threads go on, which cannot be
                    // traced and need not be.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    Err(_) if proc::has_ended(tid) == Some(true) => {}
                    Err(error) => {
                        refusal =
                            Some((error, proc::tracer_of(tid).is_some_and(|tracer| tracer > 0)))
                    }
                }
            }
            match refusal {
                // Seizing a task that an `execve` has just replaced is refused as well.
                Some((_, false)) if tries < TRIES => {}
                Some((error, _)) => return Err(error),
                None if !is_new => return Ok(()),
                None => {}
            }
            tries += 1;
        }
    }

    /// Takes threads out of the table that have ended while another one was waited for.
    fn forget_all(&mut self, ended: Vec<(Pid, ExitStatus)>) {
        for (tid, status) in ended {
            self.forget(tid, "exit", status);
        }
    }

    /// Tells whether a thread is in the table and still the task that it was when it came there.
    fn is_traced(&mut self, pid: Pid, tid: Pid) -> bool {
        if !self.tasks.contains_key(&tid) {
            return false;
        }
        // A leader that loses its tracer was replaced by another thread's `execve`. Its end is not
        // reported.
        let is_replaced = tid == pid && !is_ours(tid);
        if is_replaced {
            self.forget(tid, "execve", ExitStatus::Code(0));
        }
        !is_replaced
    }

    /// A thread is traced from now on.
    fn seized(&mut self, pid: Pid, tid: Pid) {
        // While it was waited for, it executed another program, and has the number of its process
        // now.
        let is_replaced = tid != pid && !is_ours(tid);
        let tid = if is_replaced { pid } else { tid };
        if is_replaced && self.tasks.contains_key(&pid) {
            self.forget(pid, "execve", ExitStatus::Code(0));
        }
        // A thread is in its leader's address space. If the leader has ended, none of its threads
        // is another program's.
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
        // It is there: a tracee that has ended waits for its tracer.
        let _ = sys::interrupt(tid);
    }

    /// What is wrong with a list of threads that cannot be read.
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

/// Tells whether this thread traces a task. It makes the task stop if so.
fn is_ours(tid: Pid) -> bool {
    matches!(sys::interrupt(tid), Ok(Some(())))
}
