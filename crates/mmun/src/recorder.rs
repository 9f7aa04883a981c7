//! Every record passes through the recorder, which adds the time and passes the record to each
//! output.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mmu_notifier::Va;

use crate::capture::Capture;
use crate::capture::runtime::{Overhead, Runtime};
use crate::change::{Change, Pairs, Seen};
use crate::events::EventSet;
use crate::json;
use crate::lifecycle::Lifecycle;
use crate::output::Output;
use crate::record::{Extra, Kind, Mapping, Record};
use crate::stacks::Stacks;
use crate::status::Progress;
use crate::summary::{Sources, Summary, Wanted};
use crate::text::{Color, Text};
use crate::who::{Programs, Who};

/// What to record, and how.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    /// `None`: no records are written.
    pub(crate) form: Option<Form>,
    pub(crate) events: EventSet,
    pub(crate) summary: Option<Wanted>,
    /// Write the summary as JSON.
    pub(crate) json: bool,
    pub(crate) lifecycle: bool,
    /// Record the mapping and memory of each range, and the time of each call.
    pub(crate) details: bool,
    /// The time of a call that does nothing.
    pub(crate) overhead: Overhead,
    /// Whether every task of a traced process is traced.
    pub(crate) follow: bool,
    /// Take stacks; the functions in the list are never the place of a call.
    pub(crate) stacks: Option<Vec<String>>,
    /// Write the stacks; otherwise they serve the table of places only.
    pub(crate) list_stacks: bool,
    /// Keep the time of each munmap, to measure calls that do nothing.
    pub(crate) samples: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Json,
    Text(Color),
}

/// Shared by the tracing thread and the thread that frees notifiers.
#[derive(Debug)]
pub(crate) struct Recorder {
    inner: Mutex<Inner>,
    /// Called when an output cannot be written any more.
    give_up: fn(),
}

#[derive(Debug)]
struct Inner {
    begin: Instant,
    events: EventSet,
    writer: Option<Writer>,
    /// How the summary is written.
    json: bool,
    who: Who,
    programs: Programs,
    capture: Option<Capture>,
    stacks: Option<Stacks>,
    list_stacks: bool,
    pairs: Pairs,
    summary: Option<Summary>,
    lifecycle: Option<Lifecycle>,
    samples: Option<Vec<u64>>,
    output: Output,
    progress: Progress,
    /// Gets every record as JSON, independently of the output.
    spool: Option<Output>,
}

#[derive(Debug)]
enum Writer {
    Json,
    Text(Text),
}

impl Recorder {
    /// Starts the clock of the trace. During the trace `give_up` is called when an output cannot be
    /// written any more, once for each output.
    pub(crate) fn new(settings: Settings, output: Output, give_up: fn()) -> Recorder {
        let writer = settings.form.map(|form| match form {
            Form::Json => Writer::Json,
            Form::Text(color) => Writer::Text(Text::new(color)),
        });
        let mut capture = settings.details.then(Capture::default);
        if let Some(capture) = &mut capture {
            capture.runtime = Runtime::new(settings.overhead, settings.follow);
        }
        let inner = Inner {
            begin: Instant::now(),
            events: settings.events,
            writer,
            json: settings.json,
            who: Who::default(),
            programs: Programs::default(),
            capture,
            stacks: settings.stacks.map(Stacks::new),
            list_stacks: settings.list_stacks,
            pairs: Pairs::default(),
            summary: settings.summary.map(Summary::new),
            lifecycle: settings.lifecycle.then(Lifecycle::default),
            samples: settings.samples.then(Vec::new),
            output,
            progress: Progress::default(),
            spool: None,
        };
        Recorder {
            inner: Mutex::new(inner),
            give_up,
        }
    }

    /// Writes every record, and the stacks, to `spool` as well, as JSON.
    pub(crate) fn spool_to(&self, spool: Output) {
        self.lock().spool = Some(spool);
    }

