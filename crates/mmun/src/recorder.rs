//! The one place all records pass: it gives them their time and hands them to whoever wants them.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::events::EventSet;
use crate::json;
use crate::output::Output;
use crate::record::{Kind, Record};
use crate::summary::Summary;
use crate::text::{Color, Text};

/// What to record, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) form: Form,
    pub(crate) events: EventSet,
    pub(crate) content: Content,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Json,
    Text(Color),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Records,
    RecordsAndSummary,
    Summary,
}

/// Shared by the tracing thread and the thread that frees notifiers.
#[derive(Debug)]
pub(crate) struct Recorder {
    inner: Mutex<Inner>,
    /// Called when the output cannot be written any more.
    give_up: fn(),
}

#[derive(Debug)]
struct Inner {
    begin: Instant,
    events: EventSet,
    writer: Option<Writer>,
    /// How the summary is written, too.
    form: Form,
    summary: Option<Summary>,
    output: Output,
}

#[derive(Debug)]
enum Writer {
    Json,
    Text(Text),
}

impl Recorder {
    /// The trace begins now. `give_up` is called once, when the output cannot be written any more.
    pub(crate) fn new(settings: Settings, output: Output, give_up: fn()) -> Recorder {
        let Settings { form, events, content } = settings;
        let writer = match form {
            _ if content == Content::Summary => None,
            Form::Json => Some(Writer::Json),
            Form::Text(color) => Some(Writer::Text(Text::new(color))),
        };
        let summary = (content != Content::Records).then(Summary::default);
        let inner = Inner { begin: Instant::now(), events, writer, form, summary, output };
        Recorder { inner: Mutex::new(inner), give_up }
    }

    /// Records what happened just now.
    pub(crate) fn record(&self, record: &Record) {
        let mut inner = self.lock();
        if let Kind::Start(span) | Kind::End(span, _) = &record.kind
            && !inner.events.contains(span.event)
        {
            return;
        }
        // The clock is read under the lock: times do not decrease from line to line.
        let t = inner.now();
        if inner.add(t, record) {
            (self.give_up)();
        }
    }

    /// Writes what is left, and the summary. Records that come later are lost.
    ///
    /// # Errors
    /// The first write that failed, now or earlier, with the output's name.
    pub(crate) fn finish(&self) -> Result<(), (String, io::Error)> {
        let mut inner = self.lock();
        inner.finish();
        inner.writer = None;
        match inner.output.failure() {
            None => Ok(()),
            Some(error) => Err((inner.output.name(), copy(error))),
        }
    }

    /// There will be no trace: what waits to be written never is, nor any record from now on.
    pub(crate) fn discard(&self) {
        let mut inner = self.lock();
        (inner.writer, inner.summary) = (None, None);
        inner.output.discard();
    }

    /// Writes what waits to be written.
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

    /// `true` if the output failed just now.
    fn add(&mut self, t: u64, record: &Record) -> bool {
        if let Some(summary) = &mut self.summary {
            summary.add(t, record);
        }
        let out = &mut self.output.buffer;
        match &mut self.writer {
            Some(Writer::Json) => json::write(out, t, record),
            Some(Writer::Text(text)) => text.write(out, t, record),
            None => return false,
        }
        self.output.settle()
    }

    fn finish(&mut self) {
        let t = self.now();
        let out = &mut self.output.buffer;
        if let Some(Writer::Text(text)) = &mut self.writer {
            text.flush(out);
        }
        if let Some(summary) = self.summary.take() {
            match self.form {
                Form::Json => summary.write_json(out, t),
                Form::Text(_) => {
                    if self.writer.is_some() {
                        out.push(b'\n');
                    }
                    summary.write_text(out);
                }
            }
        }
        self.output.flush();
    }
}

/// Errors cannot be cloned; those of writing have a number.
fn copy(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use mmu_source::process::Task;

    use super::*;

    #[test]
    fn times_never_decrease_in_a_file_two_threads_write() {
        let path = std::env::temp_dir().join(format!("mmun-recorder-{}", std::process::id()));
        let settings = Settings { form: Form::Json, events: EventSet::ALL, content: Content::Records };
        let recorder = Recorder::new(settings, Output::open(Some(&path)).unwrap(), || panic!("the output failed"));
        let record = Record { task: Task { pid: 1, tid: 1 }, mm: 1, kind: Kind::Free };
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..2000).for_each(|_| recorder.record(&record)));
            }
        });
        recorder.finish().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let times: Vec<u64> = text.lines().map(|line| line[11..].split(',').next().unwrap().parse().unwrap()).collect();
        assert_eq!(times.len(), 4000);
        assert!(times.is_sorted());
    }
}
