//! The details of each call: the first mapping in the range, how much of the range was in memory,
//! the time, and the place in the code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use serde_json::Value;
use testkit::{Cap, require};

use crate::support::{check, kind, of_kind, scratch, take_records, text, trace, traced, within};

/// A hundred times: maps 256 anonymous pages, touches ten, and unmaps them in a separate function.
/// That function is called by `DEPTH` calls of another one, which calls itself.
const GIVES_BACK: &str = "\
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/prctl.h>
static __attribute__((noinline)) int give_back(char *at) {
    int result = munmap(at, 1 << 20); /* line 5 */
    __asm__ volatile(\"\");
    return result;
}
static __attribute__((noinline)) int deeper(int calls, char *at) {
    int result = calls ? deeper(calls - 1, at) : give_back(at);
    __asm__ volatile(\"\");
    return result;
}
int main(void) {
    prctl(PR_SET_NAME, \"giver\");
    for (int i = 0; i < 100; i++) {
        char *at = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (int page = 0; page < 10; page++) at[page << 16] = 1;
        if (DEPTH ? deeper(DEPTH, at) : give_back(at)) return 1;
    }
    return 0;
}
";

/// Compiles and traces [`GIVES_BACK`]. Returns the trace and the standard error.
fn gives_back(options: &[&str], flags: &[&str]) -> (Vec<Value>, String) {
    let (source, program, path) = (scratch("give.c"), scratch("give"), scratch("give.json"));
    fs::write(&source, GIVES_BACK).unwrap();
    let done = std::process::Command::new("gcc")
        .arg("-DDEPTH=0")
        .args(flags)
        .arg("-o")
        .arg(&program)
        .arg(&source)
        .status()
        .unwrap();
    assert!(done.success());
    let mut command = trace();
    command
        .args(["--json", "-o"])
        .arg(&path)
        .args(options)
        .arg(&program);
    let output = within("mmun trace", move || command.output().unwrap());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let records = take_records(&path);
    check(&records);
    let mut command = trace();
    command.args(options).arg(&program);
    let output = within("mmun trace", move || command.output().unwrap());
    fs::remove_file(source).unwrap();
    fs::remove_file(program).unwrap();
    (records, text(&output.stderr).to_owned())
}

fn large<'a>(records: &'a [Value], name: &'a str) -> impl Iterator<Item = &'a Value> {
    of_kind(records, name)
        .filter(|record| record["cause"] == "munmap" && record["bytes"] == 1 << 20)
}

#[test]
fn details_have_the_mapping_the_memory_and_the_time() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let resident = 10 * rustix::param::page_size() as u64;
    let (records, lines) = gives_back(&["--details"], &["-O1"]);
    assert_eq!(large(&records, "start").count(), 100);
    for start in large(&records, "start") {
        assert_eq!(start["what"], "anonymous");
        let found = ["resident", "file", "huge", "swapped"].map(|key| start[key].as_u64());
        assert_eq!(found, [Some(resident), Some(0), Some(0), Some(0)]);
        assert!(start.get("self").is_none() && start.get("site").is_none());
    }
    for end in large(&records, "end") {
        assert!(
            end["self"].as_u64().is_some() && end.get("what").is_none(),
            "{end}"
        );
    }
    assert_eq!(
        large(&records, "start").last().unwrap()["comm"],
        "giver",
        "it renamed itself long ago"
    );
    let line = lines
        .lines()
        .find(|line| line.contains("1.0 MiB  munmap = 0"));
    assert!(
        line.is_some_and(
            |line| line.ends_with(&format!("resident {} KiB  anonymous", resident >> 10))
        ),
        "{lines}"
    );
    // The loader replaces a mapping that it has just made and that no code has touched: that of a
    // library, or on aarch64 the address space that it has reserved for one. It reserves none if
    // the kernel's pages are as large as the alignment of libraries, 64 KiB.
    let kind = if cfg!(target_arch = "aarch64") && rustix::param::page_size() < 1 << 16 {
        "anonymous"
    } else {
        ".so"
    };
    let untouched = of_kind(&records, "start")
        .find(|record| record["cause"] == "mmap")
        .unwrap();
    assert!(
        untouched["what"].as_str().unwrap().contains(kind) && untouched["resident"] == 0,
        "{untouched}"
    );
}

#[test]
fn a_stack_that_is_cut_says_so() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    for (depth, frames, is_cut) in [(100, 100..256, false), (300, 256..257, true)] {
        let flags = ["-g", "-O1", "-UDEPTH", &format!("-DDEPTH={depth}")];
        let (records, _) = gives_back(&["-k"], &flags);
        let site = &large(&records, "start").next().unwrap()["site"];
        let stack = of_kind(&records, "stack")
            .find(|stack| &stack["site"] == site)
            .unwrap();
        assert_eq!(stack["partial"], is_cut, "{depth} calls");
        assert!(frames.contains(&stack["frames"].as_array().unwrap().len()));
    }
}

#[test]
fn a_stack_names_the_function_that_gives_memory_back() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    for flags in [
        &["-g", "-O1"][..],
        &["-O1", "-fomit-frame-pointer"],
        &["-g", "-O1", "-static"],
    ] {
        let (records, lines) = gives_back(&["-k", "--summary=where"], flags);
        let sites: BTreeSet<u64> = large(&records, "start")
            .map(|start| start["site"].as_u64().unwrap())
            .collect();
        assert_eq!(sites.len(), 1, "calls from one line have one stack");
        let stack = of_kind(&records, "stack")
            .find(|stack| sites.contains(&stack["site"].as_u64().unwrap()))
            .unwrap();
        let frames = stack["frames"].as_array().unwrap();
        let place = &frames[stack["place"].as_u64().unwrap() as usize];
        assert_eq!(place["function"], "give_back", "{flags:?}: {stack}");
        assert!(
            frames.iter().any(|frame| frame["function"] == "main"),
            "{flags:?}: {stack}"
        );
        if flags.contains(&"-g") {
            assert!(
                place["line"].as_str().unwrap().ends_with("give.c:5"),
                "{stack}"
            );
        }
        let mut rows = records.last().unwrap()["where"].as_array().unwrap().iter();
        let row = rows
            .find(|row| row["name"].as_str().unwrap().starts_with("give_back ("))
            .unwrap();
        assert_eq!(
            (&row["calls"], &row["resident"]),
            (&100.into(), &(1000 * rustix::param::page_size()).into())
        );
        assert!(lines.contains("\n * give_back ("), "{lines}");
    }
}

