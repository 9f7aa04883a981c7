//! Reports of a recorded trace.

use std::fs;
use std::path::Path;
use std::process::Output;

use crate::support::{by_default, of_kind, parse, scratch, text, trace, within};

/// Runs `mmun` with these arguments.
fn mmun(args: &[&str], file: &Path) -> Output {
    let mut command = by_default(env!("CARGO_BIN_EXE_mmun"));
    command.args(args).arg(file);
    within("mmun", move || command.output().unwrap())
}

#[test]
fn a_recorded_trace_has_the_summary_of_the_run() {
    let path = scratch("run.jsonl");
    let mut command = trace();
    command
        .args([
            "--json",
            "-k",
            "--births",
            "--summary=event,where,what,task,cause",
            "-o",
        ])
        .arg(&path);
    command.args(["--", "sh", "-c", "ls / > /dev/null; echo"]);
    let output = within("mmun trace", move || command.output().unwrap());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let records = parse(&fs::read_to_string(&path).unwrap());
    let summary = records.last().unwrap();
    let report = mmun(
        &["report", "--summary=event,cause,where", "--top", "1000"],
        &path,
    );
    assert!(report.status.success(), "{}", text(&report.stderr));
    let table = text(&report.stdout);
    for (name, row) in summary["events"].as_object().unwrap() {
        let line = table
            .lines()
            .find(|line| line.starts_with(&format!("{name} ")))
            .unwrap();
        assert_eq!(
            line.split_whitespace().nth(1),
            Some(row["calls"].to_string().as_str()),
            "{line}"
        );
    }
    for key in ["where", "cause"] {
        for row in summary[key].as_array().unwrap() {
            assert!(
                table.contains(&format!("  {}\n", row["name"].as_str().unwrap())),
                "{row} in {table}"
            );
        }
    }
    for map in of_kind(&records, "map") {
        assert!(
            map["what"].is_string() && map["site"].is_u64() && map["bytes"].as_u64() > Some(0),
            "{map}"
        );
    }
    let libc =
        of_kind(&records, "map").filter(|map| map["what"].as_str().unwrap().contains("libc"));
    assert!(libc.count() >= 2, "each of two programs maps its C library");
    fs::remove_file(path).unwrap();
}

#[test]
fn a_file_that_is_not_a_trace_is_refused_in_one_line() {
    let path = scratch("bad.jsonl");
    for bytes in [
        &b"\x7fELF\0\0\n"[..],
        b"",
        b"{\"v\":1,\"t\":0,\"kind\":\"get\"}\n",
        &[0xff; 100],
    ] {
        fs::write(&path, bytes).unwrap();
        let output = mmun(&["report"], &path);
        let line = text(&output.stderr);
        assert_eq!(
            (output.status.code(), line.lines().count()),
            (Some(2), 1),
            "{line}"
        );
        assert!(
            line.starts_with("mmun: read on ") && line.contains("mmun trace --json"),
            "{line}"
        );
        assert!(output.stdout.is_empty());
    }
    fs::remove_file(&path).unwrap();
    assert!(text(&mmun(&["report"], &path).stderr).contains("No such file"));
}

/// A trace of one process that did nothing.
const SMALL: &str =
    r#"{"v":1,"t":5,"kind":"mm_new","pid":7,"tid":7,"mm":1,"comm":"prog","program":"/bin/prog"}"#;

#[test]
fn a_report_that_cannot_be_written_leaves_its_file_as_it_was() {
    let (path, page) = (scratch("small.jsonl"), scratch("old.html"));
    fs::write(&path, SMALL).unwrap();
    fs::write(&page, "what it held").unwrap();
    let limited = "trap '' XFSZ; ulimit -f 16; exec \"$0\" report --format html -o \"$1\" \"$2\"";
    let mut command = by_default("sh");
    command
        .args(["-c", limited, env!("CARGO_BIN_EXE_mmun")])
        .args([&page, &path]);
    let output = within("mmun report", move || command.output().unwrap());
    let line = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{line}");
    assert!(
        line.starts_with("mmun: write on ") && line.contains("File too large"),
        "{line}"
    );
    assert_eq!(fs::read_to_string(&page).unwrap(), "what it held");
    // The trace itself is not overwritten.
    let output = mmun(&["report", "-o", path.to_str().unwrap()], &path);
    let line = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{line}");
    assert!(line.contains("it is the trace"), "{line}");
    assert_eq!(fs::read_to_string(&path).unwrap(), SMALL);
    fs::remove_file(path).unwrap();
    fs::remove_file(page).unwrap();
}

#[test]
fn totals_alone_cannot_be_compared() {
    let path = scratch("totals.jsonl");
    let mut command = trace();
    command.args(["--json", "--summary-only", "-o"]).arg(&path);
    command.args(["--", "true"]);
    let output = within("mmun trace", move || command.output().unwrap());
    assert!(output.status.success(), "{}", text(&output.stderr));
    for args in [&["diff", path.to_str().unwrap()][..], &["report"]] {
        let output = mmun(args, &path);
        let line = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(line.contains(": no records: "), "{line}");
    }
    fs::remove_file(path).unwrap();
}

