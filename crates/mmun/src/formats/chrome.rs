//! The JSON of Chrome's `about:tracing`, which Perfetto and others read as well.
//!
//! Source: the Trace Event Format, sections on complete, instant, counter and metadata events.

use std::io::Write as _;

use super::{Detail, Value, change, given_back, life, number, site, space_name, tasks};
use crate::digits::Put;
use crate::json;
use crate::recording::Recording;

/// One event a line.
pub(crate) fn make(recording: &Recording) -> Vec<u8> {
    let mut out = Vec::new();
    out.put("{\"displayTimeUnit\":\"ns\",\"traceEvents\":[");
    let mut comma = "\n";
    let mut event = |kind: &str, name: &str, pid: i32, tid: i32, write: &dyn Fn(&mut Vec<u8>)| {
        out.put(comma);
        comma = ",\n";
        out.put("{\"ph\":\"");
        out.put(kind);
        out.put("\",\"name\":");
        json::put_str(&mut out, name);
        out.put(",\"pid\":");
        out.put_int(pid.into());
        out.put(",\"tid\":");
        out.put_int(tid.into());
        write(&mut out);
        out.put("}");
    };
    for ((pid, tid), comm) in tasks(recording) {
        let name = [("name", Value::Text(comm.to_owned()))];
        if pid == tid {
            event("M", "process_name", pid, tid, &|out| args(out, &name));
        }
        event("M", "thread_name", pid, tid, &|out| args(out, &name));
    }
    for changed in &recording.changes {
        let (name, details) = change(recording, changed);
        let task = changed.change.task;
        event("X", name, task.pid, task.tid, &|out| {
            time(out, ",\"ts\":", changed.change.began);
            time(out, ",\"dur\":", changed.change.wall());
            category(out, changed.change.span.event_name());
            args(out, &details);
        });
    }
    for (t, mm, bytes) in given_back(recording) {
        let pid = recording.spaces.get(&mm).map_or(0, |space| space.pid);
        event(
            "C",
            &format!("given back, {}", space_name(recording, mm)),
            pid,
            pid,
            &|out| {
                time(out, ",\"ts\":", t);
                args(out, &[("bytes", number(bytes))]);
            },
        );
    }
    for born in &recording.births {
        let task = born.task;
        let mut details = vec![(
            "bytes",
            number(born.mapping.range.pages().saturating_mul(4096)),
        )];
        details.extend(site(recording, born.site));
        event("i", born.mapping.cause, task.pid, task.tid, &|out| {
            time(out, ",\"s\":\"t\",\"ts\":", born.t);
            category(out, "map");
            args(out, &details);
        });
    }
    for lived in &recording.life {
        let task = lived.record.task;
        event(
            "i",
            lived.record.kind.of_line().name(),
            task.pid,
            task.tid,
            &|out| {
                time(out, ",\"s\":\"t\",\"ts\":", lived.t);
                category(out, "life");
                args(out, &life(lived));
            },
        );
    }
    out.put("\n]}\n");
    out
}

/// Writes a time in microseconds, with three decimals.
fn time(out: &mut Vec<u8>, key: &str, ns: u64) {
    out.put(key);
    // Writing to memory cannot fail.
    let _ = write!(out, "{}.{:03}", ns / 1000, ns % 1000);
}

fn category(out: &mut Vec<u8>, name: &str) {
    out.put(",\"cat\":\"");
    out.put(name);
    out.put("\"");
}

fn args(out: &mut Vec<u8>, details: &[Detail]) {
    out.put(",\"args\":");
    let mut comma = "{";
    for (key, value) in details {
        out.put(comma);
        comma = ",";
        json::put_str(out, key);
        out.put(":");
        match value {
            Value::Text(text) => json::put_str(out, text),
            Value::Number(number) => out.put_int(*number),
        }
    }
    out.put("}");
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::tests::{by_another, recording};

    #[test]
    fn a_mapping_is_shown_at_the_task_that_made_it() {
        let json: Value = serde_json::from_slice(&super::make(&by_another())).unwrap();
        let events = json["traceEvents"].as_array().unwrap();
        let born = events.iter().find(|event| event["cat"] == "map").unwrap();
        assert_eq!((&born["pid"], &born["tid"]), (&9.into(), &9.into()));
    }

    #[test]
    fn every_event_is_there_with_its_times() {
        let json: Value = serde_json::from_slice(&super::make(&recording())).unwrap();
        let events = json["traceEvents"].as_array().unwrap();
        let of = |kind: &str| {
            events
                .iter()
                .filter(|event| event["ph"] == kind)
                .collect::<Vec<_>>()
        };
        let [call] = of("X")[..] else {
            panic!("{json}")
        };
        assert_eq!(
            (&call["name"], &call["cat"], &call["tid"]),
            (&"munmap".into(), &"unmap".into(), &8.into())
        );
        assert_eq!((&call["ts"], &call["dur"]), (&1.5.into(), &1.25.into()));
        assert_eq!(call["args"]["where"], "main (prog a.c:3)");
        assert_eq!(of("C")[0]["args"]["bytes"], 4096);
        let names: Vec<&Value> = of("i").into_iter().map(|event| &event["name"]).collect();
        assert_eq!(names, ["mmap", "mm_new", "get", "exit", "mm_release"]);
        let named = of("M")
            .into_iter()
            .any(|event| event["args"]["name"] == "a\"b" && event["tid"] == 8);
        assert!(named, "{json}");
    }
}
