//! Totals of a trace: count of calls, memory and time, by event, by place in the code, by mapping,
//! by task and by cause.

mod table;

use std::collections::HashMap;
use std::hash::Hash;
use std::io::Write as _;

use mmu_source::process::Task;

use crate::change::{Change, Shares};
use crate::digits::Put;
use crate::events;
use crate::intern::{Name, Names};
use crate::json;
use crate::kind::LineKind;
use crate::lifecycle::Lifecycle;
use crate::stacks::Resolved;

pub(crate) use self::table::{By, Sort, Tables, printable, size, time};

/// The tables of a summary, and their options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) tables: Tables,
    pub(crate) sort: Sort,
    /// The maximum count of rows of each table, except that of the events.
    pub(crate) top: usize,
    /// Show elapsed time instead of the time in the call.
    pub(crate) wall: bool,
}

/// The texts to which the indices of names and stacks refer.
#[derive(Debug)]
pub(crate) struct Sources<'a> {
    pub(crate) names: Option<&'a Names>,
    pub(crate) stacks: &'a Resolved,
    /// Whether stacks were requested, even if none could be taken.
    pub(crate) has_places: bool,
}

/// Sums up changes as they are recorded.
#[derive(Debug)]
pub(crate) struct Summary {
    wanted: Wanted,
    events: [Row; events::NAMES.len()],
    sites: HashMap<Option<u32>, Row>,
    whats: HashMap<Option<Name>, Row>,
    shares: Shares,
    tasks: HashMap<(Task, String), Row>,
    causes: HashMap<&'static str, Row>,
    total: Row,
    /// The count of unmaps and clears whose size in memory is known, and of those that failed or
    /// found nothing in memory. `None` if there is none.
    removals: Option<(u64, u64)>,
}

/// The totals of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) calls: u64,
    /// Ranges of these calls: a call can have several.
    pub(crate) ranges: u64,
    /// Ranges of calls that failed.
    pub(crate) errors: u64,
    /// Ranges of calls that did not return.
    pub(crate) cut: u64,
    /// Ranges whose resident size is known.
    pub(crate) sized: u64,
    pub(crate) pages: u64,
    pub(crate) bytes: u64,
    pub(crate) resident: u64,
    /// Elapsed time of all ranges.
    pub(crate) wall: u64,
    pub(crate) time: u64,
    pub(crate) longest: u64,
}

impl Row {
    pub(crate) fn add(&mut self, change: &Change, wall: bool) {
        self.ranges += 1;
        self.errors += u64::from(change.failed());
        self.cut += u64::from(change.is_cut());
        self.sized += u64::from(change.seen.pages.is_some());
        self.pages = self.pages.saturating_add(change.span.range.pages());
        self.bytes = self.bytes.saturating_add(change.bytes());
        self.resident = self.resident.saturating_add(change.resident());
        self.wall = self.wall.saturating_add(change.wall());
        if change.is_call {
            self.calls += 1;
            self.took(time_of(change, wall));
        }
    }

    fn took(&mut self, time: u64) {
        self.time = self.time.saturating_add(time);
        self.longest = self.longest.max(time);
    }

    /// Like [`Row::add`], for the table by mapping: each range counts as a call, and its share of
    /// the call's time is added later.
    fn add_range(&mut self, change: &Change) {
        let time_apart = Change {
            own: None,
            is_call: false,
            ..*change
        };
        self.add(&time_apart, true);
        self.calls += 1;
    }

    pub(crate) fn merge(&mut self, other: &Row) {
        self.calls += other.calls;
        self.ranges += other.ranges;
        self.errors += other.errors;
        self.cut += other.cut;
        self.sized += other.sized;
        self.pages = self.pages.saturating_add(other.pages);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.resident = self.resident.saturating_add(other.resident);
        self.wall = self.wall.saturating_add(other.wall);
        self.time = self.time.saturating_add(other.time);
        self.longest = self.longest.max(other.longest);
    }

    /// `None` if there are ranges, and the resident size is known of none.
    pub(crate) fn known_resident(&self) -> Option<u64> {
        (self.sized > 0 || self.ranges == 0).then_some(self.resident)
    }
}

/// The time in the call itself, if it is known and `wall` is not set; otherwise the elapsed time.
fn time_of(change: &Change, wall: bool) -> u64 {
    change
        .own
        .filter(|_| !wall)
        .unwrap_or_else(|| change.wall())
}

impl Summary {
    pub(crate) fn new(wanted: Wanted) -> Summary {
        Summary {
            wanted,
            events: Default::default(),
            sites: HashMap::new(),
            whats: HashMap::new(),
            shares: Shares::default(),
            tasks: HashMap::new(),
            causes: HashMap::new(),
            total: Row::default(),
            removals: None,
        }
    }

