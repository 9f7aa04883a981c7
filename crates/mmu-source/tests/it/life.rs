//! Address spaces and tasks that are made and that end.

use std::collections::HashSet;

use mmu_source::process::{ExitStatus, Options, Task};
use testkit::{Cap, require, rounds};

use crate::log::{Record, Recorder, Trace, hex, page_size, trace, trace_with};

fn mm_of(trace: &Trace, task: Task) -> u64 {
    let first = trace.records.iter().find_map(|record| match record {
        Record::Get { task: entered, mm } if *entered == task => Some(*mm),
        _ => None,
    });
    first.unwrap_or_else(|| panic!("{task:?} never entered"))
}

fn forks(trace: &Trace) -> Vec<(Task, Task, u64, u64)> {
    let fork = |record: &Record| match record {
        Record::Fork {
            task,
            child,
            mm,
            child_mm,
        } => Some((*task, *child, *mm, *child_mm)),
        _ => None,
    };
    trace.records.iter().filter_map(fork).collect()
}

fn news(trace: &Trace) -> usize {
    trace
        .records
        .iter()
        .filter(|record| matches!(record, Record::New { .. }))
        .count()
}

#[test]
fn s_17_a_forked_child_has_an_address_space_of_its_own_without_subscribers() {
    if !require(Cap::Ptrace) {
        return;
    }
    let trace = trace(&["fork"]);
    assert_eq!(trace.status, ExitStatus::Code(0), "{}", trace.stdout);
    let forks = forks(&trace);
    assert_eq!(forks.len(), trace.said("child").len());
    assert!(forks.len() >= 3, "each call that forks was made");
    assert_eq!(news(&trace), forks.len() + 1);
    for (words, (parent, child, mm, child_mm)) in trace.said("child").into_iter().zip(forks) {
        assert_eq!((words[0], words[1]), (child.tid.to_string().as_str(), "0"));
        assert_eq!((parent.tid, child.pid), (trace.pid, child.tid));
        assert_ne!(mm, child_mm);
        // The child's `munmap` is reported in the child's address space only.
        let of_child: Vec<_> = trace
            .ends()
            .filter(|(part, _)| part.task == child && part.cause == "munmap")
            .collect();
        assert_eq!(of_child.len(), 1);
        assert_eq!((of_child[0].0.mm, of_child[0].1), (child_mm, Some(0)));
        // The recorder has checked that the new address space has no subscribers. `New` must be the
        // first record about it.
        let first = trace.records.iter().position(|record| {
            *record
                == Record::New {
                    task: child,
                    mm: child_mm,
                }
        });
        let get = trace.records.iter().position(|record| {
            *record
                == Record::Get {
                    task: child,
                    mm: child_mm,
                }
        });
        assert!(first.expect("new") < get.expect("a get"));
    }
}

#[test]
fn fork_protects_writable_private_memory_while_the_child_is_made() {
    if !require(Cap::Ptrace) {
        return;
    }
    let trace = trace(&["fork"]);
    let (arena, fixed) = (&trace.said("arena")[0], &trace.said("read-only")[0]);
    let (arena, fixed) = (
        (hex(arena[0]), hex(arena[1])),
        (hex(fixed[0]), hex(fixed[1])),
    );
    let children = trace.said("child");
    assert!(children.len() >= 3);
    for words in children {
        let child: i64 = words[0].parse().expect("a pid");
        let protects: Vec<_> = trace
            .ends()
            .filter(|(_, result)| *result == Some(child))
            .collect();
        assert!(!protects.is_empty());
        // The cause is the call that the task made, whatever kind of child the call asked for.
        assert!(
            protects
                .iter()
                .all(|(part, _)| (part.cause, part.event) == (words[2], "protection_page")),
            "{words:?}"
        );
        let covers = |(start, end)| {
            protects
                .iter()
                .any(|(part, _)| part.start <= start && end <= part.end)
        };
        let touches = |(start, end)| {
            protects
                .iter()
                .any(|(part, _)| part.start < end && start < part.end)
        };
        assert!(covers(arena) && !touches(fixed), "{protects:?}");
        let at = |wanted: &dyn Fn(&Record) -> bool| {
            trace.records.iter().position(wanted).expect("recorded")
        };
        let fork = at(
            &|record| matches!(record, Record::Fork { child: made, .. } if i64::from(made.tid) == child),
        );
        let end = at(&|record| matches!(record, Record::End(_, result) if *result == Some(child)));
        assert!(fork < end, "the bracket is open when the child appears");
    }
}

