//! Recorded traces in the formats of viewers, and comparisons of two traces.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use testkit::PYTHON;

use crate::support::{by_default, of_kind, parse, scratch, text, trace, within};

fn mmun(args: &[&str], files: &[&Path]) -> Output {
    let mut command = by_default(env!("CARGO_BIN_EXE_mmun"));
    command.args(args).args(files);
    within("mmun", move || command.output().unwrap())
}

/// A trace of `sh -c script`, and its records.
fn recorded(script: &str) -> (PathBuf, Vec<Value>) {
    let path = scratch("run.jsonl");
    let mut command = trace();
    command
        .args(["--json", "-k", "--births", "-o"])
        .arg(&path)
        .args(["--", "sh", "-c", script]);
    let output = within("mmun trace", move || command.output().unwrap());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let records = parse(&fs::read_to_string(&path).unwrap());
    (path, records)
}

/// Imports Google's definition of the format.
const IMPORTS: &str = "\
from google.protobuf.unknown_fields import UnknownFieldSet
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb
";

/// Prints the content of a trace, one event a line.
const READ: &str = "\
import sys, json
trace = pb.Trace()
trace.ParseFromString(open(sys.argv[1], 'rb').read())
tracks = {}
for packet in trace.packet:
    assert not len(UnknownFieldSet(packet))
    if packet.HasField('track_descriptor'):
        track = packet.track_descriptor
        assert track.uuid not in tracks
        assert not track.HasField('parent_uuid') or track.parent_uuid in tracks
        tracks[track.uuid] = (track.process.pid, track.process.process_name) if track.HasField('process') else \\
            (track.thread.pid, track.thread.tid, track.thread.thread_name) if track.HasField('thread') else track.name
        continue
    event = packet.track_event
    assert not len(UnknownFieldSet(event))
    kind = pb.TrackEvent.Type.Name(event.type)
    said = {one.name: one.string_value or one.int_value for one in event.debug_annotations}
    print(json.dumps([packet.timestamp, kind, tracks[event.track_uuid], event.name, said, event.counter_value]))
";

#[test]
fn perfetto_reads_the_format() {
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("python");
    let python = || {
        let mut command = Command::new(PYTHON);
        command.env("PYTHONPATH", &library);
        command
    };
    let has_perfetto = python()
        .args(["-c", IMPORTS])
        .output()
        .is_ok_and(|done| done.status.success());
    if !has_perfetto {
        println!(
            "SKIP viewers::perfetto: {PYTHON} has no module perfetto that works; a reader of the unit tests' own has read it"
        );
        return;
    }
    let (path, records) = recorded("ls / > /dev/null; echo");
    let out = scratch("run.pftrace");
    let done = mmun(
        &[
            "report",
            "--format",
            "perfetto",
            "-o",
            out.to_str().unwrap(),
        ],
        &[&path],
    );
    assert!(done.status.success(), "{}", text(&done.stderr));
    let program = [IMPORTS, READ].concat();
    let read = python().args(["-c", &program]).arg(&out).output().unwrap();
    assert!(read.status.success(), "{}", text(&read.stderr));
    let events = parse(text(&read.stdout));
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    events
        .iter()
        .for_each(|event| *kinds.entry(event[1].as_str().unwrap()).or_default() += 1);
    let count = |kind| of_kind(&records, kind).count();
    assert_eq!(kinds["TYPE_SLICE_BEGIN"], kinds["TYPE_SLICE_END"]);
    assert_eq!(
        kinds["TYPE_SLICE_BEGIN"],
        count("start") + count("mm_new"),
        "a slice a range and an address space"
    );
    for start in of_kind(&records, "start") {
        let is_it = |event: &&Value| event[0] == start["t"] && event[1] == "TYPE_SLICE_BEGIN";
        let event = events
            .iter()
            .find(is_it)
            .unwrap_or_else(|| panic!("{start} is not there"));
        assert_eq!(
            (&event[2][0], &event[2][1], &event[3]),
            (&start["pid"], &start["tid"], &start["cause"])
        );
        assert_eq!(
            (&event[4]["bytes"], &event[4]["what"]),
            (&start["bytes"], &start["what"])
        );
        let stack = of_kind(&records, "stack")
            .find(|stack| stack["site"] == start["site"])
            .unwrap();
        assert!(
            event[4]["stack"]
                .as_str()
                .unwrap()
                .contains(stack["frames"][0]["function"].as_str().unwrap())
        );
    }
    fs::remove_file(path).unwrap();
    fs::remove_file(out).unwrap();
}

