//! A recorded trace in memory, read from the output of `mmun trace --json`.
//!
//! Reports, comparisons and other formats all use this model. It ignores keys and kinds that this
//! version does not know, as `docs/trace-json.md` demands of every reader.

mod line;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use mmu_source::process::Task;

use crate::change::{Change, Pairs, Seen};
use crate::intern::{Name, Names};
use crate::output::is_standard;
use crate::record::{Kind, Mapping, Record};
use crate::stacks::{Resolved, Stack};

use self::line::{Causes, Said};

/// A trace, from its first record to its last.
#[derive(Debug, Default)]
pub(crate) struct Recording {
    /// The time of the last record, in nanoseconds since the trace began.
    pub(crate) end: u64,
    /// The address spaces by their ids (`mm`).
    pub(crate) spaces: BTreeMap<u64, Space>,
    /// Every range whose start and end are in the trace, in the order of the ends.
    pub(crate) changes: Vec<Changed>,
    /// Every mapping that was made, if births were recorded.
    pub(crate) births: Vec<Born>,
    /// The other records, in order: the lives of tasks, address spaces and notifiers.
    pub(crate) life: Vec<Lived>,
    pub(crate) names: Names,
    pub(crate) stacks: Resolved,
    /// Starts whose end is not in the trace.
    pub(crate) unfinished: usize,
    /// Whether the last line is incomplete, because the trace was cut while it was written.
    pub(crate) is_cut: bool,
}

/// An address space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Space {
    /// The first process in it.
    pub(crate) pid: i32,
    /// The latest known name of a task of that process, in the names of the [`Recording`].
    pub(crate) comm: Name,
    /// The path of its program, empty if it is not known.
    pub(crate) program: Name,
    pub(crate) began: u64,
    /// When its last task left it; the end of the trace if that is not recorded.
    pub(crate) ended: u64,
}

/// A change, and where it happened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Changed {
    pub(crate) change: Change,
    pub(crate) mm: u64,
    /// The name of the task.
    pub(crate) comm: Name,
}

/// A mapping when it was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Born {
    pub(crate) t: u64,
    pub(crate) task: Task,
    /// The name of the task.
    pub(crate) comm: Name,
    pub(crate) mm: u64,
    pub(crate) mapping: Mapping,
    pub(crate) what: Option<Name>,
    pub(crate) site: Option<u32>,
}

/// A record that is neither a change nor a mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lived {
    pub(crate) t: u64,
    pub(crate) record: Record,
    pub(crate) comm: Name,
}

/// Why a file could not be read.
#[derive(Debug)]
pub(crate) enum ReadError {
    Io(io::Error),
    /// The line, counted from 1, and what is wrong with it.
    Line(usize, String),
    Empty,
    /// The file has lines of a trace, such as a summary, but none of them is a record.
    /// `--summary-only` writes such a file.
    NoRecords,
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const HINT: &str = "a trace is written by 'mmun trace --json -o FILE PROG'";
        match self {
            ReadError::Io(error) => f.write_str(&crate::reason(error)),
            ReadError::Line(number, what) => {
                write!(f, "line {number} is no record of a trace ({what}); {HINT}")
            }
            ReadError::Empty => write!(f, "there is no record in it; {HINT}"),
            ReadError::NoRecords => write!(
                f,
                "no records: totals only, or no change was traced; {HINT}"
            ),
        }
    }
}

/// The name of the input file in messages.
pub(crate) fn input_name(path: &Path) -> String {
    if is_standard(path) {
        "standard input".into()
    } else {
        path.display().to_string()
    }
}

/// The latest time of a line that is accepted: no trace takes 292 years.
const LAST: u64 = i64::MAX as u64;

/// The maximum length of a line: a longer line cannot be a record, and would fill the memory.
const LONGEST_LINE: u64 = 64 << 20;

impl Recording {
    /// Reads a file, or standard input if `path` is `-`.
    ///
    /// # Errors
    /// The file cannot be read, or it is not a trace of version 1. An incomplete last line is no
    /// error, unless it is the only line.
    pub(crate) fn open(path: &Path) -> Result<Recording, ReadError> {
        if is_standard(path) {
            return Recording::read(io::stdin().lock());
        }
        let file = File::open(path).map_err(ReadError::Io)?;
        Recording::read(BufReader::with_capacity(1 << 18, file))
    }

