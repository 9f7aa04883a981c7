//! A recorded trace in the formats of trace viewers: the parts that Chrome's and Perfetto's format
//! share.

#[cfg(test)]
mod alike;
mod chrome;
mod perfetto;

use std::collections::BTreeMap;

use mmu_source::process::ExitStatus;

use crate::events;
use crate::intern::Name;
use crate::record::Kind;
use crate::recording::{Born, Changed, Lived, Recording};

pub(crate) use self::chrome::make as chrome;
pub(crate) use self::perfetto::make as perfetto;

/// A detail of an event: its name and value.
type Detail = (&'static str, Value);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Text(String),
    Number(i64),
}

/// The maximum number of frames in an event's stack.
const DEEPEST: usize = 32;

/// The name of a change, and its details.
fn change(recording: &Recording, changed: &Changed) -> (&'static str, Vec<Detail>) {
    let Changed { change, mm, .. } = changed;
    let (start, end) = (change.span.start(), change.span.end());
    let mut details = vec![
        ("event", Value::Text(change.span.event_name().into())),
        ("range", Value::Text(format!("{start:#x}-{end:#x}"))),
        ("bytes", number(change.bytes())),
        ("mm", number(*mm)),
    ];
    details.extend(
        change
            .result
            .map(|result| ("result", Value::Number(result))),
    );
    details.extend(
        change
            .seen
            .what
            .map(|what| ("what", Value::Text(recording.names.text(what).into()))),
    );
    if let Some(pages) = change.seen.pages {
        details.push(("resident", number(pages.resident)));
        details.extend((pages.swapped > 0).then(|| ("swapped", number(pages.swapped))));
    }
    details.extend(change.own.map(|own| ("self_ns", number(own))));
    details.extend(site(recording, change.seen.site));
    (change.span.cause, details)
}

/// The place of a call, and its stack.
fn site(recording: &Recording, site: Option<u32>) -> Vec<Detail> {
    let Some(stack) = recording.stacks.get(site) else {
        return Vec::new();
    };
    let frames: Vec<String> = stack
        .frames
        .iter()
        .take(DEEPEST)
        .map(|frame| frame.text())
        .collect();
    vec![
        ("where", Value::Text(stack.place())),
        ("stack", Value::Text(frames.join("\n"))),
    ]
}

/// The details of a step in the life of a task or an address space.
fn life(lived: &Lived) -> Vec<Detail> {
    let pid = |value: i32| Value::Number(value.into());
    let mut details = vec![("mm", number(lived.record.mm))];
    match lived.record.kind {
        Kind::Get { users } | Kind::Put { users } => details.push(("users", number(users.into()))),
        Kind::Fork { child, child_mm } => {
            details.extend([("child_pid", pid(child.pid)), ("child_tid", pid(child.tid))]);
            details.push(("child_mm", number(child_mm)));
        }
        Kind::Exec { old_mm } => details.push(("old_mm", number(old_mm))),
        Kind::Exit(ExitStatus::Code(code)) => details.push(("code", pid(code))),
        Kind::Exit(ExitStatus::Signal(signal)) => details.push(("signal", pid(signal))),
        _ => {}
    }
    details
}

/// An integer that a viewer can show; a larger value is clamped.
fn number(value: u64) -> Value {
    Value::Number(i64::try_from(value).unwrap_or(i64::MAX))
}

/// Every task, with its name. If a task has changed its name, the name is from its last birth of a
/// mapping; without one, from its last change; without that, from its last step of life.
fn tasks(recording: &Recording) -> BTreeMap<(i32, i32), &str> {
    let mut tasks = BTreeMap::new();
    let mut add = |pid, tid, comm: Name| {
        let comm = recording.names.text(comm);
        let name = tasks.entry((pid, tid)).or_insert(comm);
        if !comm.is_empty() {
            *name = comm;
        }
    };
    for Lived {
        record: crate::record::Record { task, .. },
        comm,
        ..
    } in &recording.life
    {
        add(task.pid, task.tid, *comm);
    }
    for Changed { change, comm, .. } in &recording.changes {
        add(change.task.pid, change.task.tid, *comm);
    }
    for Born { task, comm, .. } in &recording.births {
        add(task.pid, task.tid, *comm);
    }
    tasks
}

