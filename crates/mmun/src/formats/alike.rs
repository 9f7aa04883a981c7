//! Chrome's format beside Perfetto's: both must show the same events of one trace.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::tests::{TRACE, by_another, recording};
use super::{chrome, perfetto};
use crate::recording::Recording;

/// An event, whichever format it was read from.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Shown {
    kind: char,
    name: String,
    category: String,
    began: u64,
    lasted: u64,
    pid: u64,
    tid: u64,
    details: BTreeMap<String, String>,
}

fn of_chrome(recording: &Recording) -> Vec<Shown> {
    let json: Json = serde_json::from_slice(&chrome::make(recording)).expect("JSON");
    let events = json["traceEvents"].as_array().expect("a list").iter();
    // Microseconds, which a float holds to the nanosecond.
    let time = |value: &Json| (value.as_f64().unwrap_or(0.0) * 1000.0).round() as u64;
    let text = |value: &Json| value.as_str().unwrap_or_default().to_owned();
    let detail = |value: &Json| value.as_str().map_or(value.to_string(), str::to_owned);
    let details = |args: &Json| -> BTreeMap<String, String> {
        let args = args.as_object().expect("details").iter();
        args.map(|(key, value)| (key.clone(), detail(value)))
            .collect()
    };
    let shown = |event: &Json| Shown {
        kind: text(&event["ph"]).chars().next().expect("a kind"),
        name: text(&event["name"]),
        category: text(&event["cat"]),
        began: time(&event["ts"]),
        lasted: time(&event["dur"]),
        pid: event["pid"].as_u64().expect("a process"),
        tid: event["tid"].as_u64().expect("a task"),
        details: details(&event["args"]),
    };
    let mut all: Vec<Shown> = events
        .map(shown)
        .filter(|event| event.kind != 'M')
        .collect();
    all.sort();
    all
}

fn of_perfetto(recording: &Recording) -> Vec<Shown> {
    let mut events = perfetto::read_back(&perfetto::make(recording));
    // Perfetto also has a track for the life of each address space, and Chrome's format has none.
    // So the events of these tracks are left out here; counters of returned memory (4) stay. Both
    // formats also show each step of that life as an instant event of a task.
    events.retain(|event| event.tid.is_some() || event.kind == 4);
    let mut all: Vec<Shown> = Vec::new();
    let mut open: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for event in events {
        if event.kind == 2 {
            let began = open.get_mut(&event.track).and_then(Vec::pop);
            let began = &mut all[began.expect("it began")];
            began.lasted = event.t - began.began;
            continue;
        }
        if event.kind == 1 {
            open.entry(event.track).or_default().push(all.len());
        }
        let mut details = event.details;
        if event.kind == 4 {
            details.insert("bytes".into(), event.counter.to_string());
        }
        all.push(Shown {
            kind: [' ', 'X', ' ', 'i', 'C'][event.kind as usize],
            name: event.name,
            category: event.category,
            began: event.t,
            lasted: 0,
            pid: event.pid,
            tid: event.tid.unwrap_or(event.pid),
            details,
        });
    }
    all.sort();
    all
}

/// A call of two ranges, a fork, an execution, and a death by signal.
const MORE: &str = r#"{"v":1,"t":6000,"kind":"fork","pid":7,"tid":8,"mm":1,"child_pid":9,"child_tid":9,"child_mm":2,"comm":"a"}
{"v":1,"t":6001,"kind":"mm_new","pid":9,"tid":9,"mm":2,"comm":"a"}
{"v":1,"t":6002,"kind":"exec","pid":9,"tid":9,"mm":2,"old_mm":1,"comm":"b","program":"/bin/b"}
{"v":1,"t":6100,"kind":"start","pid":9,"tid":9,"mm":2,"event":"clear","cause":"madvise","start":"0x1000","end":"0x2000","blockable":true,"resident":4096,"swapped":8192,"what":"[heap]"}
{"v":1,"t":6105,"kind":"start","pid":9,"tid":9,"mm":2,"event":"clear","cause":"madvise","start":"0x8000","end":"0x9000","blockable":true}
{"v":1,"t":6203,"kind":"end","pid":9,"tid":9,"mm":2,"event":"clear","cause":"madvise","start":"0x8000","end":"0x9000","blockable":true,"result":0}
{"v":1,"t":6209,"kind":"end","pid":9,"tid":9,"mm":2,"event":"clear","cause":"madvise","start":"0x1000","end":"0x2000","blockable":true,"result":0,"self":77}
{"v":1,"t":6300,"kind":"exit","pid":9,"tid":9,"mm":2,"signal":9,"comm":"b"}
"#;

#[test]
fn chrome_and_perfetto_show_the_same_events() {
    let stack = TRACE.find(r#"{"v":1,"t":5000"#).expect("its stack");
    let stack_last = TRACE[stack..].replace(r#""t":5000"#, r#""t":7000"#);
    let more = [&TRACE[..stack], MORE, &stack_last].concat();
    let more = Recording::read(more.as_bytes()).expect("it is a trace");
    for (recording, count) in [(recording(), 7), (by_another(), 7), (more, 14)] {
        let (chrome, perfetto) = (of_chrome(&recording), of_perfetto(&recording));
        assert_eq!(chrome.len(), count, "{chrome:#?}");
        assert_eq!(chrome, perfetto);
    }
}