#[test]
fn threads_share_one_address_space_and_no_call_of_theirs_is_lost() {
    const THREADS: usize = 64;
    if !require(Cap::Ptrace) {
        return;
    }
    let rounds = rounds(50);
    let trace = trace(&["threads", &THREADS.to_string(), &rounds.to_string()]);
    assert_eq!(trace.status, ExitStatus::Code(0), "{}", trace.stdout);
    assert_eq!(news(&trace), 1);
    let forks = forks(&trace);
    assert_eq!(forks.len(), THREADS);
    for (_, child, mm, child_mm) in &forks {
        assert_eq!((child.pid, mm), (trace.pid, child_mm));
        let unmaps = |part: &&crate::log::Part| {
            part.task == *child
                && part.cause == "munmap"
                && part.end - part.start == 37 * page_size()
        };
        assert_eq!(
            trace.ends().map(|(part, _)| part).filter(unmaps).count(),
            rounds,
            "{child:?}"
        );
    }
}

#[test]
fn a_hundred_processes_that_fork_at_once_are_all_seen() {
    const PROCESSES: usize = 100;
    if !require(Cap::Ptrace) {
        return;
    }
    let trace = trace(&["storm", &PROCESSES.to_string()]);
    assert_eq!(trace.said("failed"), [["0"]]);
    assert_eq!(forks(&trace).len(), 2 * PROCESSES);
    assert_eq!(news(&trace), 2 * PROCESSES + 1);
    let unmapping: HashSet<(Task, u64)> = trace
        .ends()
        .filter(|(part, _)| part.cause == "munmap")
        .map(|(part, _)| (part.task, part.mm))
        .collect();
    let children = forks(&trace)
        .into_iter()
        .map(|(_, child, _, mm)| (child, mm));
    assert!(children.into_iter().all(|child| unmapping.contains(&child)));
    let exits = trace
        .records
        .iter()
        .filter(|record| matches!(record, Record::Exit { .. }))
        .count();
    assert_eq!(exits, 2 * PROCESSES + 1);
}

#[test]
fn execve_leaves_the_old_address_space_for_a_new_one() {
    if !require(Cap::Ptrace) {
        return;
    }
    let trace = trace(&["exec"]);
    assert_eq!(trace.status, ExitStatus::Code(7), "{}", trace.stdout);
    let task = Task {
        pid: trace.pid,
        tid: trace.pid,
    };
    let old_mm = mm_of(&trace, task);
    let exec = trace.records.iter().find_map(|record| match record {
        Record::Exec {
            task: by,
            mm,
            old_mm: left,
        } if *by == task => Some((*mm, *left)),
        _ => None,
    });
    let (mm, left) = exec.expect("an exec");
    assert_eq!(left, old_mm);
    let at = |wanted: Record| {
        trace
            .records
            .iter()
            .position(|record| *record == wanted)
            .expect("recorded")
    };
    let put = at(Record::Put {
        task,
        mm: old_mm,
        cause: "execve",
    });
    assert!(
        put < at(Record::New { task, mm })
            && at(Record::New { task, mm }) < at(Record::Get { task, mm })
    );
}

#[test]
fn execve_by_another_thread_ends_the_rest_and_takes_the_leaders_place() {
    if !require(Cap::Ptrace) {
        return;
    }
    for _ in 0..rounds(20) {
        let trace = trace(&["thread-exec"]);
        assert_eq!(trace.status, ExitStatus::Code(8), "{}", trace.stdout);
        let task = Task {
            pid: trace.pid,
            tid: trace.pid,
        };
        let by: Vec<&Record> = trace
            .records
            .iter()
            .filter(|record| matches!(record, Record::Exec { .. }))
            .collect();
        assert!(
            matches!(by[..], [Record::Exec { task: by, .. }] if *by == task),
            "{by:?}"
        );
        assert_eq!(news(&trace), 2);
        // The old leader, the thread that replaced it, and three waiting threads. The thread that
        // ran `execve` has no exit under its former thread id.
        let exits = trace
            .records
            .iter()
            .filter(|record| matches!(record, Record::Exit { .. }))
            .count();
        assert_eq!(exits, 5);
    }
}

