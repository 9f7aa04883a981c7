//! The names of tasks.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read as _;

use mmu_source::process::{Pid, Task, proc_is_foreign};

use crate::record::Kind;

/// The known names of tasks.
///
/// A task sets its name after it was made, and the tracer gets no event for that. So the name is
/// read when the task appears, and again at its 8th, 64th, 512th record and so on. A task that
/// makes calls is therefore soon known by its new name, at almost no cost.
#[derive(Debug, Default)]
pub(crate) struct Who {
    tasks: HashMap<Pid, Named>,
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
        if matches!(kind, Kind::MmNew) || named.pid != task.pid {
            (named.pid, named.records) = (task.pid, 0);
        }
        if matches!(kind, Kind::Exit(_)) {
            named.ended = true;
        }
        named.records = named.records.saturating_add(1);
        let is_power_of_eight =
            named.records.is_power_of_two() && named.records.trailing_zeros() % 3 == 0;
        if is_power_of_eight && !is_late {
            if let Some(name) = read(task.tid) {
                named.name = name;
            }
        }
        &named.name
    }

    /// The name that was read last; empty if no name was read.
    #[cfg(test)]
    pub(crate) fn known(&self, tid: Pid) -> &str {
        self.tasks.get(&tid).map_or("", |named| &named.name)
    }
}

/// The path of a file in `/proc` about a task. `None` if `/proc` belongs to another pid namespace,
/// where another task has that tid.
pub(crate) fn shown(tid: Pid, file: &str) -> Option<String> {
    (!proc_is_foreign()).then(|| format!("/proc/{tid}/{file}"))
}

/// The kernel's name of a task, with unprintable characters escaped; `None` if the task has ended.
fn read(tid: Pid) -> Option<String> {
    // A single read, because a shell makes a task for each command.
    let mut name = [0; 64];
    let count = File::open(shown(tid, "comm")?).ok()?.read(&mut name).ok()?;
    let name = &name[..count];
    let name = String::from_utf8_lossy(name.strip_suffix(b"\n").unwrap_or(name));
    Some(if name.chars().any(char::is_control) {
        name.escape_debug().to_string()
    } else {
        name.into_owned()
    })
}

/// The file that a process runs; `None` if the process has ended or the file may not be read.
pub(crate) fn program(pid: Pid) -> Option<String> {
    Some(
        fs::read_link(shown(pid, "exe")?)
            .ok()?
            .to_string_lossy()
            .into_owned(),
    )
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
}