#[test]
fn a_function_is_never_the_place_with_not_place() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let (records, _) = gives_back(&["--summary=where", "--not-place", "give_back"], &["-O1"]);
    assert_eq!(
        of_kind(&records, "stack").count(),
        0,
        "stacks are listed with -k"
    );
    let rows = records.last().unwrap()["where"].as_array().unwrap();
    let names: Vec<&str> = rows
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    assert!(
        names.iter().any(|name| name.starts_with("main (")),
        "{names:?}"
    );
    assert!(
        names.iter().all(|name| !name.starts_with("give_back")),
        "{names:?}"
    );
}

#[test]
fn every_key_is_documented_and_every_documented_key_is_written() {
    let page = fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../docs/trace-json.md"
    ))
    .unwrap();
    // A unit test compares the kinds of this page with the list in the program.
    let row = page.lines().find(|line| line.starts_with("| `kind` |"));
    let kinds: Vec<&str> = row.unwrap().split('`').skip(3).step_by(2).collect();
    let mut documented: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let columns: Vec<&str> = line.split(" | ").collect();
        let key = columns[0].trim_matches(['|', ' ', '`']);
        let named: BTreeSet<&str> = columns[1].split('`').skip(1).step_by(2).collect();
        for kind in &kinds {
            if columns[1] == "all" || named.contains(kind) != columns[1].starts_with("all but") {
                documented.entry(kind).or_default().insert(key);
            }
        }
    }
    let everything = [
        "--details",
        "-k",
        "--births",
        "--summary=event,where,what,task,cause",
        "--lifecycle",
    ];
    let (_, records) = traced(
        &everything,
        "ls / > /dev/null; sh -c 'kill -9 $$'; echo done",
    );
    let mut written: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for record in &records {
        written
            .entry(kind(record))
            .or_default()
            .extend(record.as_object().unwrap().keys().map(String::as_str));
    }
    // The trace of no task ended before the task did.
    assert_eq!(
        documented.remove("detach"),
        Some(BTreeSet::from([
            "v", "t", "kind", "pid", "tid", "mm", "comm"
        ]))
    );
    assert_eq!(written, documented);
}
