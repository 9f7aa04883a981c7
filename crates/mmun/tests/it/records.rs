//! The content of a trace. `support::check` checks further rules on every trace.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use serde_json::Value;
use testkit::{Cap, require, rounds};

use crate::support::{kind, of_kind, scratch, text, trace, traced, within};

#[test]
fn the_example_of_the_front_page_runs() {
    let mut command = trace();
    command
        .args(["--", "ls", "-R", "."])
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = within("mmun trace", move || command.output().unwrap());
    assert!(output.status.success());
    assert!(
        text(&output.stdout).contains("./src:"),
        "the program's own output"
    );
    let records = text(&output.stderr);
    for word in [
        "mm_new",
        "get",
        "unmap",
        "munmap = 0",
        "put",
        "mm_release",
        "free",
    ] {
        assert!(records.contains(word), "{word}: {records}");
    }
    assert!(!records.contains('\x1b'), "colour without a terminal");
}

#[test]
fn a_family_of_processes_gets_puts_and_frees() {
    let (output, records) = traced(
        &[],
        "ls / > /dev/null; (cd /; ls > /dev/null) & wait; echo done",
    );
    assert!(output.status.success());
    assert_eq!(text(&output.stdout), "done\n");
    assert!(of_kind(&records, "fork").count() >= 2 && of_kind(&records, "exec").count() >= 2);
    assert!(of_kind(&records, "exit").all(|record| record["code"] == 0));
    let spaces: BTreeSet<u64> = of_kind(&records, "mm_new")
        .map(|record| record["mm"].as_u64().unwrap())
        .collect();
    for name in ["mm_release", "free"] {
        let seen: BTreeSet<u64> = of_kind(&records, name)
            .map(|record| record["mm"].as_u64().unwrap())
            .collect();
        assert_eq!(seen, spaces, "{name}");
    }
}

#[test]
fn keys_have_the_order_of_the_format() {
    let (_, records) = traced(&[], "ls / > /dev/null");
    for (name, keys) in [
        (
            "start",
            "v t kind pid tid mm event cause start end blockable address bytes comm",
        ),
        (
            "end",
            "v t kind pid tid mm event cause start end blockable address bytes result comm",
        ),
        ("get", "v t kind pid tid mm users comm"),
        ("put", "v t kind pid tid mm users comm"),
        ("free", "v t kind pid tid mm users comm"),
        ("mm_new", "v t kind pid tid mm comm program"),
        ("mm_release", "v t kind pid tid mm comm"),
        (
            "fork",
            "v t kind pid tid mm child_pid child_tid child_mm comm",
        ),
        ("exec", "v t kind pid tid mm old_mm comm program"),
        ("exit", "v t kind pid tid mm code comm"),
    ] {
        let record = of_kind(&records, name).next().unwrap();
        let shape: Vec<&str> = record
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(shape.join(" "), keys, "{name}");
    }
}

#[test]
fn addresses_are_page_aligned_hex_and_half_open() {
    let (_, records) = traced(&[], "ls / > /dev/null");
    let json = |number: u128| Value::from(u64::try_from(number).unwrap());
    let mut count = 0;
    for record in of_kind(&records, "start") {
        let address = |key: &str| {
            u128::from_str_radix(
                record[key].as_str().unwrap().strip_prefix("0x").unwrap(),
                16,
            )
            .unwrap()
        };
        assert!(
            address("start") < address("end")
                && address("start") % 4096 == 0
                && address("end") % 4096 == 0,
            "{record}"
        );
        assert_eq!(
            (&record["address"], &record["bytes"]),
            (
                &json(address("start")),
                &json(address("end") - address("start"))
            )
        );
        assert_eq!(record["blockable"], true);
        count += 1;
    }
    assert!(count > 0);
}

