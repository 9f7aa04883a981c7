//! What `/proc` tells about a task, the maps apart.

use std::ffi::CString;
use std::fs;

use super::{Pid, sys};
use crate::ranges::is_self_pidfd;

/// Reads one field of `/proc/TID/status`.
fn status_field(tid: Pid, name: &str) -> Option<String> {
    field(&fs::read_to_string(format!("/proc/{tid}/status")).ok()?, name)
}

fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// The process a task belongs to, and that process's parent.
pub(super) fn family(tid: Pid) -> Option<(Pid, Pid)> {
    let text = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    Some((field(&text, "Tgid")?.parse().ok()?, field(&text, "PPid")?.parse().ok()?))
}

/// The process a task belongs to.
pub(super) fn thread_group(tid: Pid) -> Option<Pid> {
    status_field(tid, "Tgid")?.parse().ok()
}

/// The thread that traces a task, if any.
pub(super) fn tracer_of(tid: Pid) -> Option<Pid> {
    status_field(tid, "TracerPid")?.parse().ok().filter(|pid| *pid > 0)
}

/// Tells whether `tracer` traces any task at all. It looks through all of `/proc`.
pub(super) fn has_tracees(tracer: Pid) -> bool {
    let Ok(entries) = fs::read_dir("/proc") else { return false };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.flat_map(threads).any(|tid| tracer_of(tid) == Some(tracer))
}

/// Tells whether a task has ended and only its status is left, or not even that.
pub(super) fn has_ended(tid: Pid) -> bool {
    status_field(tid, "State").is_none_or(|state| state.starts_with(['Z', 'X']))
}

/// The threads of a process.
pub(super) fn threads(pid: Pid) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// Resolves a pidfd of task `tid` to the process or thread it names.
///
/// The kernel translates the number into the pid namespace of this `/proc`.
pub(super) fn pidfd_target(tid: Pid, fd: i32) -> Option<Pid> {
    if is_self_pidfd(fd) {
        return Some(tid);
    }
    let text = fs::read_to_string(format!("/proc/{tid}/fdinfo/{fd}")).ok()?;
    field(&text, "Pid")?.parse().ok().filter(|pid| *pid > 0)
}

/// The size of the pages of a file that task `tid` has open, if they are huge.
pub(super) fn huge_page_of(tid: Pid, fd: i32) -> Option<u64> {
    sys::huge_page(&CString::new(format!("/proc/{tid}/fd/{fd}")).ok()?)
}

/// Finds among `candidates` the task that task `tid` calls `number`.
///
/// They are the same number unless `tid` lives in a pid namespace of its own.
pub(super) fn named_by(tid: Pid, number: Pid, candidates: impl Iterator<Item = Pid>) -> Option<Pid> {
    if number == 0 {
        return Some(tid);
    }
    let namespace = |tid| fs::read_link(format!("/proc/{tid}/ns/pid")).ok();
    if namespace(tid) == fs::read_link("/proc/self/ns/pid").ok() {
        return Some(number);
    }
    let own = namespace(tid)?;
    // A task's NSpid column lists its numbers from this namespace inwards; the last one is that in its own.
    candidates.into_iter().find(|candidate| {
        let innermost = || status_field(*candidate, "NSpid")?.split_whitespace().last()?.parse::<Pid>().ok();
        innermost() == Some(number) && namespace(*candidate).as_ref() == Some(&own)
    })
}

/// The address below which task `tid` cannot set the program break: `brk` ignores such a call.
///
/// # Source
/// `brk`, mm/mmap.c: the start of the heap, or the end of the data where the kernel is built for old programs.
pub(super) fn lowest_break(tid: Pid) -> Option<u64> {
    lowest_break_in(&fs::read_to_string(format!("/proc/{tid}/stat")).ok()?)
}

/// The second column is a name in parentheses. `end_data` and `start_brk` are columns 46 and 47; to who may not know, zero.
fn lowest_break_in(stat: &str) -> Option<u64> {
    let mut columns = stat.rsplit_once(')')?.1.split_whitespace().skip(46 - 3);
    let mut next = || columns.next()?.parse::<u64>().ok();
    Some(next()?.min(next()?))
}

/// The size of a SysV shared memory segment, if task `tid` shares this process's IPC namespace.
pub(super) fn segment_size(tid: Pid, id: i32) -> Option<u64> {
    if fs::read_link(format!("/proc/{tid}/ns/ipc")).ok()? != fs::read_link("/proc/self/ns/ipc").ok()? {
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
        assert_eq!((size_in(table, 7), size_in(table, 8), size_in(table, 9)), (Some(8192), Some(4097), None));
    }

    #[test]
    fn the_heap_starts_where_the_kernel_says() {
        let columns = |list: std::ops::Range<u64>| list.map(|column| column.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(lowest_break_in(&format!("1 (a) b) {}", columns(3..53))), Some(46));
        assert_eq!(lowest_break_in(&format!("1 (a) {}", columns(3..47))), None);
        let own = lowest_break(std::process::id() as Pid).expect("a process knows its own");
        let maps = crate::process::maps::read(std::process::id() as Pid).expect("it can read them");
        let heap = maps.iter().find(|mapping| mapping.kind == crate::process::maps::Kind::Heap);
        assert!(own > 0 && heap.is_none_or(|heap| own <= heap.start), "{own:#x} {heap:x?}");
    }

    #[test]
    fn this_process_is_its_own_thread_group_leader() {
        let pid = std::process::id() as Pid;
        assert_eq!(thread_group(pid), Some(pid));
        assert!(threads(pid).contains(&pid));
        assert_eq!(named_by(pid, 0, std::iter::empty()), Some(pid));
    }
}
