//! How tracing ends before the tracees do.

use std::collections::HashMap;
use std::io;
use std::marker::PhantomData;
use std::thread;
use std::time::{Duration, Instant};

use super::super::proc;
use super::super::sys::{self, Resume, Stop, Wait};
use super::{Life, Observer, Pid, Scope, TaskEvent, Tracer};

/// How long a tracee that was asked to stop may take, if it does not sleep where nothing can stop
/// it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a tracee may take that does.
const DISK: Duration = Duration::from_millis(50);

impl<O: Observer> Tracer<O> {
    /// Lets go of every task: closes every bracket, lets every task leave, and detaches the tracees
    /// that have no filter.
    ///
    /// The others are the [`Keeper`]'s: a task with a filter and without a tracer has its memory
    /// calls refused (`ENOSYS`). So is a task that cannot be stopped at once: a parent that waits
    /// in `vfork` for its child, or a task that the freezer of cgroup v1 holds (that of v2 lets it
    /// stop). If its tracer's thread ends, the kernel lets go of it. Pending signals and job
    /// control stops stay as they are.
    ///
    /// # Blocking
    /// Sleeps until each tracee without a filter has stopped that can, two seconds at most.
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
        // These are stopped.
        for tid in self.held.iter().chain(&parked) {
            keeper.pass(*tid, Stop::Trap);
        }
        // One that has died is not waited for: the end of a first thread is reported only after
        // that of all the others.
        keeper.tasks.retain(|tid, kept| {
            kept.filtered || kept.in_vfork || matches!(sys::interrupt(*tid), Ok(Some(())))
        });
        keeper.let_go(sys::poll);
        (self.observer, keeper)
    }
}

/// Keeps the tracees alive that cannot be let go of.
///
/// It belongs to the thread of its tracer.
#[derive(Debug)]
#[must_use = "tracees that are not served stop at their next memory call"]
pub struct Keeper {
    tasks: HashMap<Pid, Kept>,
    /// A task that is not known yet may have a filter from its parent.
    some_filtered: bool,
    _thread: PhantomData<*const ()>,
}

#[derive(Debug, Clone, Copy)]
struct Kept {
    filtered: bool,
    in_vfork: bool,
}

impl Keeper {
    /// Detaches the tracees without a filter, which were asked to stop, as they stop. Those that
    /// cannot are left.
    fn let_go(&mut self, mut poll: impl FnMut() -> io::Result<Wait>) {
        let begun = Instant::now();
        let mut nap = Duration::from_micros(50);
        // Asked at each turn: the tasks with a filter may report without a pause.
        while begun.elapsed() < PATIENCE
            && self
                .tasks
                .values()
                .any(|kept| !kept.filtered && !kept.in_vfork)
        {
            match poll() {
                // No wait with a limit exists for tracees.
                Ok(Wait::Interrupted) if self.may_stop_soon(begun.elapsed()) => {
                    thread::sleep(nap);
                    nap = (nap * 2).min(Duration::from_millis(5));
                }
                Ok(event @ (Wait::Stopped(..) | Wait::Ended(..))) => self.serve_one(event),
                Ok(Wait::Interrupted | Wait::NoTracee) | Err(_) => return,
            }
        }
    }

    /// Tells whether one of the tracees without a filter may yet stop, after this time.
    fn may_stop_soon(&self, waited: Duration) -> bool {
        let sleeps_deep = |tid| proc::state(tid) == Some(b'D');
        let mut rest = self
            .tasks
            .iter()
            .filter(|(_, kept)| !kept.filtered && !kept.in_vfork);
        // Waiting for a disk looks the same, and is over in less.
        waited < DISK || rest.any(|(tid, _)| !sleeps_deep(*tid))
    }

    /// Tells whether there is a task to serve.
    pub fn is_needed(&self) -> bool {
        !self.tasks.is_empty()
    }

    /// Lets every stop pass, of the tracees and of their children, and records nothing. Returns
    /// when the last of them has ended; at once if there was none.
    ///
    /// # Blocking
    /// Sleeps as long as they live.
    pub fn serve(mut self) {
        if !self.is_needed() {
            return;
        }
        while self.step() {}
    }

    /// As [`Keeper::serve`], but comes back once `is_done`: for what is to be done in other threads
    /// meanwhile. It is asked before each event, and whenever a signal handler interrupts the wait,
    /// so a timer has to ring.
    ///
    /// # Blocking
    /// Sleeps until an event or a signal, as long as there are tracees; also if it is done while a
    /// child of one is still to be found.
    pub fn serve_until(&mut self, mut is_done: impl FnMut() -> bool) {
        if !self.is_needed() {
            return;
        }
        while (self.tasks.is_empty() || !is_done()) && self.step() {}
    }

    /// Serves one event, and says whether there can be another one.
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

    /// Lets a task go on from a stop: for good if it has no filter.
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
        // Its child is traced as well, and stops before it runs. One that has stopped already was
        // let go of.
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
        // A task that has died meanwhile reports its end next.
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
