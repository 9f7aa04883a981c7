//! The time that a task itself ran in a call.
//!
//! The kernel counts the time for every process (its CPU clock) and for every task
//! (the first field of `/proc/PID/task/TID/schedstat`). The tracer reads one of these counters
//! while the task is stopped before the call, and again while the task is stopped after the call.
//! If a process has one task, the tracer uses the process's clock, because reading the clock costs
//! a third of reading the file.
//!
//! Between the two reads the task also leaves one stop and enters the next. That overhead is
//! measured with calls that do nothing, and subtracted. It is a microsecond or two if the task and
//! the tracer run on the same processor. On different processors the task must also wake the
//! tracer's processor with an interrupt, which takes some thirty microseconds in a virtual machine.
//! The scheduler can move the task and the tracer at any time, so the processors are compared after
//! each call.

mod files;

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use mmu_source::process::{Pid, Task};

use self::files::Files;
use crate::sys;

#[derive(Debug)]
pub(crate) struct Runtime {
    /// The first field is the time, in nanoseconds.
    schedstat: Files,
    /// The 39th field is the processor that the task ran on last.
    stat: Files,
    /// How many tasks each process has; `None` if a process may have tasks that are not traced.
    tasks: Option<HashMap<Pid, u32>>,
    /// The counter before the task's current call.
    before: HashMap<Pid, Reading>,
    /// The time of the task's last call.
    own: HashMap<Pid, u64>,
    overhead: Overhead,
}

/// The time of a call that does nothing, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Overhead {
    /// While the task and the tracer run on the same processor.
    pub(crate) together: u64,
    /// While they run on different processors, if the difference is significant.
    pub(crate) apart: Option<u64>,
}

/// Nanoseconds of one of two counters. Values of different counters must not be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    Process(u64),
    Task(u64),
}

impl Default for Runtime {
    fn default() -> Runtime {
        Runtime::new(Overhead::default(), false)
    }
}

impl Runtime {
    /// `all`: every task of a traced process is traced.
    pub(crate) fn new(overhead: Overhead, all: bool) -> Runtime {
        Runtime {
            schedstat: Files::new("schedstat"),
            stat: Files::new("stat"),
            tasks: all.then(HashMap::new),
            before: HashMap::new(),
            own: HashMap::new(),
            overhead,
        }
    }

    /// A task appears.
    pub(crate) fn entered(&mut self, task: Task) {
        if let Some(tasks) = &mut self.tasks {
            *tasks.entry(task.pid).or_default() += 1;
        }
    }

    /// A task has ended, or is not traced any more.
    pub(crate) fn left(&mut self, task: Task) {
        self.forget(task.tid);
        let Some(tasks) = &mut self.tasks else { return };
        if let Entry::Occupied(mut count) = tasks.entry(task.pid) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }

    /// Called while the task is stopped before its call: reads its counter.
    pub(crate) fn begin(&mut self, task: Task) {
        let is_alone = self
            .tasks
            .as_ref()
            .is_some_and(|tasks| tasks.get(&task.pid) == Some(&1));
        let process = if is_alone {
            sys::process_time(task.pid).map(Reading::Process)
        } else {
            None
        };
        match process.or_else(|| self.read(task).map(Reading::Task)) {
            Some(reading) => drop(self.before.insert(task.tid, reading)),
            None => drop(self.before.remove(&task.tid)),
        }
    }

    /// Called while the task is stopped after its call: computes the time that the task ran in the
    /// call.
    pub(crate) fn end(&mut self, task: Task) {
        let passed = match self.before.remove(&task.tid) {
            // The process still has one task: only this task could have made a thread, and no call
            // that makes a thread changes memory.
            Some(Reading::Process(before)) => {
                sys::process_time(task.pid).map(|after| after.saturating_sub(before))
            }
            Some(Reading::Task(before)) => {
                self.read(task).map(|after| after.saturating_sub(before))
            }
            None => None,
        };
        if let Some(passed) = passed {
            let Overhead { together, apart } = self.overhead;
            let overhead = match apart {
                Some(apart) if self.ran_apart(task) => apart,
                _ => together,
            };
            self.own.insert(task.tid, passed.saturating_sub(overhead));
        }
    }