#[test]
fn a_vfork_child_shares_its_parents_memory_until_it_execs() {
    if !require(Cap::Ptrace) {
        return;
    }
    let trace = trace(&["spawn"]);
    assert_eq!(trace.status, ExitStatus::Code(0));
    assert!(trace.stdout.contains("exit status: 9"), "{}", trace.stdout);
    let forks = forks(&trace);
    let [(parent, child, mm, child_mm)] = forks[..] else {
        panic!("{forks:?}")
    };
    assert_eq!(
        (parent.tid, child.pid, mm),
        (trace.pid, child.tid, child_mm)
    );
    let left = Record::Put {
        task: child,
        mm,
        cause: "execve",
    };
    assert!(trace.records.contains(&left));
    // The parent stays in the old address space, so the old address space ends with the parent.
    let ended = Record::Put {
        task: parent,
        mm,
        cause: "exit",
    };
    assert!(trace.records.contains(&ended));
}

#[test]
fn a_call_on_another_process_is_reported_in_its_address_space() {
    if !require(Cap::Ptrace) {
        return;
    }
    let trace = trace(&["other"]);
    assert_eq!(trace.status, ExitStatus::Code(0), "{}", trace.stdout);
    let child = trace.said("child")[0][0].parse().expect("a pid");
    let said = &trace.said("range")[0];
    let (part, result) = trace
        .ends()
        .find(|(part, _)| part.cause == "process_madvise")
        .expect("seen");
    assert_eq!(part.task.tid, trace.pid, "current is who calls");
    assert_eq!(
        part.mm,
        mm_of(
            &trace,
            Task {
                pid: child,
                tid: child
            }
        )
    );
    assert_eq!((part.start, part.end), (hex(said[0]), hex(said[1])));
    assert_eq!(result, said[2].parse().ok());
    let (all, result) = trace
        .ends()
        .find(|(part, _)| part.cause == "process_mrelease")
        .expect("seen");
    assert_eq!((all.task.tid, all.mm), (trace.pid, part.mm));
    assert_eq!((all.event, all.start, all.end), ("unmap", 0, 0));
    assert_eq!(result, trace.said("released")[0][0].parse().ok());
}

#[test]
fn job_control_works_as_without_a_tracer() {
    if !require(Cap::Ptrace) {
        return;
    }
    let trace = trace(&["stop"]);
    assert_eq!(
        trace.stdout,
        format!(
            "stopped true by {}\ncontinued true\nexited 5\n",
            libc::SIGSTOP
        )
    );
}

#[test]
fn real_time_signals_are_delivered_each_once() {
    if !require(Cap::Ptrace) {
        return;
    }
    let trace = trace(&["signals", "200"]);
    if trace.stdout.starts_with("no more signals") {
        println!(
            "SKIP real_time_signals_are_delivered_each_once: {} (RLIMIT_SIGPENDING)",
            trace.stdout.trim()
        );
        return;
    }
    assert_eq!(
        (trace.stdout.as_str(), trace.status),
        ("200\n", ExitStatus::Code(0))
    );
}

#[test]
fn a_tracee_that_asks_to_be_traced_is_refused() {
    if !require(Cap::Ptrace) {
        return;
    }
    let trace = trace(&["traceme"]);
    let (eperm, esrch) = (libc::EPERM, libc::ESRCH);
    assert_eq!(
        trace.stdout,
        format!("self -{eperm}\nchild {}\nnobody -{esrch}\n", -eperm & 0x7f)
    );
}

#[test]
fn a_thread_that_is_not_followed_ends_the_trace_of_its_process_by_execve() {
    if !require(Cap::Ptrace) {
        return;
    }
    let mut options = Options::default();
    options.follow = false;
    let trace = trace_with(options, Recorder::new(), &["thread-exec"]);
    // The status is that of the process, whatever program it runs in the end.
    assert_eq!(
        (trace.status, news(&trace)),
        (ExitStatus::Code(8), 1),
        "{}",
        trace.stdout
    );
    let exits = trace
        .records
        .iter()
        .filter(|record| matches!(record, Record::Exit { .. }));
    assert_eq!(exits.count(), 1);
}

#[test]
fn children_that_are_not_followed_run_untraced() {
    if !require(Cap::Ptrace) {
        return;
    }
    let mut options = Options::default();
    options.follow = false;
    let trace = trace_with(options, Recorder::new(), &["fork"]);
    assert_eq!(trace.status, ExitStatus::Code(0));
    assert!(
        trace.said("child").iter().all(|words| words[1] == "0"),
        "their munmap works: {}",
        trace.stdout
    );
    assert_eq!((forks(&trace).len(), news(&trace)), (0, 1));
    assert!(
        trace.ends().any(|(part, _)| part.cause == "clone"),
        "the parent's own side of it is seen"
    );
}
