//! How often each process got, put and freed a notifier (`--lifecycle`).

use std::io::Write as _;

use mmu_source::process::Pid;

use crate::record::{Kind, Record};

/// Counts records as they are written.
#[derive(Debug, Default)]
pub(crate) struct Lifecycle {
    /// In the order in which they appeared.
    pub(crate) processes: Vec<Process>,
}

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    pub(crate) name: String,
    pub(crate) get: u64,
    pub(crate) put: u64,
    pub(crate) free: u64,
}

impl Lifecycle {
    pub(crate) fn add(&mut self, record: &Record, comm: &str) {
        let pid = record.task.pid;
        match record.kind {
            Kind::Get { .. } => self.process(pid, comm).get += 1,
            Kind::Put { .. } => self.process(pid, comm).put += 1,
            Kind::Free => self.process(pid, comm).free += 1,
            Kind::Exec { .. } => comm.clone_into(&mut self.process(pid, comm).name),
            Kind::Fork { child, .. } if child.pid != pid => self.begin(child.pid, comm),
            _ => {}
        }
    }

    /// The latest process with this pid.
    fn process(&mut self, pid: Pid, comm: &str) -> &mut Process {
        let at = self
            .processes
            .iter()
            .rposition(|process| process.pid == pid)
            .unwrap_or_else(|| {
                self.begin(pid, comm);
                self.processes.len() - 1
            });
        &mut self.processes[at]
    }

    /// Adds a new process, even if an earlier process had the same pid. A child has its parent's
    /// name.
    fn begin(&mut self, pid: Pid, comm: &str) {
        self.processes.push(Process {
            pid,
            name: comm.to_owned(),
            get: 0,
            put: 0,
            free: 0,
        });
    }

    pub(crate) fn write_text(&self, out: &mut Vec<u8>) {
        // Writing to memory cannot fail.
        let _ = writeln!(
            out,
            "{:>8}  {:<15}{:>10}{:>10}{:>10}",
            "process", "name", "get", "put", "free"
        );
        for Process {
            pid,
            name,
            get,
            put,
            free,
        } in &self.processes
        {
            let _ = writeln!(out, "{pid:>8}  {name:<15}{get:>10}{put:>10}{free:>10}");
        }
    }
}

#[cfg(test)]
mod tests {
    use mmu_source::process::Task;

    use super::*;

    const TASK: Task = Task {
        pid: 1 << 23,
        tid: 1 << 23,
    };

    #[test]
    fn gets_puts_and_frees_are_counted_by_process() {
        let mut lifecycle = Lifecycle::default();
        let kinds = [
            Kind::Get { users: 1 },
            Kind::Get { users: 2 },
            Kind::Put { users: 1 },
            Kind::Free,
        ];
        kinds.into_iter().for_each(|kind| {
            lifecycle.add(
                &Record {
                    task: TASK,
                    mm: 3,
                    kind,
                },
                "prog",
            )
        });
        let mut out = Vec::new();
        lifecycle.write_text(&mut out);
        let text = String::from_utf8(out).unwrap();
        let row: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["8388608", "prog", "2", "1", "1"]);
    }

    #[test]
    fn a_reused_pid_is_another_process() {
        let child = Task {
            pid: TASK.pid + 1,
            tid: TASK.pid + 1,
        };
        let mut lifecycle = Lifecycle::default();
        let mut add = |task, kind| lifecycle.add(&Record { task, mm: 3, kind }, "");
        for _ in 0..2 {
            add(TASK, Kind::Fork { child, child_mm: 4 });
            add(child, Kind::Get { users: 1 });
            add(child, Kind::Put { users: 0 });
        }
        // A thread is no process.
        add(
            TASK,
            Kind::Fork {
                child: Task {
                    pid: TASK.pid,
                    tid: 7,
                },
                child_mm: 3,
            },
        );
        let processes: Vec<_> = lifecycle
            .processes
            .iter()
            .map(|process| (process.pid, process.get))
            .collect();
        assert_eq!(processes, [(child.pid, 1), (child.pid, 1)]);
    }
}