/// One unmap whose stack may lack frames, and a fork that copies the heap and one further page.
const CHANGES: &str = r#"{"v":1,"t":1,"kind":"mm_new","pid":7,"tid":7,"mm":1,"comm":"prog","program":"/bin/prog"}
{"v":1,"t":2,"kind":"start","pid":7,"tid":7,"mm":1,"event":"unmap","cause":"munmap","start":"0x1000","end":"0x2000","blockable":true,"what":"anonymous","resident":4096,"site":0}
{"v":1,"t":3,"kind":"end","pid":7,"tid":7,"mm":1,"event":"unmap","cause":"munmap","start":"0x1000","end":"0x2000","blockable":true,"result":0,"self":7000}
{"v":1,"t":4,"kind":"start","pid":7,"tid":7,"mm":1,"event":"protection_page","cause":"fork","start":"0x3000","end":"0x4000","blockable":true,"what":"/bin/prog","resident":0,"site":0}
{"v":1,"t":5,"kind":"start","pid":7,"tid":7,"mm":1,"event":"protection_page","cause":"fork","start":"0x8000","end":"0x10000","blockable":true,"what":"[heap]","resident":32768,"site":0}
{"v":1,"t":6,"kind":"end","pid":7,"tid":7,"mm":1,"event":"protection_page","cause":"fork","start":"0x8000","end":"0x10000","blockable":true,"result":8}
{"v":1,"t":7,"kind":"end","pid":7,"tid":7,"mm":1,"event":"protection_page","cause":"fork","start":"0x3000","end":"0x4000","blockable":true,"result":8,"self":93000}
{"v":1,"t":8,"kind":"stack","site":0,"place":0,"partial":true,"frames":[{"function":"f","module":"prog","line":"","named":true}]}
"#;

#[test]
fn the_time_of_a_fork_is_divided_by_memory() {
    let path = scratch("fork.jsonl");
    fs::write(&path, CHANGES).unwrap();
    let output = mmun(&["report", "--summary=what"], &path);
    let table = text(&output.stdout);
    let row = |what: &str| {
        let line = table.lines().find(|line| line.ends_with(what));
        let line = line.unwrap_or_else(|| panic!("{what}: {table}"));
        line.split_whitespace()
            .take(4)
            .collect::<Vec<_>>()
            .join(" ")
    };
    let rows = ["[heap]", "anonymous", "/bin/prog"].map(row);
    assert_eq!(rows, ["93 us 93 1", "7.0 us 7 1", "3 ns 0 1"], "{table}");
    assert!(
        table.contains("Frames may be missing in 1 stacks"),
        "{table}"
    );
    fs::remove_file(path).unwrap();
}

#[test]
fn a_dash_is_standard_input_and_output() {
    let (path, page) = (scratch("dash.jsonl"), scratch("dash.html"));
    fs::write(&path, CHANGES).unwrap();
    let run = |args: &[&str]| {
        let mut command = by_default(env!("CARGO_BIN_EXE_mmun"));
        command.args(args).stdin(fs::File::open(&path).unwrap());
        within("mmun", move || command.output().unwrap())
    };
    let name = path.to_str().unwrap();
    let table = run(&["report", name]).stdout;
    assert!(!table.is_empty());
    for args in [
        &["report", "-"][..],
        &["report", "-o", "-", name],
        &["report", "-o", "-", "-"],
    ] {
        assert_eq!(run(args).stdout, table, "{args:?}");
    }
    let made = run(&["report", "-o", page.to_str().unwrap(), "-"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    assert!(fs::read(&page).unwrap().starts_with(b"<!doctype html>"));
    let same = run(&["diff", "-", name]);
    assert!(text(&same.stdout).contains("0 new, 0 gone"));
    let both = run(&["diff", "-", "-"]);
    assert_eq!(both.status.code(), Some(2));
    assert!(
        text(&both.stderr).contains("only one"),
        "{}",
        text(&both.stderr)
    );
    let traced = run(&["trace", "--json", "-o", "-", "true"]);
    assert_eq!(text(&traced.stderr), "");
    assert!(of_kind(&parse(text(&traced.stdout)), "exit").count() == 1);
    let chrome = run(&["trace", "--format", "chrome", "-o", "-", "true"]);
    assert!(chrome.stdout.starts_with(b"{"), "{}", text(&chrome.stdout));
    let twice = run(&["trace", "--report", "-", "-o", "-", "true"]);
    assert_eq!(twice.status.code(), Some(125), "{}", text(&twice.stderr));
    assert!(!Path::new("-").exists());
    fs::remove_file(path).unwrap();
    fs::remove_file(page).unwrap();
}

#[test]
fn a_trace_without_a_change_is_reported() {
    let page = scratch("none.html");
    let mut command = trace();
    command
        .args(["-e", "migrate", "--summary", "--report"])
        .arg(&page)
        .arg("true");
    let output = within("mmun trace", move || command.output().unwrap());
    assert!(
        text(&output.stderr).ends_with("No change was recorded.\n"),
        "{}",
        text(&output.stderr)
    );
    let made = fs::read_to_string(&page).unwrap();
    assert!(made.contains("<title>mmun: true</title>"));
    fs::remove_file(page).unwrap();
}
