//! Totals of a trace: per event, and per process.

use std::fs;
use std::io::Write as _;

use mmu_source::process::{Pid, Task};

use crate::digits::Put;
use crate::events;
use crate::json;
use crate::record::{Kind, Record, Span};
use crate::text::put_time;

/// Counts as records pass by.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    events: [Event; events::NAMES.len()],
    /// In the order in which they appeared.
    processes: Vec<Process>,
    open: Vec<(Task, u64, Span, u64)>,
}

#[derive(Clone, Debug, Default)]
struct Event {
    count: u64,
    errors: u64,
    pages: u64,
    ns: u64,
}

#[derive(Debug)]
struct Process {
    pid: Pid,
    name: String,
    get: u64,
    put: u64,
    free: u64,
}

impl Summary {
    pub(crate) fn add(&mut self, t: u64, record: &Record) {
        match record.kind {
            Kind::Start(span) => self.open.push((record.task, record.mm, span, t)),
            Kind::End(span, result) => self.close(t, record, &span, result),
            Kind::Get { .. } => self.process(record.task.pid).get += 1,
            Kind::Put { .. } => self.process(record.task.pid).put += 1,
            Kind::Free => self.process(record.task.pid).free += 1,
            Kind::Exec { .. } => {
                let process = self.process(record.task.pid);
                process.name = name(process.pid);
            }
            Kind::Fork { child, .. } if child.pid != record.task.pid => self.begin(child.pid),
            Kind::MmNew | Kind::MmRelease | Kind::Fork { .. } | Kind::Exit(_) | Kind::Detach => {}
        }
    }

    fn close(&mut self, t: u64, record: &Record, span: &Span, result: Option<i64>) {
        // The latest start is the likeliest; few are open at any time.
        let same =
            |open: &(Task, u64, Span, u64)| open.0.tid == record.task.tid && open.1 == record.mm && open.2 == *span;
        let Some(at) = self.open.iter().rposition(same) else { return };
        let (.., began) = self.open.swap_remove(at);
        let event = &mut self.events[span.event];
        event.count += 1;
        event.errors += u64::from(result.is_none_or(|result| (-4095..0).contains(&result)));
        event.pages = event.pages.saturating_add(span.range.pages());
        event.ns += t - began;
    }

    /// The latest process with this number.
    fn process(&mut self, pid: Pid) -> &mut Process {
        let at = self.processes.iter().rposition(|process| process.pid == pid).unwrap_or_else(|| {
            self.begin(pid);
            self.processes.len() - 1
        });
        &mut self.processes[at]
    }

    /// A new process, whoever had its number before.
    fn begin(&mut self, pid: Pid) {
        self.processes.push(Process { pid, name: name(pid), get: 0, put: 0, free: 0 });
    }

    /// Two tables.
    pub(crate) fn write_text(&self, out: &mut Vec<u8>) {
        // Writing to memory cannot fail.
        let _ = self.tables(out);
    }

    fn tables(&self, out: &mut Vec<u8>) -> std::io::Result<()> {
        writeln!(out, "{:<17}{:>10}{:>10}{:>14}{:>12}{:>12}", "event", "count", "errors", "pages", "time", "per call")?;
        let mut total = Event::default();
        for (name, event) in events::NAMES.iter().zip(&self.events).filter(|(_, event)| event.count > 0) {
            total.count += event.count;
            total.errors += event.errors;
            total.pages = total.pages.saturating_add(event.pages);
            total.ns += event.ns;
            event.row(out, name)?;
        }
        total.row(out, "total")?;
        writeln!(out, "\n{:>8}  {:<15}{:>10}{:>10}{:>10}", "process", "name", "get", "put", "free")?;
        for Process { pid, name, get, put, free } in &self.processes {
            writeln!(out, "{pid:>8}  {name:<15}{get:>10}{put:>10}{free:>10}")?;
        }
        Ok(())
    }

