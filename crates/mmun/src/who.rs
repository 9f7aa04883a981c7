//! The names of tasks, and the files of their programs.
//!
//! A shell makes a task for each command, so both are found with as few looks into `/proc` as
//! possible. A new task has the name of the task that made it, and a forked process runs the file
//! of its parent. The kernel makes the directory of a task in `/proc` at the first look, and
//! removes it when the task ends. So a look at the parent costs less than one at the child.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use mmu_source::process::{Pid, Task, proc_is_foreign};

use crate::record::{Kind, Record};

/// The known names of tasks.
///
/// A task sets its name after it was made, and the tracer gets no event for that. So the name is
/// read when the task appears, and again at its 8th, 64th, 512th record and so on. A task that
/// makes calls is therefore soon known by its new name, at almost no cost.
#[derive(Debug, Default)]
pub(crate) struct Who {
    tasks: HashMap<Pid, Named>,
    /// The task that made a task last, and the open file with its name.
    last_maker: Option<(Pid, File)>,
}

#[derive(Debug)]
struct Named {
    pid: Pid,
    name: String,
    records: u32,
    ended: bool,
}

impl Who {
    /// The name of `task`, for a record of `kind`; empty if it is not known.
    pub(crate) fn name(&mut self, task: Task, kind: &Kind) -> &str {
        match *kind {
            Kind::MmNew {
                parent: Some(parent),
            } => self.born(task, parent),
            Kind::Fork { child, .. } => self.born(child, task),
            _ => {}
        }
        let is_late = matches!(kind, Kind::Put { .. } | Kind::Free | Kind::MmRelease);
        let new = || Named {
            pid: task.pid,
            name: String::new(),
            records: 0,
            ended: false,
        };
        let named = self.tasks.entry(task.tid).or_insert_with(new);
        if named.ended && !is_late {
            // Another task has the tid now.
            (named.ended, named.records) = (false, 0);
        }
        if matches!(kind, Kind::MmNew { parent: None }) || named.pid != task.pid {
            (named.pid, named.records) = (task.pid, 0);
        }
        if matches!(kind, Kind::Exit(_)) {
            named.ended = true;
        }
        named.records = named.records.saturating_add(1);
        let is_power_of_eight =
            named.records.is_power_of_two() && named.records.trailing_zeros() % 3 == 0;
        if is_power_of_eight && !is_late {
            if let Some(name) = open(task.tid).and_then(|comm| read(&comm)) {
                named.name = name;
            }
        }
        &named.name
    }

    /// Gives `child`, which has not run yet, the name that its stopped parent has now.
    fn born(&mut self, child: Task, parent: Task) {
        let known = self.tasks.get(&child.tid);
        if known.is_some_and(|known| known.pid == child.pid && !known.ended) {
            return;
        }
        let Some(name) = self.name_of_maker(parent.tid) else {
            return;
        };
        let named = Named {
            pid: child.pid,
            name,
            records: 1,
            ended: false,
        };
        self.tasks.insert(child.tid, named);
    }

    /// The name that the stopped task `maker` has now.
    fn name_of_maker(&mut self, maker: Pid) -> Option<String> {
        let last = self.last_maker.take().filter(|(tid, _)| *tid == maker);
        // If that task has ended and another one has its number, reading the old file fails.
        let read_last = last.and_then(|(_, file)| Some((read(&file)?, file)));
        let (name, file) = read_last.or_else(|| {
            let file = open(maker)?;
            Some((read(&file)?, file))
        })?;
        self.last_maker = Some((maker, file));
        Some(name)
    }

    /// The name that was read last; empty if no name was read.
    #[cfg(test)]
    pub(crate) fn known(&self, tid: Pid) -> &str {
        self.tasks.get(&tid).map_or("", |named| &named.name)
    }
}

/// The files that the programs of processes come from.
#[derive(Debug, Default)]
pub(crate) struct Programs(HashMap<Pid, Arc<str>>);

impl Programs {
    /// The file for a record that has one; `None` for any other record, if the process has ended,
    /// or if the file may not be read.
    pub(crate) fn of(&mut self, record: &Record) -> Option<Arc<str>> {
        let Task { pid, tid } = record.task;
        match record.kind {
            Kind::MmNew { parent } => {
                let known = parent.and_then(|parent| self.0.get(&parent.pid).cloned());
                let found = known.or_else(|| program(pid));
                match &found {
                    Some(program) => self.0.insert(pid, Arc::clone(program)),
                    None => self.0.remove(&pid),
                };
                found
            }
            // Its `MmNew` came just before.
            Kind::Exec { .. } => self.0.get(&pid).cloned(),
            Kind::Exit(_) if pid == tid => {
                self.0.remove(&pid);
                None
            }
            _ => None,
        }
    }
}

