//! Records as text: aligned columns, one line per system call, in strace's manner.
//!
//! A start is held back until its end arrives, and both become one line. If a line of another call,
//! or of the life of a task, has to be written first, the start is written with `<unfinished ...>`,
//! and the end gets a line of its own later.
//! Ranges of one call with the same event in the same address space share a line.

mod units;

pub(crate) use units::{put_bytes, put_time};

use std::collections::HashMap;
use std::io::Write as _;
use std::mem;

use mmu_source::process::{ExitStatus, Pid, Task};

use crate::digits::Put;
use crate::names;
use crate::record::{Extra, Kind, Mapping, Record, Span};
use units::{pad, put_size, right_align};

/// The text form of a trace.
#[derive(Debug)]
pub(crate) struct Text {
    color: Color,
    /// Starts not written yet, all of one task.
    held: Opens,
    /// Starts written as unfinished, by thread.
    cut: HashMap<Pid, Opens>,
}

/// Whether to write colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Color {
    Never,
    Always,
}

#[derive(Clone, Debug)]
struct Open {
    t: u64,
    task: Task,
    mm: u64,
    span: Span,
    comm: Comm,
    found: Option<Box<Found>>,
    end: Option<End>,
}

/// How a call ended: when, its result, and the time in the call itself.
type End = (u64, Option<i64>, Option<u64>);

/// The mapping and memory of a range.
#[derive(Clone, Debug)]
struct Found {
    what: String,
    resident: Option<u64>,
    site: Option<u32>,
}

/// The name of a task, cut to the 15 bytes that the kernel keeps, and its length.
type Comm = ([u8; 15], u8);

/// Starts of one task, in order, and the ends of some.
///
/// A call can have as many ranges as there are mappings. The ranges end in reverse order, so
/// matching starts with ends needs no search.
#[derive(Debug, Default)]
struct Opens {
    list: Vec<Open>,
    /// How many starts have not ended.
    open: usize,
    /// How many starts at the end of the list have ended.
    ended: usize,
}

impl Opens {
    fn push(&mut self, open: Open) {
        self.list.push(open);
        self.open += 1;
        self.ended = 0;
    }

    /// Stores an end with the last start to which it can belong; returns whether there is one.
    fn end(&mut self, record: &Record, span: &Span, end: End) -> bool {
        let count = self.list.len() - self.ended;
        let is_ours = |open: &Open| {
            open.end.is_none()
                && open.task.tid == record.task.tid
                && open.mm == record.mm
                && open.span == *span
        };
        let Some(at) = self.list[..count].iter().rposition(is_ours) else {
            return false;
        };
        self.list[at].end = Some(end);
        self.open -= 1;
        if at + 1 == count {
            self.ended += 1;
        }
        true
    }

    fn append(&mut self, other: &mut Opens) {
        self.list.append(&mut other.list);
        self.open += mem::take(&mut other.open);
        self.ended = mem::take(&mut other.ended);
    }

    fn clear(&mut self) {
        self.list.clear();
        (self.open, self.ended) = (0, 0);
    }
}

/// Which part of a call a line shows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Whole,
    Unfinished,
    Resumed,
}

impl Text {
    pub(crate) fn new(color: Color) -> Text {
        Text {
            color,
            held: Opens::default(),
            cut: HashMap::new(),
        }
    }

    /// Takes `record`, made at `t` nanoseconds, and appends the lines that are complete with it.
    pub(crate) fn write(&mut self, out: &mut Vec<u8>, t: u64, record: &Record, extra: &Extra<'_>) {
        match record.kind {
            Kind::Start(span) => {
                if self
                    .held
                    .list
                    .first()
                    .is_some_and(|open| open.task.tid != record.task.tid)
                {
                    self.flush(out);
                }
                let found = extra.what.map(|what| {
                    let resident = extra.pages.map(|pages| pages.resident);
                    Box::new(Found {
                        what: what.to_owned(),
                        resident,
                        site: extra.site,
                    })
                });
                let comm = cut(extra.comm);
                self.held.push(Open {
                    t,
                    task: record.task,
                    mm: record.mm,
                    span,
                    comm,
                    found,
                    end: None,
                });
            }
            Kind::End(span, result) => self.end(out, record, &span, (t, result, extra.own)),
            _ => {
                self.flush(out);
                self.life(out, t, record, extra);
            }
        }
    }