#[test]
fn a_filter_keeps_its_events_and_the_life_of_tasks() {
    let (_, all) = traced(&[], "ls / > /dev/null");
    let (_, some) = traced(&["-e", "protection_vma"], "ls / > /dev/null");
    let (_, others) = traced(&["-e", "!protection_vma"], "ls / > /dev/null");
    let events = |records: &[Value]| -> BTreeSet<String> {
        of_kind(records, "start")
            .map(|record| record["event"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(events(&some), BTreeSet::from(["protection_vma".to_owned()]));
    let mut rest = events(&all);
    assert!(rest.remove("protection_vma") && !rest.is_empty());
    assert_eq!(events(&others), rest);
    assert_eq!(of_kind(&some, "get").count(), of_kind(&all, "get").count());
}

#[test]
fn the_summary_is_the_sum_of_the_records() {
    let (_, records) = traced(
        &["--summary", "--lifecycle"],
        "ls / > /dev/null; (:) & wait",
    );
    let (summary, records) = records.split_last().unwrap();
    assert_eq!(kind(summary), "summary");
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    let mut pages: BTreeMap<&str, u64> = BTreeMap::new();
    for record in of_kind(records, "end") {
        let event = record["event"].as_str().unwrap();
        let address =
            |key: &str| u64::from_str_radix(&record[key].as_str().unwrap()[2..], 16).unwrap();
        *counts.entry(event).or_default() += 1;
        *pages.entry(event).or_default() += (address("end") - address("start")) / 4096;
    }
    let totals = summary["events"].as_object().unwrap();
    assert_eq!(totals.len(), counts.len());
    for (event, total) in totals {
        assert_eq!(
            (&total["count"], &total["pages"]),
            (
                &counts[event.as_str()].into(),
                &pages[event.as_str()].into()
            ),
            "{event}"
        );
        assert!(total["ns"].as_u64().unwrap() > 0 && total["errors"] == 0);
    }
    assert!(!summary["processes"].as_array().unwrap().is_empty());
    for process in summary["processes"].as_array().unwrap() {
        for name in ["get", "put", "free"] {
            let count = of_kind(records, name)
                .filter(|record| record["pid"] == process["pid"])
                .count();
            assert_eq!(process[name], count, "{name} of {process}");
        }
    }
}

#[test]
fn a_summary_alone_has_no_records() {
    let (_, records) = traced(&["--summary-only"], "ls / > /dev/null");
    assert_eq!(records.iter().map(kind).collect::<Vec<_>>(), ["summary"]);
    let mut command = trace();
    command.args(["--summary-only", "ls", "/"]);
    let output = within("mmun trace", move || command.output().unwrap());
    let table = text(&output.stderr);
    assert!(
        table.starts_with("event ") && table.contains("\ntotal "),
        "{table}"
    );
    assert!(
        table.contains("  where\n") && table.contains("  what lay there\n"),
        "{table}"
    );
    assert!(
        table.contains(" removed nothing.\n") && !table.contains("process"),
        "{table}"
    );
    assert!(
        !table.contains("stack 0"),
        "stacks are listed with -k: {table}"
    );
}

#[test]
fn children_are_followed_unless_told_not_to() {
    let pids = |records: &[Value]| {
        records
            .iter()
            .filter_map(|record| record["pid"].as_u64())
            .collect::<BTreeSet<u64>>()
            .len()
    };
    let script = "ls / > /dev/null; ls / > /dev/null; echo done";
    let (output, records) = traced(&["--no-follow"], script);
    assert_eq!((text(&output.stdout), pids(&records)), ("done\n", 1));
    let (_, records) = traced(&["-f"], script);
    assert_eq!(pids(&records), 3);
}

#[test]
fn every_call_stops_without_seccomp_and_the_trace_is_the_same() {
    let script = "ls / > /dev/null; exit 3";
    let (output, slow) = traced(&["--no-seccomp"], script);
    assert_eq!(output.status.code(), Some(3));
    let (_, fast) = traced(&[], script);
    let calls = |records: &[Value]| {
        of_kind(records, "end")
            .map(|record| record["cause"].to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(calls(&slow), calls(&fast));
}

#[test]
fn a_hundred_processes_at_once_lose_nothing() {
    let count = rounds(100);
    let script =
        format!("i=0; while [ $i -lt {count} ]; do ls / > /dev/null & i=$((i+1)); done; wait");
    let (output, records) = traced(&[], &script);
    assert!(output.status.success());
    assert_eq!(of_kind(&records, "exit").count(), count + 1);
    assert_eq!(of_kind(&records, "fork").count(), count);
}

#[test]
fn threads_share_an_address_space_and_its_notifier() {
    if !require(Cap::Program("python3")) {
        return;
    }
    let program = "\
import mmap, threading
barrier = threading.Barrier(64)
def work():
    barrier.wait()
    for _ in range(10):
        mmap.mmap(-1, 65536).close()
threads = [threading.Thread(target=work) for _ in range(64)]
for thread in threads: thread.start()
for thread in threads: thread.join()
";
    let path = scratch("threads.py");
    fs::write(&path, program).unwrap();
    let (output, records) = traced(&[], &format!("exec python3 {}", path.display()));
    fs::remove_file(&path).unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let most = of_kind(&records, "get")
        .map(|record| record["users"].as_u64().unwrap())
        .max();
    assert_eq!(most, Some(65));
    let unmaps = of_kind(&records, "end")
        .filter(|record| record["cause"] == "munmap" && record["result"] == 0)
        .count();
    assert!(unmaps >= 640, "{unmaps}");
}

#[test]
fn git_is_traced_with_its_children() {
    if !require(Cap::Program("git")) {
        return;
    }
    let folder = scratch("repository");
    fs::create_dir(&folder).unwrap();
    // Ignore the user's settings, and a repository whose hook may run these tests.
    let script = format!(
        "unset $(git rev-parse --local-env-vars); export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1; \
         cd '{}' && git init -q . && echo 1 > file && git add file && \
         git -c user.name=a -c user.email=a@b.c commit -q -m first && git log --format=%s | cat",
        folder.display()
    );
    let (output, records) = traced(&[], &script);
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(text(&output.stdout), "first\n", "{}", text(&output.stderr));
    assert!(of_kind(&records, "exec").count() >= 5);
}

#[test]
fn a_compiler_is_traced_whole() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let source = scratch("main.c");
    fs::write(
        &source,
        "#include <stdio.h>\nint main(void) { puts(\"compiled\"); return 0; }\n",
    )
    .unwrap();
    let (source, program) = (
        source.display().to_string(),
        scratch("program").display().to_string(),
    );
    let (output, records) = traced(&[], &format!("gcc -O2 -o {program} {source} && {program}"));
    assert_eq!(text(&output.stdout), "compiled\n");
    assert!(
        of_kind(&records, "exec").count() >= 4,
        "the driver, the compiler, the assembler and the linker"
    );
    fs::remove_file(source).unwrap();
    fs::remove_file(program).unwrap();
}