/// The path of a file in `/proc` about a task. `None` if `/proc` belongs to another pid namespace,
/// where another task has that tid.
pub(crate) fn shown(tid: Pid, file: &str) -> Option<String> {
    (!proc_is_foreign()).then(|| format!("/proc/{tid}/{file}"))
}

/// The file with the kernel's name of a task; `None` if the task has ended.
fn open(tid: Pid) -> Option<File> {
    File::open(shown(tid, "comm")?).ok()
}

/// Reads a name, with unprintable characters escaped; `None` if the task has ended.
fn read(comm: &File) -> Option<String> {
    let mut name = [0; 64];
    let count = comm.read_at(&mut name, 0).ok()?;
    let name = &name[..count];
    let name = String::from_utf8_lossy(name.strip_suffix(b"\n").unwrap_or(name));
    Some(if name.chars().any(char::is_control) {
        name.escape_debug().to_string()
    } else {
        name.into_owned()
    })
}

/// The file that a process runs; `None` if the process has ended or the file may not be read.
fn program(pid: Pid) -> Option<Arc<str>> {
    let path = fs::read_link(shown(pid, "exe")?).ok()?;
    Some(path.to_string_lossy().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_renames_itself_is_soon_known_by_its_name() {
        let this = std::process::id() as Pid;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let tid = rustix::thread::gettid().as_raw_nonzero().get();
                let (task, mut who) = (Task { pid: this, tid }, Who::default());
                let kind = Kind::Get { users: 1 };
                who.name(task, &kind);
                rustix::thread::set_name(c"another").unwrap();
                for _ in 2..8 {
                    assert_ne!(
                        who.name(task, &kind),
                        "another",
                        "only the eighth is looked up"
                    );
                }
                assert_eq!(who.name(task, &kind), "another");
                assert_eq!(who.known(tid), "another");
            });
        });
        assert_eq!(Who::default().known(1), "");
    }

    #[test]
    fn a_new_task_has_the_name_that_its_parent_has_now() {
        let this = std::process::id() as Pid;
        // No task has these numbers, so their files cannot be read.
        let child = |above| Task {
            pid: Pid::MAX - above,
            tid: Pid::MAX - above,
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let tid = rustix::thread::gettid().as_raw_nonzero().get();
                let (parent, mut who) = (Task { pid: this, tid }, Who::default());
                who.name(parent, &Kind::Get { users: 1 });
                rustix::thread::set_name(c"forks").unwrap();
                let new = Kind::MmNew {
                    parent: Some(parent),
                };
                assert_eq!(who.name(child(1), &new), "forks");
                let fork = |child| Kind::Fork { child, child_mm: 2 };
                who.name(parent, &fork(child(2)));
                assert_eq!(who.name(child(2), &Kind::Get { users: 1 }), "forks");
                rustix::thread::set_name(c"later").unwrap();
                who.name(parent, &fork(child(1)));
                assert_eq!(who.known(child(1).tid), "forks", "it is known");
                who.name(
                    child(1),
                    &Kind::Exit(mmu_source::process::ExitStatus::Code(0)),
                );
                assert_eq!(who.name(child(1), &new), "later", "another task");
            });
        });
    }

    #[test]
    fn a_fork_runs_the_file_of_its_parent_until_it_executes_another_one() {
        let (this, none) = (std::process::id() as Pid, Pid::MAX);
        let mut programs = Programs::default();
        let task = |pid| Task { pid, tid: pid };
        let mut of = |pid, kind| {
            let task = task(pid);
            programs.of(&Record { task, mm: 1, kind })
        };
        let new = |parent: Option<Pid>| Kind::MmNew {
            parent: parent.map(task),
        };
        let own = of(this, new(None)).expect("the file of this program");
        assert_eq!(of(none, new(Some(this))), Some(own.clone()));
        assert_eq!(of(none, new(None)), None, "it has ended");
        assert_eq!(of(this, new(Some(none))), Some(own.clone()), "read again");
        assert_eq!(of(this, Kind::Exec { old_mm: 3 }), Some(own));
        of(this, Kind::Exit(mmu_source::process::ExitStatus::Code(0)));
        assert_eq!(of(none, new(Some(this))), None, "the parent has ended");
    }
}
