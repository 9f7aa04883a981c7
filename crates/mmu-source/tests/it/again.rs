//! Calls that the kernel restarts, because a signal arrived after they had begun.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mmu_source::process::{ExitStatus, Options};
use testkit::{Cap, require};

use crate::log::{Part, Record, Recorder, Trace, hex, trace_with};

fn forks(part: &Part) -> bool {
    ["fork", "clone", "clone3"].contains(&part.cause)
}

/// Traces a case, and sends the case's first process a signal in each of the first `times` forks of
/// that process. The signal is sent in the start callback, so before the kernel checks for signals.
fn trace_interrupted(times: u32, seccomp: bool, args: &[&str]) -> Trace {
    let (sent, first) = (AtomicU32::new(0), AtomicU64::new(0));
    let recorder = Recorder::with(Box::new(move |part| {
        if !forks(part) || part.task.pid != part.task.tid {
            return;
        }
        // The first range of every fork is the same.
        let _ = first.compare_exchange(0, part.start, Ordering::Relaxed, Ordering::Relaxed);
        if part.start == first.load(Ordering::Relaxed)
            && sent.fetch_add(1, Ordering::Relaxed) < times
        {
            // SAFETY: takes integers.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_tgkill,
                    part.task.pid,
                    part.task.tid,
                    libc::SIGUSR2,
                )
            };
            assert_eq!(result, 0, "the task stands before its call");
        }
    }));
    let mut options = Options::default();
    options.seccomp = seccomp;
    trace_with(options, recorder, args)
}

/// Runs a check with and without a filter.
fn both_ways(check: impl Fn(bool)) {
    if !require(Cap::Ptrace) {
        return;
    }
    for seccomp in [true, false] {
        if !seccomp || require(Cap::SeccompTrace) {
            check(seccomp);
        }
    }
}

/// Returns the start of each bracket of the forks.
fn fork_starts(trace: &Trace) -> Vec<u64> {
    let start = |record: &Record| match record {
        Record::Start(part) if forks(part) => Some(part.start),
        _ => None,
    };
    trace.records.iter().filter_map(start).collect()
}

/// Returns the distinct results with which the brackets of the forks ended.
fn fork_results(trace: &Trace) -> Vec<Option<i64>> {
    let mut results: Vec<_> = trace
        .ends()
        .filter(|(part, _)| forks(part))
        .map(|(_, result)| result)
        .collect();
    results.sort_unstable();
    results.dedup();
    results
}

fn number(word: &str) -> i64 {
    word.parse().expect("a number")
}

/// Tells whether a bracket is a `munmap` at the page's address. The loader may have unmapped memory
/// at that address earlier, so the handler's `munmap` is the last such bracket.
fn unmaps_the_page(trace: &Trace, part: &Part) -> bool {
    part.cause == "munmap" && part.start == hex(trace.said("page")[0][0])
}

/// Returns the positions in the records of three events: the first fork begins, the handler's
/// `munmap` begins, the first fork ends.
fn order(trace: &Trace) -> (usize, usize, usize) {
    let place =
        |is: &dyn Fn(&Record) -> bool| trace.records.iter().rposition(is).expect("it was told");
    let unmapped =
        place(&|record| matches!(record, Record::Start(part) if unmaps_the_page(trace, part)));
    let first =
        |is: &dyn Fn(&Record) -> bool| trace.records.iter().position(is).expect("it was told");
    let begun = first(&|record| matches!(record, Record::Start(part) if forks(part)));
    (
        begun,
        unmapped,
        first(&|record| matches!(record, Record::End(part, _) if forks(part))),
    )
}

#[test]
fn a_fork_that_a_signal_interrupts_keeps_its_brackets_until_it_is_made_again() {
    both_ways(|seccomp| {
        #[cfg(target_arch = "x86_64")]
        let calls = [libc::SYS_fork, libc::SYS_clone, libc::SYS_clone3];
        #[cfg(not(target_arch = "x86_64"))]
        let calls = [libc::SYS_clone, libc::SYS_clone3];
        for call in calls {
            let trace = trace_interrupted(1, seccomp, &["interrupted", &call.to_string()]);
            assert_eq!(trace.status, ExitStatus::Code(0), "{}", trace.stdout);
            let child = &trace.said("child")[0];
            assert_eq!(
                child[1..],
                ["0", "1"],
                "the child ends well, and the handler ran once"
            );
            let mut starts = fork_starts(&trace);
            let told = starts.len();
            starts.sort_unstable();
            starts.dedup();
            assert_eq!(
                starts.len(),
                told,
                "each range is told once, though the call is made twice"
            );
            assert_eq!(fork_results(&trace), [Some(number(child[0]))]);
            let (begun, unmapped, ended) = order(&trace);
            assert!(
                begun < unmapped && unmapped < ended,
                "the handler runs within the fork"
            );
        }
    });
}

#[test]
fn forks_that_interrupt_each_other_each_keep_their_brackets() {
    both_ways(|seccomp| {
        let trace = trace_interrupted(2, seccomp, &["interrupted-twice"]);
        assert_eq!(trace.status, ExitStatus::Code(0), "{}", trace.stdout);
        let words = &trace.said("children")[0];
        assert_eq!(words[2..], ["0", "2"]);
        let starts = fork_starts(&trace);
        assert_eq!(
            starts.iter().filter(|start| **start == starts[0]).count(),
            2,
            "two forks, each told once"
        );
        let mut children = [Some(number(words[0])), Some(number(words[1]))];
        children.sort_unstable();
        assert_eq!(fork_results(&trace), children);
        // The handler's fork ends first, although it began last.
        let first_end = trace
            .ends()
            .find(|(part, _)| forks(part))
            .expect("they end")
            .1;
        assert_eq!(first_end, Some(number(words[1])));
    });
}

#[test]
fn a_fork_that_is_given_up_by_a_jump_out_of_the_handler_ends_without_a_result() {
    both_ways(|seccomp| {
        let trace = trace_interrupted(1, seccomp, &["gives-up"]);
        assert_eq!(trace.status, ExitStatus::Code(5), "{}", trace.stdout);
        assert_eq!(fork_results(&trace), [None]);
        let (_, unmapped, ended) = order(&trace);
        assert!(
            ended < unmapped,
            "it is over when the program does something else"
        );
    });
}

#[test]
fn a_fork_whose_handler_ends_the_process_ends_with_it() {
    both_ways(|seccomp| {
        let trace = trace_interrupted(1, seccomp, &["dies-in-handler"]);
        assert_eq!(trace.status, ExitStatus::Code(6), "{}", trace.stdout);
        assert_eq!(fork_results(&trace), [None]);
    });
}