    /// `comm` is the name of the change's task.
    pub(crate) fn add(&mut self, change: &Change, comm: &str) {
        let Wanted { tables, wall, .. } = self.wanted;
        self.events[change.span.event].add(change, wall);
        self.total.add(change, wall);
        let seen = change.seen;
        if tables.has(By::Where) {
            self.sites.entry(seen.site).or_default().add(change, wall);
        }
        if tables.has(By::What) {
            self.whats.entry(seen.what).or_default().add_range(change);
            let whats = &mut self.whats;
            self.shares
                .take(change, time_of(change, wall), |what, share| {
                    whats.entry(what).or_default().took(share);
                });
        }
        if tables.has(By::Task) {
            self.tasks
                .entry((change.task, comm.to_owned()))
                .or_default()
                .add(change, wall);
        }
        if tables.has(By::Cause) {
            self.causes
                .entry(change.span.cause)
                .or_default()
                .add(change, wall);
        }
        let removes = matches!(change.span.event, events::UNMAP | events::CLEAR);
        if let Some(pages) = seen.pages.filter(|_| removes && !change.is_cut()) {
            let (all, nothing) = self.removals.get_or_insert_default();
            *all += 1;
            *nothing += u64::from(change.failed() || pages.is_empty());
        }
    }

    /// The rows of a table, in order, with their labels.
    fn rows(&self, by: By, sources: &Sources<'_>) -> Vec<(String, Row)> {
        let what = |name: &Option<Name>| match (name, sources.names) {
            (Some(name), Some(names)) => names.text(*name).to_owned(),
            _ => "(not known)".to_owned(),
        };
        let task = |(task, comm): &(Task, String)| match comm.as_str() {
            "" => format!("{}/{}", task.pid, task.tid),
            comm => format!("{comm} {}/{}", task.pid, task.tid),
        };
        let rows = match by {
            By::Event => {
                let named = events::NAMES
                    .iter()
                    .zip(&self.events)
                    .filter(|(_, row)| row.ranges > 0);
                return named
                    .map(|(name, row)| ((*name).to_owned(), *row))
                    .collect();
            }
            By::Where => labelled(&self.sites, |site| sources.stacks.place(*site)),
            By::What => labelled(&self.whats, what),
            By::Task => labelled(&self.tasks, task),
            By::Cause => labelled(&self.causes, |cause| (*cause).to_owned()),
        };
        self.wanted.sort.apply(rows)
    }

    /// Writes the tables as text.
    pub(crate) fn write_text(&self, out: &mut Vec<u8>, sources: &Sources<'_>) {
        if self.total.ranges == 0 {
            out.put("No change was recorded.\n");
            return;
        }
        for by in self.wanted.tables.list() {
            if by != By::Where || sources.has_places {
                table::write(out, by, &self.rows(by, sources), &self.total, &self.wanted);
            }
        }
        let Row { ranges, sized, .. } = self.total;
        if sized < ranges {
            // Writing to memory cannot fail.
            let _ = writeln!(
                out,
                "How much was resident is not known of {} of {ranges} ranges.",
                ranges - sized
            );
        }
        if let partial @ 1.. = sources.stacks.partial() {
            // Writing to memory cannot fail.
            let _ = writeln!(
                out,
                "Frames may be missing in {partial} stacks: deeper than 256 frames, or the unwind tables of a file were too large to be read."
            );
        }
        if let Some((all, nothing)) = self.removals {
            // Writing to memory cannot fail.
            let _ = writeln!(out, "{nothing} of {all} unmaps and clears removed nothing.");
        }
    }

    /// Writes one JSON object with the keys of every line, but without a task.
    pub(crate) fn write_json(
        &self,
        out: &mut Vec<u8>,
        t: u64,
        sources: &Sources<'_>,
        lifecycle: Option<&Lifecycle>,
    ) {
        json::head(out, t, LineKind::Summary);
        out.put(",\"events\":{");
        for (at, (name, row)) in self.rows(By::Event, sources).iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            let _ = write!(
                out,
                "{comma}\"{name}\":{{\"count\":{},\"errors\":{},\"cut\":{},\"pages\":{},\"ns\":{},",
                row.ranges, row.errors, row.cut, row.pages, row.wall
            );
            write_row(out, row);
            out.put("}");
        }
        out.put("}");
        for by in self.wanted.tables.list().filter(|by| *by != By::Event) {
            let _ = write!(out, ",\"{}\":[", by.name());
            for (at, (label, row)) in self
                .rows(by, sources)
                .iter()
                .take(self.wanted.top)
                .enumerate()
            {
                out.put(if at == 0 { "{\"name\":" } else { ",{\"name\":" });
                json::put_str(out, label);
                out.put(",");
                write_row(out, row);
                out.put("}");
            }
            out.put("]");
        }
        if let Some((all, nothing)) = self.removals {
            let _ = write!(out, ",\"removals\":{all},\"removed_nothing\":{nothing}");
        }
        if let Some(lifecycle) = lifecycle {
            out.put(",\"processes\":[");
            for (at, process) in lifecycle.processes.iter().enumerate() {
                let comma = if at == 0 { "" } else { "," };
                let crate::lifecycle::Process {
                    pid,
                    get,
                    put,
                    free,
                    ..
                } = process;
                let _ = write!(
                    out,
                    "{comma}{{\"pid\":{pid},\"get\":{get},\"put\":{put},\"free\":{free}}}"
                );
            }
            out.put("]");
        }
        out.put("}\n");
    }
}

