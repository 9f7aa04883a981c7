//! The time that a task itself ran in a call.
//!
//! The kernel counts it for every task (`/proc/PID/schedstat`, the first number). It is read while
//! the task is stopped, before the call and after it. In between the task also leaves one stop and
//! enters the next, which takes a microsecond or two: that is measured with calls that do nothing,
//! and taken off.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use mmu_source::process::{Pid, Task};

/// How many files are kept open; a task that makes calls opens its own again.
const MOST_OPEN: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Runtime {
    files: HashMap<Pid, File>,
    /// What was read before the call that a task is in.
    before: HashMap<Pid, u64>,
    /// What was read after it.
    own: HashMap<Pid, u64>,
    /// What a call that does nothing takes, in nanoseconds.
    pub(crate) overhead: u64,
}

impl Runtime {
    /// The task stands before its call.
    pub(crate) fn begin(&mut self, task: Task) {
        match self.read(task) {
            Some(time) => drop(self.before.insert(task.tid, time)),
            None => drop(self.before.remove(&task.tid)),
        }
    }

    /// The task stands behind its call: the time it ran in between.
    pub(crate) fn end(&mut self, task: Task) {
        let before = self.before.remove(&task.tid);
        if let Some((before, after)) = before.and_then(|before| Some((before, self.read(task)?))) {
            self.own.insert(task.tid, after.saturating_sub(before).saturating_sub(self.overhead));
        }
    }

    /// The time of the call that has ended, once.
    pub(crate) fn take(&mut self, tid: Pid) -> Option<u64> {
        self.own.remove(&tid)
    }

    pub(crate) fn forget(&mut self, tid: Pid) {
        self.files.remove(&tid);
        self.before.remove(&tid);
        self.own.remove(&tid);
    }

    fn read(&mut self, task: Task) -> Option<u64> {
        if !self.files.contains_key(&task.tid) {
            if self.files.len() >= MOST_OPEN {
                self.files.clear();
            }
            let file = File::open(format!("/proc/{}/task/{}/schedstat", task.pid, task.tid)).ok()?;
            self.files.insert(task.tid, file);
        }
        let mut text = [0; 64];
        let count = self.files[&task.tid].read_at(&mut text, 0).ok()?;
        let digits = text[..count].split(|byte| *byte == b' ').next()?;
        std::str::from_utf8(digits).ok()?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_this_task_runs_is_counted_less_the_overhead() {
        let pid = std::process::id() as Pid;
        let task = Task { pid, tid: rustix::thread::gettid().as_raw_nonzero().get() };
        let mut runtime = Runtime { overhead: 1000, ..Runtime::default() };
        runtime.begin(task);
        let begun = std::time::Instant::now();
        while begun.elapsed().as_millis() < 20 {}
        // The kernel counts a running task at its ticks; a stopped one is always counted whole.
        rustix::thread::sched_yield();
        runtime.end(task);
        assert!(runtime.take(task.tid).is_some_and(|own| own > 1_000_000));
        assert_eq!(runtime.take(task.tid), None);
        runtime.begin(Task { pid: i32::MAX, tid: i32::MAX });
        runtime.end(Task { pid: i32::MAX, tid: i32::MAX });
        assert_eq!(runtime.take(i32::MAX), None);
    }
}
