//! Ending the tracing while the tracees live on.

use std::collections::HashMap;
use std::io;
use std::marker::PhantomData;
use std::thread;
use std::time::{Duration, Instant};

use super::super::proc;
use super::super::sys::{self, Resume, Stop, Wait};
use super::{Life, Observer, Pid, Scope, TaskEvent, Tracer};

/// How long the tracer waits for an interrupted tracee to stop, unless the tracee is in
/// uninterruptible sleep.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the tracer waits for a tracee in uninterruptible sleep.
const DISK: Duration = Duration::from_millis(50);

impl<O: Observer> Tracer<O> {
    /// Ends the tracing: closes every bracket, makes every task leave, and detaches from the
    /// tracees that have no filter.
    ///
    /// The [`Keeper`] takes over two kinds of tracees. A task with a filter needs a tracer, because
    /// without one the kernel makes its memory calls fail with `ENOSYS`. A task that cannot be
    /// stopped at once cannot be detached yet: a parent that waits in `vfork` for its child, or a
    /// task frozen by cgroup v1 (cgroup v2 lets a frozen task stop).
    ///
    /// If the thread of the tracer ends, the kernel detaches from every tracee. Pending signals and
    /// job-control stops are preserved.
    ///
    /// # Blocking
    /// Sleeps until each tracee without a filter has stopped, except those that cannot stop, and
    /// for at most two seconds.
    pub fn detach(mut self) -> (O, Keeper) {
        let mut tids: Vec<Pid> = self.tasks.keys().copied().collect();
        tids.sort_unstable();
        for tid in &tids {
            let lives = self
                .tasks
                .get(tid)
                .filter(|tracee| matches!(tracee.life, Life::In(..)));
            let lives = lives.map(|tracee| (tracee.task, tracee.mm().clone()));
            self.depart(*tid, "detach");
            if let Some((task, mm)) = lives {
                let _scope = Scope::new(task, "detach", None);
                self.observer.event(&TaskEvent::Detach { task, mm: &mm });
            }
        }
        let kept = |filtered, in_vfork| Kept { filtered, in_vfork };
        let mut tasks: HashMap<Pid, Kept> = self
            .tasks
            .iter()
            .map(|(tid, tracee)| (*tid, kept(tracee.filtered, tracee.in_vfork)))
            .collect();
        let some_filtered = tasks.values().any(|kept| kept.filtered);
        let parked: Vec<Pid> = self
            .parked
            .iter()
            .filter(|(_, parked)| parked.is_stopped())
            .map(|(tid, _)| *tid)
            .collect();
        tasks.extend(parked.iter().map(|tid| (*tid, kept(some_filtered, false))));
        let mut keeper = Keeper {
            tasks,
            some_filtered,
            _thread: PhantomData,
        };
        // These tasks are stopped.
        for tid in self.held.iter().chain(&parked) {
            keeper.pass(*tid, Stop::Trap);
        }
        // Do not wait for a task that has died: the kernel reports the end of a thread group leader
        // only after all its other threads have ended.
        keeper.tasks.retain(|tid, kept| {
            kept.filtered || kept.in_vfork || matches!(sys::interrupt(*tid), Ok(Some(())))
        });
        keeper.let_go(sys::poll);
        (self.observer, keeper)
    }
}

/// Serves the tracees that cannot be detached yet.
///
/// A keeper cannot leave the thread of its tracer.
#[derive(Debug)]
#[must_use = "tracees that are not served stop at their next memory call"]
pub struct Keeper {
    tasks: HashMap<Pid, Kept>,
    /// Whether a task that is not known yet may have inherited a filter from its parent.
    some_filtered: bool,
    _thread: PhantomData<*const ()>,
}

#[derive(Debug, Clone, Copy)]
struct Kept {
    filtered: bool,
    in_vfork: bool,
}

impl Keeper {
    /// Detaches from the interrupted tracees without a filter, as they stop. Leaves those that
    /// cannot stop.
    fn let_go(&mut self, mut poll: impl FnMut() -> io::Result<Wait>) {
        let begun = Instant::now();
        let mut nap = Duration::from_micros(50);
        // The time is checked at each turn, because tasks with a filter may report without a pause.
        while begun.elapsed() < PATIENCE
            && self
                .tasks
                .values()
                .any(|kept| !kept.filtered && !kept.in_vfork)
        {
            match poll() {
                // The kernel offers no wait for tracees with a timeout.
                Ok(Wait::Interrupted) if self.may_stop_soon(begun.elapsed()) => {
                    thread::sleep(nap);
                    nap = (nap * 2).min(Duration::from_millis(5));
                }
                Ok(event @ (Wait::Stopped(..) | Wait::Ended(..))) => self.serve_one(event),
                Ok(Wait::Interrupted | Wait::NoTracee) | Err(_) => return,
            }
        }
    }