    /// Writes the starts that are held back, as unfinished.
    pub(crate) fn flush(&mut self, out: &mut Vec<u8>) {
        let Some(first) = self.held.list.first() else {
            return;
        };
        self.lines(out, &self.held.list, Part::Unfinished);
        self.cut
            .entry(first.task.tid)
            .or_default()
            .append(&mut self.held);
    }

    fn end(&mut self, out: &mut Vec<u8>, record: &Record, span: &Span, end: End) {
        let tid = record.task.tid;
        if self.held.end(record, span, end) {
            if self.held.open == 0 {
                self.lines(out, &self.held.list, Part::Whole);
                self.held.clear();
            }
        } else if self
            .cut
            .get_mut(&tid)
            .is_some_and(|cut| cut.end(record, span, end) && cut.open == 0)
        {
            if let Some(done) = self.cut.remove(&tid) {
                self.flush(out);
                self.lines(out, &done.list, Part::Resumed);
            }
        }
    }

    /// Writes one line for each run of `opens` with the same event in the same address space.
    fn lines(&self, out: &mut Vec<u8>, opens: &[Open], part: Part) {
        for group in opens.chunk_by(|a, b| (a.mm, a.span.event) == (b.mm, b.span.event)) {
            self.line(out, group, part);
        }
    }

    fn line(&self, out: &mut Vec<u8>, group: &[Open], part: Part) {
        let (first, last) = (&group[0], &group[group.len() - 1]);
        let t = match (part, last.end) {
            (Part::Resumed, Some((t, ..))) => t,
            _ => first.t,
        };
        self.prefix(out, t, first.task, &first.comm, first.mm);
        self.column(out, EVENT, 17, |out| out.put(first.span.event_name()));
        if part == Part::Resumed {
            pad(out, 41);
        } else {
            self.column(out, PLAIN, 31, |out| {
                if group.len() == 1 {
                    out.put_hex(first.span.start().into());
                    out.put("-");
                    out.put_hex(first.span.end());
                } else {
                    out.put_dec(group.len() as u64);
                    out.put(" ranges");
                }
            });
            let pages = group.iter().fold(0u64, |sum, open| {
                sum.saturating_add(open.span.range.pages())
            });
            put_size(out, pages);
            out.put("  ");
        }
        if part == Part::Resumed {
            out.put("<... ");
        }
        self.paint(out, CALL, |out| out.put(first.span.cause));
        out.put(match part {
            Part::Whole => "",
            Part::Unfinished => " <unfinished ...>",
            Part::Resumed => " resumed>",
        });
        if let (Part::Whole | Part::Resumed, Some((t, result, _))) = (part, last.end) {
            out.put(" = ");
            self.result(out, first.span.cause, result);
            // The first range ends last, and has the time of the call.
            let own = group.iter().find_map(|open| open.end?.2);
            self.paint(out, FAINT, |out| {
                out.put("  <");
                put_time(out, own.unwrap_or(t - first.t));
                out.put(">");
            });
        }
        if let (Part::Whole | Part::Unfinished, Some(found)) = (part, &first.found) {
            let resident = group
                .iter()
                .filter_map(|open| open.found.as_ref()?.resident);
            self.found(out, found, resident.reduce(u64::saturating_add));
        }
        out.put("\n");
    }

    fn found(&self, out: &mut Vec<u8>, found: &Found, resident: Option<u64>) {
        if let Some(bytes) = resident {
            out.put("  resident ");
            put_bytes(out, bytes);
        }
        out.put("  ");
        out.put(&found.what.escape_debug().to_string());
        if let Some(site) = found.site {
            out.put("  stack ");
            out.put_dec(site.into());
        }
    }

    fn result(&self, out: &mut Vec<u8>, cause: &str, result: Option<i64>) {
        match result {
            None => out.put("?"),
            Some(error @ -4095..=-1) => self.paint(out, BAD, |out| match names::errno(-error) {
                Some(name) => {
                    out.put("-1 ");
                    out.put(name);
                }
                None => out.put_int(error),
            }),
            Some(value) if matches!(cause, "mmap" | "mremap" | "brk" | "shmat") => {
                out.put_hex(value as u64 as u128)
            }
            Some(value) => out.put_int(value),
        }
    }