    /// # Errors
    /// As [`Recording::open`].
    pub(crate) fn read(mut input: impl BufRead) -> Result<Recording, ReadError> {
        let mut reader = Reader::default();
        let mut bytes = Vec::new();
        for number in 1.. {
            bytes.clear();
            let count = input
                .by_ref()
                .take(LONGEST_LINE)
                .read_until(b'\n', &mut bytes)
                .map_err(ReadError::Io)?;
            if count == 0 {
                break;
            }
            let is_whole = bytes.ends_with(b"\n");
            if !is_whole && count as u64 == LONGEST_LINE {
                return Err(ReadError::Line(
                    number,
                    format!("longer than {} MiB", LONGEST_LINE >> 20),
                ));
            }
            if bytes.trim_ascii().is_empty() {
                continue;
            }
            match reader.line(&bytes) {
                Ok(()) => {}
                Err(_) if !is_whole && number > 1 => reader.recording.is_cut = true,
                Err(what) => return Err(ReadError::Line(number, what)),
            }
        }
        reader.finish()
    }
}

#[derive(Default)]
struct Reader {
    recording: Recording,
    pairs: Pairs,
    /// How many ranges are open.
    open: usize,
    causes: Causes,
    stacks: Vec<(u32, Stack)>,
    has_line: bool,
    has_record: bool,
}

impl Reader {
    fn line(&mut self, bytes: &[u8]) -> Result<(), String> {
        let Reader {
            recording,
            pairs,
            causes,
            ..
        } = self;
        let (t, said) = line::read(bytes, &mut recording.names, causes)?;
        if t > LAST {
            return Err(format!("its time {t} is later than any"));
        }
        if t < recording.end {
            return Err(format!("its time {t} is before that of an earlier line"));
        }
        recording.end = t;
        self.has_line = true;
        let (record, comm, program, seen, own) = match said {
            Said::Other => return Ok(()),
            Said::Stack(site, stack) => {
                self.stacks.push((site, stack));
                return Ok(());
            }
            Said::Record {
                record,
                comm,
                program,
                seen,
                own,
            } => (record, comm, program, seen, own),
        };
        self.has_record = true;
        recording.see(t, &record, comm, program);
        match record.kind {
            Kind::Start(span) => {
                pairs.begin(t, &record, span, seen);
                self.open += 1;
            }
            Kind::End(span, result) => {
                if let Some(change) = pairs.end(t, &record, span, result) {
                    self.open -= 1;
                    recording.changes.push(Changed {
                        change: Change { own, ..change },
                        mm: record.mm,
                        comm,
                    });
                }
            }
            Kind::Map(mapping) => {
                let Seen { what, site, .. } = seen;
                recording.births.push(Born {
                    t,
                    task: record.task,
                    comm,
                    mm: record.mm,
                    mapping,
                    what,
                    site,
                });
            }
            _ => recording.life.push(Lived { t, record, comm }),
        }
        Ok(())
    }

    fn finish(self) -> Result<Recording, ReadError> {
        let Reader {
            mut recording,
            stacks,
            open,
            has_line,
            has_record,
            ..
        } = self;
        if !has_record {
            return Err(if has_line {
                ReadError::NoRecords
            } else {
                ReadError::Empty
            });
        }
        recording.stacks = Resolved::of(stacks);
        recording.unfinished = open;
        let end = recording.end;
        recording
            .spaces
            .values_mut()
            .for_each(|space| space.ended = space.ended.min(end));
        Ok(recording)
    }
}

