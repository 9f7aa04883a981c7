//! What `/proc` says about a task, except for its maps.
//!
//! `/proc` may say nothing: if it is not mounted, if it is of another pid namespace, if it hides
//! other users' processes (`hidepid`), or if the task is not dumpable. Then a function here returns
//! `None`, an error or [`Named::Anyone`]. That means "not known", and no caller may treat it as
//! "no". Only [`traces`] returns false in that case.

use std::path::PathBuf;
use std::{fs, io};

use super::Pid;
use crate::fields::field;
use crate::procfs::{self, proc_is_foreign};
use crate::ranges::is_self_pidfd;

/// Reads one field of `/proc/TID/status`.
fn status_field(tid: Pid, name: &str) -> Option<String> {
    field(
        &fs::read_to_string(procfs::of(tid, "status").ok()?).ok()?,
        name,
    )
    .map(str::to_owned)
}

/// Returns the process of a task, and the parent of that process.
pub(super) fn family(tid: Pid) -> Option<(Pid, Pid)> {
    let text = fs::read_to_string(procfs::of(tid, "status").ok()?).ok()?;
    Some((
        field(&text, "Tgid")?.parse().ok()?,
        field(&text, "PPid")?.parse().ok()?,
    ))
}

/// Returns the process of a task.
pub(super) fn thread_group(tid: Pid) -> Option<Pid> {
    status_field(tid, "Tgid")?.parse().ok()
}

/// Returns the thread that traces a task, or 0 if the task is not traced.
pub(super) fn tracer_of(tid: Pid) -> Option<Pid> {
    status_field(tid, "TracerPid")?.parse().ok()
}

/// Tells whether the process `tracer` traces a thread of the process `pid`, directly or through
/// other tracers, as far as `/proc` says.
pub(super) fn traces(tracer: Pid, pid: Pid) -> bool {
    let (mut seen, mut next) = (vec![pid], 0);
    while let Some(&tracee) = seen.get(next) {
        next += 1;
        for thread in threads(tracee)
            .unwrap_or_default()
            .into_iter()
            .filter_map(tracer_of)
        {
            match thread_group(thread) {
                Some(group) if group == tracer => return true,
                Some(group) if !seen.contains(&group) => seen.push(group),
                _ => {}
            }
        }
    }
    false
}

/// Tells whether `tracer` traces any task. Searches all of `/proc`. Returns `None` if `/proc` may
/// hide tasks.
pub(super) fn has_tracees(tracer: Pid) -> Option<bool> {
    if proc_is_foreign() {
        return None;
    }
    let entries = fs::read_dir("/proc").ok()?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let found = pids
        .flat_map(|pid| threads(pid).unwrap_or_default())
        .any(|tid| tracer_of(tid) == Some(tracer));
    (found || shows_all(&fs::read_to_string("/proc/self/mountinfo").ok()?)).then_some(found)
}

/// Tells from a `mountinfo` whether `/proc` lists every process. If several file systems are
/// mounted there, the last one is visible.
fn shows_all(mounts: &str) -> bool {
    let of_proc = mounts
        .lines()
        .rfind(|line| line.split(' ').nth(4) == Some("/proc"));
    of_proc.is_some_and(|line| !line.contains("hidepid="))
}

/// Returns the first letter of a task's state, as `ps` prints it.
pub(super) fn state(tid: Pid) -> Option<u8> {
    status_field(tid, "State")?.bytes().next()
}

/// Tells whether a task has ended and only its exit status is left.
pub(super) fn has_ended(tid: Pid) -> Option<bool> {
    state(tid).map(|state| matches!(state, b'Z' | b'X'))
}

/// Returns the threads of a process.
pub(super) fn threads(pid: Pid) -> io::Result<Vec<Pid>> {
    let entries = fs::read_dir(procfs::of(pid, "task")?)?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect())
}

/// Tells whether a task is in the same pid namespace as this thread.
pub(super) fn shares_pid_namespace(tid: Pid) -> Option<bool> {
    let own = fs::read_link("/proc/self/ns/pid").ok()?;
    Some(pid_namespace(tid)? == own)
}

fn pid_namespace(tid: Pid) -> Option<PathBuf> {
    fs::read_link(procfs::of(tid, "ns/pid").ok()?).ok()
}

/// Returns the process or thread that a pidfd of task `tid` refers to.
///
/// The kernel translates the pid into the pid namespace of this `/proc`.
pub(super) fn pidfd_target(tid: Pid, fd: i32) -> Named {
    if is_self_pidfd(fd) {
        return Named::Task(tid);
    }
    let Ok(name) = procfs::of(tid, &format!("fdinfo/{fd}")) else {
        return Named::Anyone;
    };
    match fs::read_to_string(name) {
        // Not a pidfd, or its process has ended or has no pid in this pid namespace.
        Ok(text) => match field(&text, "Pid").and_then(|pid| pid.parse().ok()) {
            Some(pid) if pid > 0 => Named::Task(pid),
            _ => Named::Stranger,
        },
        Err(error) if procfs::lacks_descriptor(tid, "fdinfo", &error) => Named::Stranger,
        Err(_) => Named::Anyone,
    }
}

/// The task that a call names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Named {
    /// The task with this identifier, which may be a task that is not traced.
    Task(Pid),
    /// No task, or a task that is not traced.
    Stranger,
    /// Unknown: it may be any task.
    Anyone,
}

