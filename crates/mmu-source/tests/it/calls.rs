//! Each memory call is reported with the ranges that it changes.

use mmu_source::process::{ExitStatus, Options};
use testkit::{Cap, require};

use crate::log::{Record, Recorder, Trace, hex, trace, trace_with};

/// Returns what the tracer saw between a case's marks, and what the case says that it should see.
/// Both are lines as the tracee prints them.
fn seen_and_said(trace: &Trace) -> (Vec<String>, Vec<String>) {
    assert_eq!(trace.status, ExitStatus::Code(0), "{}", trace.stdout);
    let marker = hex(trace.said("#")[0][0]);
    let said: Vec<String> = trace
        .stdout
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    let mut seen: Vec<(u64, String)> = Vec::new();
    let mut inside = false;
    for (part, result) in trace.ends() {
        // The loader may have unmapped memory at the same address.
        let is_mark = part.cause == "madvise"
            && part.start == marker
            && result == Some(-i64::from(libc::EINVAL));
        if is_mark {
            inside = !inside;
        } else if inside {
            let result = result.expect("no task died in a call");
            let line = format!(
                "{} {} {:#x} {:#x} {result}",
                part.cause, part.event, part.start, part.end
            );
            seen.push((part.start, line));
        }
    }
    (seen.into_iter().map(|(_, line)| line).collect(), said)
}

/// Sorts lines that are next to each other and have the same cause and result, because the brackets
/// of one call end in the reverse order of their starts. Comparing everything as a set would be too
/// weak.
fn normal(lines: &[String]) -> Vec<String> {
    let key = |line: &String| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words[0].to_owned(), words[4].to_owned())
    };
    let mut groups: Vec<Vec<String>> = Vec::new();
    for line in lines {
        match groups.last_mut() {
            Some(group) if key(&group[0]) == key(line) && group[0] != *line => {
                group.push(line.clone())
            }
            _ => groups.push(vec![line.clone()]),
        }
    }
    groups.iter_mut().for_each(|group| group.sort());
    groups.concat()
}

fn check(case: &str) {
    if !require(Cap::Ptrace) {
        return;
    }
    for seccomp in [true, false] {
        if seccomp && !require(Cap::SeccompTrace) {
            continue;
        }
        let mut options = Options::default();
        options.seccomp = seccomp;
        let trace = trace_with(options, Recorder::new(), &[case]);
        let (seen, said) = seen_and_said(&trace);
        assert!(!said.is_empty(), "the case says nothing");
        assert_eq!(
            normal(&seen),
            normal(&said),
            "{case}, with a filter: {seccomp}"
        );
    }
}

#[test]
fn munmap_mmap_and_mprotect() {
    check("mappings");
}

#[test]
fn advice_that_clears_and_advice_that_does_not() {
    check("advice");
}

#[test]
fn every_form_of_mremap() {
    check("move");
}

#[test]
fn brk_that_shrinks() {
    check("break");
}

#[test]
fn a_segment_is_detached_and_attached_over_memory() {
    check("segment");
}

#[test]
fn pages_that_migrate() {
    if require(Cap::Numa) {
        check("migrate");
    }
}

#[test]
fn calls_that_the_kernel_refuses() {
    check("refused");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn thirty_two_bit_calls_of_a_sixty_four_bit_program() {
    if require(Cap::I386Calls) {
        check("compat");
    }
}

#[test]
fn a_start_is_reported_before_the_call_and_its_end_after() {
    if !require(Cap::Ptrace) {
        return;
    }
    let trace = trace(&["mappings"]);
    let mut last_start = None;
    for record in &trace.records {
        match record {
            Record::Start(part) => last_start = Some(part),
            Record::End(part, result) => {
                assert_eq!(
                    Some(part),
                    last_start,
                    "a program of one thread and one range a call"
                );
                assert!(result.is_some());
            }
            _ => {}
        }
    }
    assert!(last_start.is_some());
}
