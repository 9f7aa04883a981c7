//! One line of a recorded trace.

use std::borrow::Cow;

use mmu_notifier::{Blocking, Va, VaRange};
use mmu_source::process::{ExitStatus, Task};
use serde::Deserialize;

use crate::change::Seen;
use crate::events;
use crate::intern::{Name, Names};
use crate::kind::LineKind;
use crate::record::{Kind, Mapping, Pages, Record, Span};
use crate::stacks;

/// The content of a line.
#[derive(Debug)]
pub(super) enum Said {
    /// A line of a kind, or with an event, that this version ignores.
    Other,
    /// A stack with its index.
    Stack(u32, stacks::Stack),
    Record {
        record: Record,
        /// The name of the task.
        comm: Name,
        program: Option<Name>,
        seen: Seen,
        own: Option<u64>,
    },
}

/// The keys that all lines have.
#[derive(Deserialize)]
struct Head<'a> {
    v: u64,
    t: u64,
    #[serde(borrow)]
    kind: Cow<'a, str>,
}

/// The keys of records and of stacks. An empty text means that the value is not known.
#[derive(Deserialize)]
struct Line<'a> {
    v: u64,
    t: u64,
    #[serde(borrow)]
    kind: Cow<'a, str>,
    pid: Option<i32>,
    tid: Option<i32>,
    mm: Option<u64>,
    users: Option<u32>,
    #[serde(borrow, default)]
    event: Cow<'a, str>,
    #[serde(borrow, default)]
    cause: Cow<'a, str>,
    #[serde(borrow, default)]
    start: Cow<'a, str>,
    #[serde(borrow, default)]
    end: Cow<'a, str>,
    blockable: Option<bool>,
    result: Option<i64>,
    child_pid: Option<i32>,
    child_tid: Option<i32>,
    child_mm: Option<u64>,
    old_mm: Option<u64>,
    code: Option<i32>,
    signal: Option<i32>,
    #[serde(borrow, default)]
    comm: Cow<'a, str>,
    #[serde(borrow, default)]
    program: Cow<'a, str>,
    #[serde(borrow, default)]
    what: Cow<'a, str>,
    resident: Option<u64>,
    #[serde(default)]
    file: u64,
    #[serde(default)]
    huge: u64,
    #[serde(default)]
    swapped: u64,
    site: Option<u32>,
    #[serde(rename = "self")]
    own: Option<u64>,
    place: Option<usize>,
    #[serde(default)]
    partial: bool,
    #[serde(default)]
    frames: Vec<Frame>,
}

#[derive(Deserialize)]
struct Frame {
    function: String,
    #[serde(default)]
    module: String,
    #[serde(default)]
    line: String,
    #[serde(default)]
    named: bool,
}

/// Reads a line: its time and its content.
///
/// # Errors
/// The fault of the line, in one line.
pub(super) fn read(
    bytes: &[u8],
    names: &mut Names,
    causes: &mut Causes,
) -> Result<(u64, Said), String> {
    let line = match serde_json::from_slice::<Line<'_>>(bytes) {
        Ok(line) => line,
        Err(error) => match serde_json::from_slice::<Head<'_>>(bytes) {
            // An unknown kind may give the keys another meaning.
            Ok(Head {
                v: VERSION,
                t,
                kind,
            }) if !is_read(LineKind::named(&kind)) => return Ok((t, Said::Other)),
            Ok(Head { v, .. }) if v != VERSION => return Err(other_version(v)),
            _ => return Err(error.to_string()),
        },
    };
    if line.v != VERSION {
        return Err(other_version(line.v));
    }
    Ok((line.t, line.said(names, causes)?.unwrap_or(Said::Other)))
}

/// The version of the format that is read.
const VERSION: u64 = 1;

/// Whether lines of this kind are read. Lines of other kinds are ignored.
fn is_read(kind: Option<LineKind>) -> bool {
    kind.is_some_and(|kind| kind != LineKind::Summary)
}

fn other_version(v: u64) -> String {
    format!("version {v} of the format; this mmun reads version {VERSION}")
}