    /// Records an event, with the current time.
    pub(crate) fn record(&self, record: &Record) {
        let mut inner = self.lock();
        let events = inner.events;
        let wanted = record.span().is_none_or(|span| events.contains(span.event));
        let seen = if wanted { inner.look(record) } else { None };
        if let Some(stacks) = &mut inner.stacks {
            stacks.follow(record);
        }
        if !wanted {
            return;
        }
        match record.kind {
            Kind::Start(_) | Kind::Map(_) => inner.progress.events += 1,
            Kind::Get { .. } => inner.progress.tasks += 1,
            Kind::Put { .. } => inner.progress.tasks = inner.progress.tasks.saturating_sub(1),
            _ => {}
        }
        // The clock is read under the lock, so that times do not decrease from line to line.
        let t = inner.now();
        if inner.add(t, record, seen) {
            (self.give_up)();
        }
    }

    /// Writes the buffered records, the stacks, the summary and the table of the lifecycle. Later
    /// records are lost.
    ///
    /// # Errors
    /// The first write that failed, now or earlier, with the output's name.
    pub(crate) fn finish(&self) -> Result<(), (String, io::Error)> {
        let mut inner = self.lock();
        inner.finish();
        inner.writer = None;
        let spool = inner.spool.take();
        match spool
            .iter()
            .chain([&inner.output])
            .find_map(|output| Some((output.name(), output.failure()?)))
        {
            None => Ok(()),
            Some((name, error)) => Err((name, copy(error))),
        }
    }

    /// The time of each munmap, if it was kept.
    pub(crate) fn take_samples(&self) -> Vec<u64> {
        self.lock().samples.take().unwrap_or_default()
    }

    /// Ends the trace before it began: discards buffered records and all later ones.
    pub(crate) fn discard(&self) {
        let mut inner = self.lock();
        (inner.writer, inner.summary, inner.lifecycle, inner.spool) = (None, None, None, None);
        inner.output.discard();
    }

    /// How many ranges could not be examined.
    pub(crate) fn unseen(&self) -> u64 {
        self.lock()
            .capture
            .as_ref()
            .map_or(0, |capture| capture.unseen)
    }

    /// How far the trace has come.
    pub(crate) fn progress(&self) -> Progress {
        self.lock().progress
    }