/// The bytes that each address space has returned so far, at each increase: time, address space,
/// bytes.
fn given_back(recording: &Recording) -> Vec<(u64, u64, u64)> {
    let mut sums: BTreeMap<u64, u64> = BTreeMap::new();
    let mut steps = Vec::new();
    for Changed { change, mm, .. } in &recording.changes {
        let is_removal = matches!(change.span.event, events::UNMAP | events::CLEAR);
        let resident = change.resident();
        if is_removal && resident > 0 {
            let sum = sums.entry(*mm).or_default();
            *sum = sum.saturating_add(resident);
            steps.push((change.ended, *mm, *sum));
        }
    }
    steps
}

/// The name of an address space: its id, and the name of its first program, or of its first task if
/// the program is not known.
fn space_name(recording: &Recording, mm: u64) -> String {
    let Some(space) = recording.spaces.get(&mm) else {
        return format!("mm{mm}");
    };
    let program = recording.names.text(space.program);
    let name = program.rsplit('/').next().filter(|name| !name.is_empty());
    format!(
        "mm{mm} {}",
        name.unwrap_or_else(|| recording.names.text(space.comm))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A trace of two tasks, with a call of one range, a birth of a mapping and a stack.
    pub(super) const TRACE: &str = concat!(
        r#"{"v":1,"t":5,"kind":"mm_new","pid":7,"tid":7,"mm":1,"comm":"prog","program":"/bin/prog"}"#,
        "\n",
        r#"{"v":1,"t":6,"kind":"get","pid":7,"tid":7,"mm":1,"users":1,"comm":"prog"}"#,
        "\n",
        r#"{"v":1,"t":1500,"kind":"start","pid":7,"tid":8,"mm":1,"event":"unmap","cause":"munmap","start":"0x1000","end":"0x3000","blockable":true,"address":4096,"bytes":8192,"comm":"a\"b","what":"anonymous","resident":4096,"file":0,"huge":0,"swapped":0,"site":3}"#,
        "\n",
        r#"{"v":1,"t":2750,"kind":"end","pid":7,"tid":8,"mm":1,"event":"unmap","cause":"munmap","start":"0x1000","end":"0x3000","blockable":true,"address":4096,"bytes":8192,"result":0,"comm":"a\"b","self":300}"#,
        "\n",
        r#"{"v":1,"t":3000,"kind":"map","pid":7,"tid":7,"mm":1,"cause":"mmap","start":"0x5000","end":"0x6000","address":20480,"bytes":4096,"comm":"prog"}"#,
        "\n",
        r#"{"v":1,"t":4000,"kind":"exit","pid":7,"tid":7,"mm":1,"code":0,"comm":"prog"}"#,
        "\n",
        r#"{"v":1,"t":4001,"kind":"mm_release","pid":7,"tid":7,"mm":1,"comm":"prog"}"#,
        "\n",
        r#"{"v":1,"t":5000,"kind":"stack","site":3,"place":1,"frames":[{"function":"munmap","module":"libc.so.6","line":"","named":true},{"function":"main","module":"prog","line":"a.c:3","named":true}]}"#,
        "\n"
    );

    pub(super) fn recording() -> Recording {
        Recording::read(TRACE.as_bytes()).expect("it is a trace")
    }

    /// The same trace, but a `vfork` child made the mapping.
    pub(super) fn by_another() -> Recording {
        let map = r#""t":3000,"kind":"map","pid":7,"tid":7,"#;
        let text = TRACE.replace(map, r#""t":3000,"kind":"map","pid":9,"tid":9,"#);
        Recording::read(text.as_bytes()).expect("it is a trace")
    }

    #[test]
    fn a_change_has_its_known_details() {
        let recording = recording();
        let (name, details) = change(&recording, &recording.changes[0]);
        assert_eq!(name, "munmap");
        let said = |key| {
            details
                .iter()
                .find(|(name, _)| *name == key)
                .map(|(_, value)| value.clone())
        };
        assert_eq!(said("range"), Some(Value::Text("0x1000-0x3000".into())));
        assert_eq!(
            (said("resident"), said("self_ns")),
            (Some(Value::Number(4096)), Some(Value::Number(300)))
        );
        assert_eq!(said("where"), Some(Value::Text("main (prog a.c:3)".into())));
        assert_eq!(
            said("stack"),
            Some(Value::Text("munmap (libc.so.6)\nmain (prog a.c:3)".into()))
        );
        assert_eq!(said("swapped"), None);
        assert_eq!(given_back(&recording), [(2750, 1, 4096)]);
        assert_eq!(space_name(&recording, 1), "mm1 prog");
        assert_eq!(
            tasks(&recording).into_iter().collect::<Vec<_>>(),
            [((7, 7), "prog"), ((7, 8), "a\"b")]
        );
    }
}
