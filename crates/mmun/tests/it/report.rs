//! What is made of a recorded trace.

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
fn what_is_no_trace_is_refused_in_one_line() {
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
    // The trace itself is not written over.
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