    /// A line of the life of tasks, address spaces and notifiers.
    fn life(&self, out: &mut Vec<u8>, t: u64, record: &Record, extra: &Extra<'_>) {
        self.prefix(out, t, record.task, &cut(extra.comm), record.mm);
        let style = match record.kind {
            Kind::MmNew { .. } | Kind::Get { .. } | Kind::Map(_) => BORN,
            Kind::MmRelease | Kind::Put { .. } | Kind::Free => GONE,
            Kind::Exit(ExitStatus::Signal(_)) => BAD,
            _ => STEP,
        };
        self.column(out, style, 17, |out| out.put(record.kind.of_line().name()));
        // Writing to memory cannot fail.
        let _ = match record.kind {
            Kind::Get { users } | Kind::Put { users } => write!(out, "users {users}"),
            Kind::Fork { child, child_mm } if child.pid == record.task.pid => {
                write!(out, "thread {} in mm{child_mm}", child.tid)
            }
            Kind::Fork { child, child_mm } => write!(out, "process {} in mm{child_mm}", child.pid),
            Kind::MmNew { .. } => {
                write!(out, "{}", extra.program.unwrap_or_default().escape_debug())
            }
            Kind::Exec { old_mm } => {
                let now = extra
                    .program
                    .map(|program| format!(", now {}", program.escape_debug()));
                write!(out, "from mm{old_mm}{}", now.unwrap_or_default())
            }
            Kind::Map(Mapping { cause, range }) => {
                let what = extra.what.map(|what| format!("  {}", what.escape_debug()));
                put_size(out, range.pages());
                write!(
                    out,
                    "  {cause} at {:#x}{}",
                    range.start().get(),
                    what.unwrap_or_default()
                )
            }
            Kind::Exit(ExitStatus::Code(code)) => write!(out, "code {code}"),
            Kind::Exit(ExitStatus::Signal(signal)) => {
                write!(out, "killed by {}", names::signal(signal))
            }
            _ => Ok(()),
        };
        while out.last() == Some(&b' ') {
            out.pop();
        }
        out.put("\n");
    }

    fn prefix(&self, out: &mut Vec<u8>, t: u64, task: Task, comm: &Comm, mm: u64) {
        self.paint(out, FAINT, |out| {
            let begin = out.len();
            out.put_dec(t / 1_000_000_000);
            right_align(out, begin, 5);
            let micros = t / 1000 % 1_000_000;
            out.put(".");
            let begin = out.len();
            out.put_dec(1_000_000 + micros);
            out.remove(begin);
        });
        let begin = out.len();
        out.put_int(task.tid.into());
        right_align(out, begin, 8);
        out.put(" ");
        let (name, length) = comm;
        self.column(out, PLAIN, 16, |out| {
            out.extend_from_slice(&name[..usize::from(*length)])
        });
        let style = MMS[(mm % MMS.len() as u64) as usize];
        self.column(out, style, 6, |out| {
            out.put("mm");
            out.put_dec(mm);
        });
    }

    fn paint(&self, out: &mut Vec<u8>, style: &str, write: impl FnOnce(&mut Vec<u8>)) {
        if self.color == Color::Always && !style.is_empty() {
            out.put(style);
            write(out);
            out.put("\x1b[0m");
        } else {
            write(out);
        }
    }

    /// Writes a coloured cell and pads it to `width` with spaces, at least one.
    fn column(
        &self,
        out: &mut Vec<u8>,
        style: &str,
        width: usize,
        write: impl FnOnce(&mut Vec<u8>),
    ) {
        let mut length = 0;
        self.paint(out, style, |out| {
            let begin = out.len();
            write(out);
            length = out.len() - begin;
        });
        pad(out, width.saturating_sub(length).max(1));
    }
}

/// Cuts a name to the kernel's length, at a character boundary.
fn cut(comm: &str) -> Comm {
    let mut name = [0; 15];
    let length = (0..=name.len())
        .rev()
        .find(|length| comm.is_char_boundary(*length))
        .unwrap_or(0);
    name[..length].copy_from_slice(&comm.as_bytes()[..length]);
    (name, length as u8)
}

const PLAIN: &str = "";
const FAINT: &str = "\x1b[2m";
const EVENT: &str = "\x1b[1m";
const CALL: &str = "\x1b[36m";
const BORN: &str = "\x1b[32m";
const GONE: &str = "\x1b[33m";
const STEP: &str = "\x1b[35m";
const BAD: &str = "\x1b[31m";
/// One colour per address space, in turn, so that the eye can follow each.
const MMS: [&str; 6] = [
    "\x1b[96m", "\x1b[94m", "\x1b[95m", "\x1b[92m", "\x1b[93m", "\x1b[91m",
];