/// Writes the totals of a row, as members of a JSON object.
pub(crate) fn write_row(out: &mut Vec<u8>, row: &Row) {
    let Row {
        calls,
        bytes,
        time,
        longest,
        ..
    } = row;
    // Writing to memory cannot fail.
    let _ = write!(out, "\"calls\":{calls},\"bytes\":{bytes},");
    if let Some(resident) = row.known_resident() {
        let _ = write!(out, "\"resident\":{resident},");
    }
    let _ = write!(out, "\"self\":{time},\"longest\":{longest}");
}

/// Rows under their labels; equal labels share a row.
fn labelled<K: Eq + Hash>(
    rows: &HashMap<K, Row>,
    label: impl Fn(&K) -> String,
) -> Vec<(String, Row)> {
    let mut merged: HashMap<String, Row> = HashMap::new();
    for (key, row) in rows {
        merged.entry(label(key)).or_default().merge(row);
    }
    merged.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use mmu_notifier::{Blocking, Va, VaRange};

    use super::*;
    use crate::change::Seen;
    use crate::record::Pages;
    use crate::record::Span;

    fn change(cause: &'static str, pages: u64, resident: u64, own: u64, result: i64) -> Change {
        let range = VaRange::covering(Va::new(4096), pages * 4096).unwrap();
        let pages = Some(Pages {
            resident,
            ..Pages::default()
        });
        Change {
            task: Task { pid: 1, tid: 2 },
            span: Span {
                event: 1,
                cause,
                range,
                blocking: Blocking::Allowed,
            },
            began: 100,
            ended: 200,
            result: Some(result),
            seen: Seen {
                what: None,
                pages,
                site: None,
            },
            own: Some(own),
            is_call: true,
        }
    }

    fn summary(tables: &str, sort: Sort, top: usize) -> String {
        let wanted = Wanted {
            tables: tables.parse().unwrap(),
            sort,
            top,
            wall: false,
        };
        let mut summary = Summary::new(wanted);
        for change in [
            change("madvise", 2, 8192, 10, 0),
            change("munmap", 1, 0, 50, 0),
            change("munmap", 1, 4096, 5, -22),
        ] {
            summary.add(&change, "prog");
        }
        let (mut out, stacks) = (Vec::new(), Resolved::default());
        summary.write_text(
            &mut out,
            &Sources {
                names: None,
                stacks: &stacks,
                has_places: false,
            },
        );
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_recording_may_claim_any_number_of_bytes() {
        let mut change = change("munmap", 1, u64::MAX, 1, 0);
        change.seen.pages.as_mut().unwrap().swapped = u64::MAX;
        let mut summary = Summary::new(Wanted {
            tables: "event".parse().unwrap(),
            sort: Sort::Time,
            top: 1,
            wall: false,
        });
        summary.add(&change, "prog");
        summary.add(&change, "prog");
        assert_eq!(summary.removals, Some((2, 0)));
    }

    #[test]
    fn failed_calls_and_ranges_without_memory_removed_nothing() {
        let text = summary("event", Sort::Time, 10);
        assert!(
            text.ends_with("\n2 of 3 unmaps and clears removed nothing.\n"),
            "{text}"
        );
        let row: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(
            row,
            [
                "clear", "3", "16", "KiB", "8", "KiB", "65", "ns", "50", "ns", "1", "failed"
            ]
        );
    }

    #[test]
    fn rows_are_sorted_by_the_key_and_cut() {
        let first = |sort, top| {
            let text = summary("cause", sort, top);
            let row = text
                .lines()
                .nth(1)
                .unwrap()
                .split_whitespace()
                .last()
                .unwrap()
                .to_owned();
            (row, text)
        };
        assert_eq!(first(Sort::Time, 10).0, "munmap");
        assert_eq!(first(Sort::Resident, 10).0, "madvise");
        assert_eq!(first(Sort::Calls, 10).0, "munmap");
        let (row, text) = first(Sort::Resident, 1);
        assert!(row == "madvise" && text.contains("1 more"), "{text}");
    }

    #[test]
    fn tasks_are_named() {
        assert!(summary("task", Sort::Time, 10).contains("prog 1/2"));
        assert!(
            !summary("where", Sort::Time, 10).contains("where"),
            "no stacks were taken"
        );
    }
}