impl Line<'_> {
    /// `None` for a summary, and for a kind or an event that is not known.
    fn said(self, names: &mut Names, causes: &mut Causes) -> Result<Option<Said>, String> {
        let Some(kind) = LineKind::named(&self.kind) else {
            return Ok(None);
        };
        if kind == LineKind::Stack {
            return self.stack().map(Some);
        }
        let Some(kind) = self.record_kind(kind, causes)? else {
            return Ok(None);
        };
        let task = Task {
            pid: want(self.pid, "pid")?,
            tid: want(self.tid, "tid")?,
        };
        let mut name = |text: &str| (!text.is_empty()).then(|| names.number(text));
        let seen = Seen {
            what: name(&self.what),
            pages: self.resident.map(|resident| Pages {
                resident,
                file: self.file,
                huge: self.huge,
                swapped: self.swapped,
            }),
            site: self.site,
        };
        let program = name(&self.program);
        let record = Record {
            task,
            mm: want(self.mm, "mm")?,
            kind,
        };
        Ok(Some(Said::Record {
            record,
            comm: names.number(&self.comm),
            program,
            seen,
            own: self.own,
        }))
    }

    fn record_kind(&self, kind: LineKind, causes: &mut Causes) -> Result<Option<Kind>, String> {
        Ok(Some(match kind {
            LineKind::MmNew => Kind::MmNew { parent: None },
            LineKind::MmRelease => Kind::MmRelease,
            LineKind::Get => Kind::Get {
                users: want(self.users, "users")?,
            },
            LineKind::Put => Kind::Put {
                users: want(self.users, "users")?,
            },
            LineKind::Free => Kind::Free,
            LineKind::Start | LineKind::End => {
                let Some(event) = events::NAMES.iter().position(|name| *name == self.event) else {
                    return Ok(None);
                };
                let is_blockable = want(self.blockable, "blockable")?;
                let blocking = if is_blockable {
                    Blocking::Allowed
                } else {
                    Blocking::Forbidden
                };
                let span = Span {
                    event,
                    cause: causes.get(&self.cause)?,
                    range: self.range()?,
                    blocking,
                };
                if kind == LineKind::Start {
                    Kind::Start(span)
                } else {
                    Kind::End(span, self.result)
                }
            }
            LineKind::Map => Kind::Map(Mapping {
                cause: causes.get(&self.cause)?,
                range: self.range()?,
            }),
            LineKind::Fork => Kind::Fork {
                child: Task {
                    pid: want(self.child_pid, "child_pid")?,
                    tid: want(self.child_tid, "child_tid")?,
                },
                child_mm: want(self.child_mm, "child_mm")?,
            },
            LineKind::Exec => Kind::Exec {
                old_mm: want(self.old_mm, "old_mm")?,
            },
            LineKind::Exit => Kind::Exit(match self.signal {
                Some(signal) => ExitStatus::Signal(signal),
                None => ExitStatus::Code(want(self.code, "code")?),
            }),
            LineKind::Detach => Kind::Detach,
            LineKind::Stack | LineKind::Summary => return Ok(None),
        }))
    }

    /// The range, from the strings, because another program may have rounded the numbers.
    fn range(&self) -> Result<VaRange, String> {
        let number = |key: &str, text: &str| {
            let digits = text
                .strip_prefix("0x")
                .and_then(|digits| u128::from_str_radix(digits, 16).ok());
            digits.ok_or_else(|| format!("{key} {text:?} is no address in hexadecimal"))
        };
        let (start, end) = (number("start", &self.start)?, number("end", &self.end)?);
        let whole = |at: u128| at % u128::from(mmu_notifier::PAGE_SIZE) == 0;
        let bytes = end
            .checked_sub(start)
            .filter(|bytes| *bytes > 0 && whole(start) && whole(end));
        let range = match (u64::try_from(start), bytes.map(u64::try_from)) {
            (Ok(start), Some(Ok(bytes))) => VaRange::covering(Va::new(start), bytes).ok(),
            (Ok(0), Some(Err(_))) if end == 1 << 64 => Some(VaRange::ALL),
            _ => None,
        };
        range.ok_or_else(|| format!("{}-{} is no range of pages", self.start, self.end))
    }

    fn stack(self) -> Result<Said, String> {
        let frame = |frame: Frame| stacks::Frame {
            function: frame.function,
            module: frame.module,
            line: frame.line,
            has_name: frame.named,
        };
        let frames = self.frames.into_iter().map(frame).collect();
        Ok(Said::Stack(
            want(self.site, "site")?,
            stacks::Stack {
                frames,
                place: self.place.unwrap_or(0),
                is_partial: self.partial,
            },
        ))
    }
}

fn want<T>(value: Option<T>, key: &str) -> Result<T, String> {
    value.ok_or_else(|| format!("it has no {key:?}"))
}

/// System calls by their names.
///
/// A running trace has the names from a table of the tracer. A recorded trace may come from another
/// version with other names. So the names of a recorded trace are leaked, to live as
/// long as the program.
#[derive(Debug, Default)]
pub(super) struct Causes(Vec<&'static str>);

/// The limits of the names: their count and their length. Fewer system calls change memory, and
/// their names are shorter.
const MOST_CAUSES: usize = 256;
const LONGEST_CAUSE: usize = 64;

impl Causes {
    fn get(&mut self, name: &str) -> Result<&'static str, String> {
        if let Some(known) = self.0.iter().find(|known| **known == name) {
            return Ok(known);
        }
        if name.len() > LONGEST_CAUSE || self.0.len() == MOST_CAUSES {
            return Err(format!(
                "cause {:?} is no system call",
                name.get(..LONGEST_CAUSE).unwrap_or(name)
            ));
        }
        let name: &'static str = Box::leak(name.into());
        self.0.push(name);
        Ok(name)
    }
}