#[test]
fn chrome_has_every_range_and_step() {
    let (path, records) = recorded("ls / > /dev/null; echo");
    let done = mmun(&["report", "--format", "chrome"], &[&path]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let json: Value = serde_json::from_slice(&done.stdout).unwrap();
    let events = json["traceEvents"].as_array().unwrap();
    let of = |kind: &str| events.iter().filter(|event| event["ph"] == kind).count();
    let count = |kind| of_kind(&records, kind).count();
    assert_eq!(of("X"), count("start"));
    let steps = [
        "mm_new",
        "get",
        "put",
        "free",
        "fork",
        "exec",
        "exit",
        "mm_release",
        "map",
    ];
    assert_eq!(of("i"), steps.into_iter().map(count).sum::<usize>());
    fs::remove_file(path).unwrap();
}

#[test]
fn a_trace_is_written_for_a_viewer_at_its_end() {
    for format in ["chrome", "perfetto"] {
        let (out, folder) = (scratch("run.trace"), scratch("spool"));
        fs::create_dir(&folder).unwrap();
        fs::write(
            &out,
            "what was there before, and is longer than any ".repeat(100_000),
        )
        .unwrap();
        let run = |options: &[&str]| {
            let mut command = trace();
            command.args(["--format", format]).args(options).args([
                "--",
                "sh",
                "-c",
                "ls / > /dev/null; exit 3",
            ]);
            command.env("TMPDIR", &folder);
            within("mmun trace", move || command.output().unwrap())
        };
        let done = run(&["-k", "--summary=event", "-o", out.to_str().unwrap()]);
        assert_eq!(done.status.code(), Some(3), "{}", text(&done.stderr));
        assert!(
            text(&done.stderr).starts_with("event ")
                && text(&done.stderr).ends_with("removed nothing.\n")
        );
        let bytes = fs::read(&out).unwrap();
        if format == "chrome" {
            let json: Value = serde_json::from_slice(&bytes).unwrap();
            let calls = json["traceEvents"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|event| event["ph"] == "X");
            assert!(
                calls
                    .filter(|call| call["args"]["where"].is_string())
                    .count()
                    > 10
            );
        } else {
            // 0x0a is the tag of a packet. Some packet has the name of a call.
            assert!(
                bytes.starts_with(&[0x0a]) && bytes.windows(6).any(|window| window == b"munmap")
            );
        }
        assert_eq!(
            fs::read_dir(&folder).unwrap().count(),
            0,
            "no record is left behind"
        );
        // A full disk loses nothing.
        let full = run(&["-o", "/dev/full"]);
        let line = text(&full.stderr);
        assert!(
            line.lines().count() == 1 && line.contains("mmun report --format"),
            "{line}"
        );
        let spool = fs::read_dir(&folder)
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        assert!(mmun(&["report"], &[&spool]).status.success());
        let without = run(&[]);
        assert_eq!(
            (without.status.code(), text(&without.stderr).lines().count()),
            (Some(125), 1)
        );
        assert!(
            text(&without.stderr).contains("--output"),
            "{}",
            text(&without.stderr)
        );
        fs::remove_dir_all(folder).unwrap();
        fs::remove_file(out).unwrap();
    }
}

#[test]
fn two_runs_are_compared_by_place() {
    let (once, _) = recorded("ls / > /dev/null; echo");
    let (twice, _) = recorded("ls / > /dev/null; ls / > /dev/null; echo");
    let same = mmun(
        &["diff", "--json", "--sort", "calls", "--top", "100000"],
        &[&once, &once],
    );
    for pair in parse(text(&same.stdout)) {
        assert_eq!(pair["before"], pair["after"]);
    }
    let done = mmun(
        &["diff", "--json", "--sort", "calls", "--top", "100000"],
        &[&once, &twice],
    );
    assert_eq!((done.status.code(), text(&done.stderr)), (Some(0), ""));
    let pairs = parse(text(&done.stdout));
    let calls = |pair: &Value, run: &str| pair[run]["calls"].as_i64().unwrap_or(0);
    let changes: Vec<i64> = pairs
        .iter()
        .map(|pair| calls(pair, "after") - calls(pair, "before"))
        .collect();
    assert!(
        changes[0] > 0 && changes.iter().map(|change| change.abs()).rev().is_sorted(),
        "{changes:?}"
    );
    let table = mmun(&["diff", "--sort", "calls", "--top", "1"], &[&once, &twice]);
    let lines: Vec<&str> = text(&table.stdout).lines().collect();
    assert!(
        lines[0].ends_with("  where") && lines[1].contains(&format!("+{}", changes[0])),
        "{lines:?}"
    );
    assert!(
        lines[2].ends_with("  total") && lines.last().unwrap().contains(" new, "),
        "{lines:?}"
    );
    let none = mmun(&["diff"], &[&once, Path::new("/nonexistent")]);
    assert_eq!(
        (none.status.code(), text(&none.stderr).lines().count()),
        (Some(2), 1)
    );
    fs::remove_file(once).unwrap();
    fs::remove_file(twice).unwrap();
}