    /// One object with the keys every line has but no task: it is about all of them.
    pub(crate) fn write_json(&self, out: &mut Vec<u8>, t: u64) {
        json::head(out, t, "summary");
        out.put(",\"events\":{");
        let mut comma = "";
        for (name, event) in events::NAMES.iter().zip(&self.events).filter(|(_, event)| event.count > 0) {
            let Event { count, errors, pages, ns } = event;
            let _ = write!(
                out,
                "{comma}\"{name}\":{{\"count\":{count},\"errors\":{errors},\"pages\":{pages},\"ns\":{ns}}}"
            );
            comma = ",";
        }
        out.put("},\"processes\":[");
        comma = "";
        for Process { pid, get, put, free, .. } in &self.processes {
            let _ = write!(out, "{comma}{{\"pid\":{pid},\"get\":{get},\"put\":{put},\"free\":{free}}}");
            comma = ",";
        }
        out.put("]}\n");
    }
}

impl Event {
    fn row(&self, out: &mut Vec<u8>, name: &str) -> std::io::Result<()> {
        let Event { count, errors, pages, ns } = self;
        write!(out, "{name:<17}{count:>10}{errors:>10}{pages:>14}{:>12}", time(*ns))?;
        writeln!(out, "{:>12}", ns.checked_div(*count).map(time).unwrap_or_default())
    }
}

fn time(ns: u64) -> String {
    let mut out = Vec::new();
    put_time(&mut out, ns);
    String::from_utf8_lossy(&out).into_owned()
}

fn name(pid: Pid) -> String {
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    comm.trim_end().escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use mmu_notifier::{Blocking, Va, VaRange};

    use super::*;

    const TASK: Task = Task { pid: 1 << 23, tid: 1 << 23 };

    fn span() -> Span {
        let range = VaRange::covering(Va::new(4096), 8192).unwrap();
        Span { event: 1, cause: "madvise", range, blocking: Blocking::Allowed }
    }

    fn summary(records: &[(u64, Kind)]) -> String {
        let (mut summary, mut out) = (Summary::default(), Vec::new());
        for (t, kind) in records {
            summary.add(*t, &Record { task: TASK, mm: 3, kind: *kind });
        }
        summary.write_json(&mut out, 99);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn equal_brackets_of_one_task_nest() {
        let text = summary(&[
            (0, Kind::Start(span())),
            (10, Kind::Start(span())),
            (11, Kind::End(span(), Some(0))),
            (20, Kind::End(span(), Some(-12))),
        ]);
        assert!(text.contains(r#""events":{"clear":{"count":2,"errors":1,"pages":4,"ns":21}}"#), "{text}");
    }

    #[test]
    fn gets_puts_and_frees_are_counted_by_process() {
        let get = |users| Kind::Get { users };
        let text = summary(&[
            (0, get(1)),
            (0, get(2)),
            (1, Kind::Put { users: 1 }),
            (2, Kind::Put { users: 0 }),
            (3, Kind::Free),
        ]);
        assert_eq!(
            text,
            "{\"v\":1,\"t\":99,\"kind\":\"summary\",\"events\":{},\
             \"processes\":[{\"pid\":8388608,\"get\":2,\"put\":2,\"free\":1}]}\n"
        );
    }

    #[test]
    fn a_number_that_is_used_again_is_another_process() {
        let child = Task { pid: TASK.pid + 1, tid: TASK.pid + 1 };
        let mut summary = Summary::default();
        let mut add = |task, kind| summary.add(0, &Record { task, mm: 3, kind });
        for _ in 0..2 {
            add(TASK, Kind::Fork { child, child_mm: 4 });
            add(child, Kind::Get { users: 1 });
            add(child, Kind::Put { users: 0 });
        }
        // A thread is no process.
        add(TASK, Kind::Fork { child: Task { pid: TASK.pid, tid: 7 }, child_mm: 3 });
        let processes: Vec<_> = summary.processes.iter().map(|process| (process.pid, process.get)).collect();
        assert_eq!(processes, [(child.pid, 1), (child.pid, 1)]);
    }
}