#[cfg(test)]
mod tests {
    use mmu_notifier::{Blocking, Va, VaRange};

    use super::*;

    const A: Task = Task {
        pid: 4711,
        tid: 4711,
    };
    const B: Task = Task {
        pid: 4711,
        tid: 4712,
    };

    fn span(page: u64, pages: u64) -> Span {
        let range = VaRange::covering(Va::new(page << 12), pages << 12).unwrap();
        Span {
            event: 0,
            cause: "munmap",
            range,
            blocking: Blocking::Allowed,
        }
    }

    fn written(records: &[(u64, Task, Kind)]) -> Vec<String> {
        let (mut text, mut out) = (Text::new(Color::Never), Vec::new());
        for (t, task, kind) in records {
            text.write(
                &mut out,
                *t,
                &Record {
                    task: *task,
                    mm: 1,
                    kind: *kind,
                },
                &Extra {
                    comm: "prog",
                    ..Extra::default()
                },
            );
        }
        text.flush(&mut out);
        String::from_utf8(out)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn a_call_is_one_line() {
        let lines = written(&[
            (1000, A, Kind::Start(span(0x1000, 11))),
            (4100, A, Kind::End(span(0x1000, 11), Some(0))),
        ]);
        assert_eq!(
            lines,
            [
                "    0.000001    4711 prog            mm1   unmap            0x1000000-0x100b000              44 KiB  munmap = 0  <3.1 us>"
            ]
        );
    }

    #[test]
    fn ranges_of_one_call_share_a_line() {
        let (one, two) = (span(1, 1), span(9, 2));
        let lines = written(&[
            (1, A, Kind::Start(one)),
            (2, A, Kind::Start(two)),
            (3, A, Kind::End(two, Some(-22))),
            (4, A, Kind::End(one, Some(-22))),
        ]);
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(
            lines[0].contains("2 ranges ") && lines[0].contains("  12 KiB  munmap = -1 EINVAL"),
            "{lines:?}"
        );
    }

    #[test]
    fn a_record_in_between_cuts_a_call_in_two() {
        let lines = written(&[
            (1, A, Kind::Start(span(1, 1))),
            (2, B, Kind::Get { users: 2 }),
            (3, A, Kind::End(span(1, 1), None)),
        ]);
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines[0].ends_with("munmap <unfinished ...>"));
        assert!(lines[1].ends_with("get              users 2"));
        assert!(
            lines[2].ends_with("  <... munmap resumed> = ?  <2 ns>"),
            "{lines:?}"
        );
        assert_eq!(
            lines[0].find("munmap"),
            lines[2].find("munmap").map(|at| at - "<... ".len())
        );
    }

    #[test]
    fn calls_of_two_tasks_are_kept_separate() {
        let lines = written(&[
            (1, A, Kind::Start(span(1, 1))),
            (2, B, Kind::Start(span(1, 1))),
            (3, A, Kind::End(span(1, 1), Some(0))),
            (4, B, Kind::End(span(1, 1), Some(0))),
        ]);
        let ends: Vec<_> = lines
            .iter()
            .map(|line| (&line[16..20], line.contains("unfinished")))
            .collect();
        assert_eq!(
            ends,
            [
                ("4711", true),
                ("4712", true),
                ("4711", false),
                ("4712", false)
            ]
        );
    }

    #[test]
    fn many_ranges_of_one_call_are_matched_without_a_search() {
        const RANGES: u64 = 200_000;
        let begun = std::time::Instant::now();
        for cut in [false, true] {
            let starts = (0..RANGES).map(|at| (at, A, Kind::Start(span(2 * at + 1, 1))));
            let between = cut.then_some((RANGES, B, Kind::Get { users: 2 }));
            let ends = (0..RANGES)
                .rev()
                .map(|at| (2 * RANGES - at, A, Kind::End(span(2 * at + 1, 1), Some(0))));
            let lines = written(&starts.chain(between).chain(ends).collect::<Vec<_>>());
            assert_eq!(lines.len(), if cut { 3 } else { 1 });
            assert!(lines[0].contains("200000 ranges "), "{}", lines[0]);
        }
        // This takes a fraction of a second; a quadratic algorithm took minutes.
        assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
    }
}