    /// Tells whether a tracee without a filter may still stop after `waited`.
    fn may_stop_soon(&self, waited: Duration) -> bool {
        let sleeps_deep = |tid| proc::state(tid) == Some(b'D');
        let mut rest = self
            .tasks
            .iter()
            .filter(|(_, kept)| !kept.filtered && !kept.in_vfork);
        // A task that waits for a disk is in the same state, but leaves it within `DISK`.
        waited < DISK || rest.any(|(tid, _)| !sleeps_deep(*tid))
    }

    /// Tells whether there is a task to serve.
    pub fn is_needed(&self) -> bool {
        !self.tasks.is_empty()
    }

    /// Resumes the tracees and their children from every stop, without recording anything. Returns
    /// when the last of them has ended, or at once if there is none.
    ///
    /// # Blocking
    /// Sleeps as long as the tracees live.
    pub fn serve(mut self) {
        if !self.is_needed() {
            return;
        }
        while self.step() {}
    }

    /// Like [`Keeper::serve`], but also returns when `is_done` returns true, which lets the caller
    /// wait for work of other threads. The keeper calls `is_done` before each event, and whenever a
    /// signal handler interrupts the wait. So the caller needs a timer whose signal interrupts the
    /// wait.
    ///
    /// # Blocking
    /// Sleeps until an event or a signal, as long as tracees exist. If a child of a tracee has not
    /// reported yet, sleeps even if `is_done` would return true.
    pub fn serve_until(&mut self, mut is_done: impl FnMut() -> bool) {
        if !self.is_needed() {
            return;
        }
        while (self.tasks.is_empty() || !is_done()) && self.step() {}
    }

    /// Serves one event, and tells whether there can be another one.
    fn step(&mut self) -> bool {
        let event = if self.tasks.is_empty() {
            sys::wait_for_unknown()
        } else {
            sys::wait()
        };
        match event {
            Ok(Wait::NoTracee) | Err(_) => return false,
            Ok(event) => self.serve_one(event),
        }
        true
    }

    fn serve_one(&mut self, event: Wait) {
        match event {
            Wait::Stopped(tid, stop) => self.pass(tid, stop),
            Wait::Ended(tid, _) => drop(self.tasks.remove(&tid)),
            Wait::Interrupted | Wait::NoTracee => {}
        }
    }

    /// Resumes a task from a stop. If the task has no filter, detaches from it.
    fn pass(&mut self, tid: Pid, stop: Stop) {
        let unknown = Kept {
            filtered: self.some_filtered,
            in_vfork: false,
        };
        let kept = *self.tasks.entry(tid).or_insert(unknown);
        let signal = if let Stop::Signal(signal) = stop {
            signal
        } else {
            0
        };
        let how = match stop {
            _ if !kept.filtered => Resume::Detach,
            Stop::Group => Resume::Listen,
            _ => Resume::Cont,
        };
        // The child is traced too, and stops before it runs. If the child has already stopped, the
        // keeper has detached from it.
        if let (Resume::Detach, Stop::NewTask(_)) = (how, stop) {
            let child = sys::event_message(tid, stop)
                .ok()
                .flatten()
                .map(|child| child as Pid);
            if let Some(child) =
                child.filter(|child| matches!(sys::interrupt(*child), Ok(Some(()))))
            {
                self.tasks.entry(child).or_insert(Kept {
                    filtered: false,
                    in_vfork: false,
                });
            }
        }
        // If the task has died meanwhile, its end is the next report.
        let gone = !matches!(sys::resume(tid, how, signal), Ok(Some(())));
        if how == Resume::Detach && !gone {
            self.tasks.remove(&tid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letting_go_ends_although_other_tasks_report_without_a_pause() {
        let kept = Kept {
            filtered: false,
            in_vfork: false,
        };
        let mut keeper = Keeper {
            tasks: [(1, kept)].into(),
            some_filtered: false,
            _thread: PhantomData,
        };
        let begun = Instant::now();
        keeper.let_go(|| {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "no report makes it look at the time"
            );
            Ok(Wait::Ended(2, super::super::ExitStatus::Code(0)))
        });
        assert!(keeper.is_needed(), "the task that has not stopped is left");
    }
}