impl Recording {
    /// Updates the address space of a record.
    fn see(&mut self, t: u64, record: &Record, comm: Name, program: Option<Name>) {
        let nothing = self.names.number("");
        let space = self.spaces.entry(record.mm).or_insert(Space {
            pid: record.task.pid,
            comm,
            program: nothing,
            began: t,
            ended: u64::MAX,
        });
        // The task of a call on another process is not in this address space.
        if record.task.pid == space.pid && comm != nothing {
            space.comm = comm;
        }
        if let Some(program) = program {
            space.program = program;
        }
        if matches!(record.kind, Kind::MmRelease) {
            space.ended = t;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Recording, ReadError> {
        Recording::read(text.as_bytes())
    }

    const NEW: &str = r#"{"v":1,"t":5,"kind":"mm_new","pid":7,"tid":7,"mm":1,"comm":"prog","program":"/bin/prog"}"#;
    const START: &str = r#"{"v":1,"t":9,"kind":"start","pid":7,"tid":7,"mm":1,"event":"unmap","cause":"munmap","start":"0x1000","end":"0x3000","blockable":true,"address":4096,"bytes":8192,"comm":"prog","what":"a\"b","resident":4096,"file":0,"huge":0,"swapped":0,"site":3}"#;
    const END: &str = r#"{"v":1,"t":11,"kind":"end","pid":7,"tid":7,"mm":1,"event":"unmap","cause":"munmap","start":"0x1000","end":"0x3000","blockable":true,"address":4096,"bytes":8192,"result":0,"comm":"prog","self":1}"#;
    const STACK: &str = r#"{"v":1,"t":12,"kind":"stack","site":3,"place":1,"frames":[{"function":"munmap","module":"libc.so.6","line":"","named":true},{"function":"main","module":"prog","line":"a.c:3","named":true}]}"#;

    #[test]
    fn a_change_is_read_with_all_details() {
        let recording = read(&[NEW, START, END, STACK, ""].join("\n")).unwrap();
        let [changed] = recording.changes[..] else {
            panic!("one change")
        };
        let Change {
            began,
            ended,
            result,
            own,
            seen,
            is_call,
            ..
        } = changed.change;
        assert_eq!(
            (began, ended, result, own, is_call),
            (9, 11, Some(0), Some(1), true)
        );
        assert_eq!(recording.names.text(seen.what.unwrap()), "a\"b");
        assert_eq!(
            (seen.pages.unwrap().resident, changed.change.bytes()),
            (4096, 8192)
        );
        assert_eq!(recording.stacks.place(seen.site), "main (prog a.c:3)");
        let space = recording.spaces[&1];
        assert_eq!(
            (
                recording.names.text(space.program),
                space.began,
                space.ended
            ),
            ("/bin/prog", 5, 12)
        );
        assert_eq!(
            (recording.end, recording.life.len(), recording.unfinished),
            (12, 1, 0)
        );
    }

    #[test]
    fn unknown_keys_and_kinds_are_ignored() {
        let later = [
            r#"{"v":1,"t":6,"kind":"telepathy","colour":[1,{"a":null}]}"#.to_owned(),
            NEW.replace(r#""t":5"#, r#""t":7,"new":{"x":[]}"#),
            START.replace("unmap\",\"c", "dream\",\"c"),
            END.replace("unmap\",\"c", "dream\",\"c"),
        ];
        let recording = read(&later.join("\n")).unwrap();
        assert_eq!((recording.changes.len(), recording.life.len()), (0, 1));
    }

    #[test]
    fn a_cut_last_line_is_noted_and_a_broken_one_before_is_refused() {
        let recording = read(&format!("{NEW}\n{START}\n{}", &END[..70])).unwrap();
        assert!(recording.is_cut && recording.unfinished == 1);
        let error = read(&format!("{NEW}\n{}\n{END}\n", &START[..70]))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("line 2 is no record of a trace (") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn a_file_with_totals_only_is_refused() {
        let text = r#"{"v":1,"t":9,"kind":"summary","events":{},"where":[]}"#;
        let error = read(&format!("{text}\n")).unwrap_err().to_string();
        assert!(error.starts_with("no records: totals only"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_a_trace_is_refused_in_one_line() {
        for text in [
            "",
            "\n \n",
            "{}",
            "hello",
            "[]",
            "{\"v\":1}",
            "{\"v\":2,\"t\":0,\"kind\":\"get\"}\n",
            "\u{0}\n",
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(
                !error.contains('\n') && error.contains("mmun trace --json"),
                "{text:?}: {error}"
            );
        }
        let back = format!("{START}\n{NEW}\n");
        assert!(
            read(&back)
                .unwrap_err()
                .to_string()
                .contains("line 2 is no record of a trace (its time")
        );
        for bad in [
            START.replace("0x1000", "0x1001"),
            START.replace("0x3000", "0x1000"),
            START.replace("0x3000", "3"),
        ] {
            assert!(read(&format!("{bad}\n")).is_err(), "{bad}");
        }
    }
}