/// Returns the task among `candidates` that has the pid `number` in the pid namespace of task
/// `tid`.
///
/// A `number` of 0 names `tid`. Otherwise the result is `number` itself, unless `tid` is in another
/// pid namespace than the tracer or its namespace is not known.
pub(super) fn named_by(tid: Pid, number: Pid, candidates: impl Iterator<Item = Pid>) -> Named {
    if number == 0 {
        return Named::Task(tid);
    }
    match shares_pid_namespace(tid) {
        None => return Named::Anyone,
        Some(true) => return Named::Task(number),
        Some(false) => {}
    }
    let Some(own) = pid_namespace(tid) else {
        return Named::Anyone;
    };
    let mut found = Named::Stranger;
    for candidate in candidates {
        // A task's NSpid field lists its pids from this pid namespace inwards. The last one is the
        // pid in the task's own namespace.
        let innermost = || {
            status_field(candidate, "NSpid")?
                .split_whitespace()
                .last()?
                .parse::<Pid>()
                .ok()
        };
        match (innermost(), pid_namespace(candidate)) {
            (Some(inner), Some(namespace)) if inner == number && namespace == own => {
                return Named::Task(candidate);
            }
            (Some(_), Some(_)) => {}
            _ => found = Named::Anyone,
        }
    }
    found
}

/// Returns the lowest program break that task `tid` can set. `brk` ignores a lower address.
///
/// # Source
/// `brk`, mm/mmap.c: the start of the heap, or the end of the data if the kernel is built with
/// `CONFIG_COMPAT_BRK`.
pub(super) fn lowest_break(tid: Pid) -> Option<u64> {
    lowest_break_in(&fs::read_to_string(procfs::of(tid, "stat").ok()?).ok()?)
}

/// The second column is a name in parentheses. `end_data` and `start_brk` are columns 46 and 47.
/// Both are zero if the reader may not see them.
fn lowest_break_in(stat: &str) -> Option<u64> {
    let mut columns = stat.rsplit_once(')')?.1.split_whitespace().skip(46 - 3);
    let mut next = || columns.next()?.parse::<u64>().ok();
    Some(next()?.min(next()?))
}

/// Returns the size of a SysV shared memory segment, if task `tid` is in this process's IPC
/// namespace.
pub(super) fn segment_size(tid: Pid, id: i32) -> Option<u64> {
    if fs::read_link(procfs::of(tid, "ns/ipc").ok()?).ok()?
        != fs::read_link("/proc/self/ns/ipc").ok()?
    {
        return None;
    }
    size_in(&fs::read_to_string("/proc/sysvipc/shm").ok()?, id)
}

/// The columns are key, shmid, perms, size and more.
fn size_in(table: &str, id: i32) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let mut columns = line.split_whitespace();
        (columns.nth(1)?.parse() == Ok(id)).then(|| columns.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_found_by_its_identifier() {
        let table = "       key      shmid perms                  size  cpid\n\
                     0          7  1600                 8192   1\n        -5   8   600   4097   1\n";
        assert_eq!(
            (size_in(table, 7), size_in(table, 8), size_in(table, 9)),
            (Some(8192), Some(4097), None)
        );
    }

    #[test]
    fn the_heap_starts_where_the_kernel_says() {
        let columns = |list: std::ops::Range<u64>| {
            list.map(|column| column.to_string())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(
            lowest_break_in(&format!("1 (a) b) {}", columns(3..53))),
            Some(46)
        );
        assert_eq!(lowest_break_in(&format!("1 (a) {}", columns(3..47))), None);
        let own = lowest_break(std::process::id() as Pid).expect("a process knows its own");
        let maps = crate::maps::read(std::process::id() as Pid).expect("it can read them");
        let heap = maps
            .iter()
            .find(|mapping| mapping.kind == crate::maps::Kind::Heap);
        assert!(
            own > 0 && heap.is_none_or(|heap| own <= heap.start),
            "{own:#x} {heap:x?}"
        );
    }

    #[test]
    fn this_process_is_its_own_thread_group_leader() {
        let pid = std::process::id() as Pid;
        assert_eq!(thread_group(pid), Some(pid));
        assert!(threads(pid).expect("it has some").contains(&pid));
        assert_eq!(named_by(pid, 0, std::iter::empty()), Named::Task(pid));
    }

    #[test]
    fn what_cannot_be_read_is_not_known() {
        let none = Pid::MAX;
        assert_eq!(
            (family(none), tracer_of(none), has_ended(none)),
            (None, None, None)
        );
        assert_eq!(
            (pidfd_target(none, 3), named_by(none, 7, std::iter::empty())),
            (Named::Anyone, Named::Anyone)
        );
        assert!(threads(none).is_err());
    }

    #[test]
    fn what_can_be_read_and_is_not_there_is_a_no() {
        let own = std::process::id() as Pid;
        assert_eq!(pidfd_target(own, 100_000), Named::Stranger);
    }

    #[test]
    fn a_proc_that_hides_processes_does_not_show_all() {
        let shown = "22 28 0:21 / /proc rw,relatime shared:14 - proc proc rw\n30 28 0:9 / /tmp rw - tmpfs hidepid=2 rw\n";
        assert!(shows_all(shown));
        assert!(!shows_all(&format!(
            "{shown}40 22 0:50 / /proc rw - proc proc rw,hidepid=invisible\n"
        )));
        assert!(!shows_all("30 28 0:9 / /tmp rw - tmpfs tmpfs rw\n"));
    }
}