    /// Writes the buffered records.
    pub(crate) fn flush(&self) {
        if self.lock().output.flush() {
            (self.give_up)();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn now(&self) -> u64 {
        self.begin.elapsed().as_nanos() as u64
    }

    /// Examines a task that is stopped before or after a call. The time of the record is read
    /// afterwards, so the time between a start and its end does not include the examination before
    /// the start.
    fn look(&mut self, record: &Record) -> Option<Seen> {
        let Record { task, mm, .. } = *record;
        let capture = self.capture.as_mut()?;
        match record.kind {
            Kind::Start(span) => {
                let mut seen = capture.look(task, mm, &span);
                if self.pairs.open(task.tid) == 0 {
                    capture.runtime.begin(task);
                }
                if let Some(stacks) = &mut self.stacks {
                    seen.site = stacks.take(task, capture);
                }
                return Some(seen);
            }
            Kind::Map(Mapping { range, .. }) => {
                let end = range.end().map_or(u64::MAX, Va::get);
                let what = capture.what(task.tid, mm, range.start().get(), end);
                let site = self
                    .stacks
                    .as_mut()
                    .and_then(|stacks| stacks.take(task, capture));
                return Some(Seen {
                    what,
                    pages: None,
                    site,
                });
            }
            Kind::End(_, Some(_)) => capture.runtime.end(task),
            Kind::End(_, None) => capture.runtime.forget(task.tid),
            Kind::Exit(_) | Kind::Detach => capture.left(task),
            Kind::Get { .. } => capture.entered(task, mm),
            Kind::MmRelease => capture.released(mm),
            _ => {}
        }
        None
    }

    /// Writes a record to each output. `true` if a write failed.
    fn add(&mut self, t: u64, record: &Record, seen: Option<Seen>) -> bool {
        let change = self.pair(t, record, seen);
        let names = self.capture.as_ref().map(|capture| &capture.names);
        let comm = self.who.name(record.task, &record.kind);
        let is_written = self.writer.is_some() || self.spool.is_some();
        let program = is_written.then(|| self.programs.of(record)).flatten();
        let extra = Extra {
            comm,
            program: program.as_deref(),
            what: seen
                .and_then(|seen| seen.what)
                .and_then(|what| Some(names?.text(what))),
            pages: seen.and_then(|seen| seen.pages),
            site: seen.and_then(|seen| seen.site),
            own: change.and_then(|change| change.own),
        };
        if let (Some(summary), Some(change)) = (&mut self.summary, &change) {
            summary.add(change, comm);
        }
        if let Some(lifecycle) = &mut self.lifecycle {
            lifecycle.add(record, comm);
        }
        if let (Some(samples), Some(change)) = (&mut self.samples, change) {
            if change.span.cause == "munmap" {
                samples.extend(change.own);
            }
        }
        let mut has_failed = false;
        if let Some(spool) = &mut self.spool {
            json::write(&mut spool.buffer, t, record, &extra);
            has_failed = spool.settle();
        }
        let extra = Extra {
            site: extra.site.filter(|_| self.list_stacks),
            ..extra
        };
        let out = &mut self.output.buffer;
        match &mut self.writer {
            Some(Writer::Json) => json::write(out, t, record, &extra),
            Some(Writer::Text(text)) => text.write(out, t, record, &extra),
            None => return has_failed,
        }
        self.output.settle() || has_failed
    }

    /// Pairs a start with its end, for the outputs that need changes.
    fn pair(&mut self, t: u64, record: &Record, seen: Option<Seen>) -> Option<Change> {
        if self.capture.is_none() && self.summary.is_none() {
            return None;
        }
        match record.kind {
            Kind::Start(span) => {
                self.pairs.begin(t, record, span, seen.unwrap_or_default());
                None
            }
            Kind::End(span, result) => {
                let mut change = self.pairs.end(t, record, span, result)?;
                if change.is_call {
                    change.own = self
                        .capture
                        .as_mut()
                        .and_then(|capture| capture.runtime.take(record.task.tid));
                }
                Some(change)
            }
            _ => None,
        }
    }

    fn finish(&mut self) {
        let t = self.now();
        let out = &mut self.output.buffer;
        if let Some(Writer::Text(text)) = &mut self.writer {
            text.flush(out);
        }
        let has_places = self.stacks.is_some();
        let stacks = self.stacks.take().map(Stacks::resolve).unwrap_or_default();
        if let Some(spool) = &mut self.spool {
            stacks.write_json(&mut spool.buffer, t);
            spool.flush();
        }
        match self.writer.as_ref().filter(|_| self.list_stacks) {
            Some(Writer::Json) => stacks.write_json(out, t),
            Some(Writer::Text(_)) => stacks.write_text(out),
            None => {}
        }
        let names = self.capture.as_ref().map(|capture| &capture.names);
        let mut space = self.writer.is_some();
        let mut part = |out: &mut Vec<u8>| {
            if std::mem::replace(&mut space, true) {
                out.push(b'\n');
            }
        };
        if let Some(summary) = self.summary.take() {
            let sources = Sources {
                names,
                stacks: &stacks,
                has_places,
            };
            if self.json {
                summary.write_json(out, t, &sources, self.lifecycle.as_ref());
            } else {
                part(out);
                summary.write_text(out, &sources);
            }
        }
        if let Some(lifecycle) = self.lifecycle.take().filter(|_| !self.json) {
            part(out);
            lifecycle.write_text(out);
        }
        self.output.flush();
    }
}

/// Copies an error, because `io::Error` is not `Clone`: its error code, or its kind if it has no
/// code.
fn copy(error: &io::Error) -> io::Error {
    error
        .raw_os_error()
        .map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use mmu_source::process::Task;

    use super::*;

    #[test]
    fn times_never_decrease_in_a_file_two_threads_write() {
        let path = std::env::temp_dir().join(format!("mmun-recorder-{}", std::process::id()));
        let settings = Settings {
            form: Some(Form::Json),
            ..Settings::default()
        };
        let recorder = Recorder::new(settings, Output::open(Some(&path)).unwrap(), || {
            panic!("the output failed")
        });
        let record = Record {
            task: Task { pid: 1, tid: 1 },
            mm: 1,
            kind: Kind::Free,
        };
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..2000).for_each(|_| recorder.record(&record)));
            }
        });
        recorder.finish().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let times: Vec<u64> = text
            .lines()
            .map(|line| line[11..].split(',').next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(times.len(), 4000);
        assert!(times.is_sorted());
    }
}