    /// Whether the task, which has just stopped, ran on another processor than this tracer.
    fn ran_apart(&mut self, task: Task) -> bool {
        let here = rustix::thread::sched_getcpu();
        self.stat
            .read(task, processor)
            .is_some_and(|processor| processor != here)
    }

    /// Takes the time of the call that has ended.
    pub(crate) fn take(&mut self, tid: Pid) -> Option<u64> {
        self.own.remove(&tid)
    }

    pub(crate) fn forget(&mut self, tid: Pid) {
        self.schedstat.forget(tid);
        self.stat.forget(tid);
        self.before.remove(&tid);
        self.own.remove(&tid);
    }

    fn read(&mut self, task: Task) -> Option<u64> {
        self.schedstat.read(task, |text| {
            text.split(|byte| *byte == b' ').next().and_then(number)
        })
    }
}

/// In a task's `stat`: the processor that it ran on last.
fn processor(stat: &[u8]) -> Option<usize> {
    // The second field, a name in parentheses, may have spaces and parentheses of its own.
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    stat[name_end..]
        .split(|byte| *byte == b' ')
        .nth(39 - 2)
        .and_then(number)
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_this_task_runs_is_counted_less_the_overhead() {
        let pid = std::process::id() as Pid;
        let task = Task {
            pid,
            tid: rustix::thread::gettid().as_raw_nonzero().get(),
        };
        let overhead = Overhead {
            together: 1000,
            apart: None,
        };
        let mut runtime = Runtime::new(overhead, false);
        runtime.begin(task);
        // The thread's CPU time, because other threads may use the processor.
        let ran = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            time.tv_sec * 1_000_000_000 + time.tv_nsec
        };
        let begun = ran();
        while ran() - begun < 5_000_000 {}
        // The kernel updates the count of a running task at timer ticks. The count of a stopped
        // task is exact.
        rustix::thread::sched_yield();
        runtime.end(task);
        assert!(runtime.take(task.tid).is_some_and(|own| own > 1_000_000));
        assert_eq!(runtime.take(task.tid), None);
        runtime.begin(Task {
            pid: i32::MAX,
            tid: i32::MAX,
        });
        runtime.end(Task {
            pid: i32::MAX,
            tid: i32::MAX,
        });
        assert_eq!(runtime.take(i32::MAX), None);
    }

    #[test]
    fn the_clock_of_a_process_is_used_while_it_has_one_task() {
        let task = |tid| Task {
            pid: std::process::id() as Pid,
            tid,
        };
        let this = task(rustix::thread::gettid().as_raw_nonzero().get());
        let reading = |runtime: &mut Runtime| {
            runtime.begin(this);
            runtime.before.remove(&this.tid)
        };
        let is_process = |reading| matches!(reading, Some(Reading::Process(1..)));
        let mut runtime = Runtime::new(Overhead::default(), true);
        runtime.entered(this);
        assert!(is_process(reading(&mut runtime)));
        runtime.entered(task(i32::MAX));
        assert!(matches!(reading(&mut runtime), Some(Reading::Task(_))));
        runtime.left(task(i32::MAX));
        assert!(is_process(reading(&mut runtime)));
        let mut some = Runtime::new(Overhead::default(), false);
        some.entered(this);
        assert!(
            matches!(reading(&mut some), Some(Reading::Task(_))),
            "there may be tasks that are not traced"
        );
    }

    #[test]
    fn the_processor_is_found_after_a_name_that_looks_like_fields() {
        let fields: String = (4..=52).map(|field| format!(" {field}")).collect();
        let stat = format!("7 (a) R 1 (b) S{fields}\n");
        assert_eq!(processor(stat.as_bytes()), Some(39));
        assert_eq!(processor(b"7 (a) R 1 2 3"), None);
        assert_eq!(processor(b""), None);
    }
}
