//! A recorder: lists the callbacks of a subscriber and of an observer.

use std::convert::Infallible;
use std::fs::File;
use std::io::{PipeReader, Read, pipe};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use mmu_notifier::{InvalidateRange, Mm, MmWithUser, Notifier, Subscription, Subsystem, Va};
use mmu_source::process::{
    Command, Done, ExitStatus, Observer, Options, Pid, Task, TaskEvent, Tracer, current,
};

/// The size of a page, also of the programs that are traced.
pub(crate) fn page_size() -> u64 {
    // SAFETY: takes an integer.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}

/// One callback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    Start(Part),
    End(Part, Option<i64>),
    Get {
        task: Task,
        mm: u64,
    },
    Put {
        task: Task,
        mm: u64,
        cause: &'static str,
    },
    Release {
        task: Task,
        mm: u64,
    },
    Free {
        mm: u64,
    },
    New {
        task: Task,
        mm: u64,
    },
    Fork {
        task: Task,
        child: Task,
        mm: u64,
        child_mm: u64,
    },
    Exec {
        task: Task,
        mm: u64,
        old_mm: u64,
    },
    Exit {
        task: Task,
        mm: u64,
        status: ExitStatus,
    },
    Detach {
        task: Task,
        mm: u64,
    },
}

/// One bracket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) task: Task,
    pub(crate) mm: u64,
    pub(crate) cause: &'static str,
    pub(crate) event: &'static str,
    pub(crate) start: u64,
    /// Zero if the range includes the last address.
    pub(crate) end: u64,
}

/// The function that every start callback calls, while the task is stopped before its call.
type OnStart = Box<dyn Fn(&Part) + Send + Sync>;

pub(crate) struct Log {
    records: Mutex<Vec<Record>>,
    on_start: OnStart,
}

impl Log {
    fn push(&self, record: Record) {
        self.records
            .lock()
            .expect("no thread panics with the log locked")
            .push(record);
    }
}

/// The subscriber of one address space.
pub(crate) struct Probe {
    log: Arc<Log>,
    mm: u64,
}

fn part(range: &InvalidateRange<'_>) -> Part {
    let current = current().expect("callbacks run on behalf of a task");
    Part {
        task: current.task,
        mm: range.mm().id(),
        cause: current.cause,
        event: range.event().name(),
        start: range.range().start().get(),
        end: range.range().end().map_or(0, Va::get),
    }
}

impl Notifier for Probe {
    fn release(&self, mm: &Mm) {
        let task = current().expect("release runs on behalf of a task").task;
        self.log.push(Record::Release { task, mm: mm.id() });
    }

    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        let part = part(range);
        assert_eq!(current().expect("set").result, None);
        (self.log.on_start)(&part);
        self.log.push(Record::Start(part));
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        self.log
            .push(Record::End(part(range), current().expect("set").result));
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        assert_eq!(current(), None, "a free runs on behalf of no call");
        self.log.push(Record::Free { mm: self.mm });
    }
}

type Alloc = Box<dyn Fn(&MmWithUser) -> Result<Probe, Infallible> + Send + Sync>;

/// Gets a subscription for every task.
pub(crate) struct Recorder {
    log: Arc<Log>,
    subsystem: Subsystem<Probe, Infallible, Alloc>,
}

impl Recorder {
    pub(crate) fn new() -> Recorder {
        Recorder::with(Box::new(|_| {}))
    }

    pub(crate) fn with(on_start: OnStart) -> Recorder {
        let log = Arc::new(Log {
            records: Mutex::default(),
            on_start,
        });
        let of_probes = Arc::clone(&log);
        let alloc: Alloc = Box::new(move |mm| {
            Ok(Probe {
                log: Arc::clone(&of_probes),
                mm: mm.id(),
            })
        });
        Recorder {
            log,
            subsystem: Subsystem::new(alloc),
        }
    }

    /// Waits for the frees. Checks that everything in the log is paired, and returns the log.
    pub(crate) fn finish(self) -> Vec<Record> {
        self.subsystem
            .synchronize()
            .expect("no bracket is open here");
        let records = std::mem::take(&mut *self.log.records.lock().expect("not poisoned"));
        crate::check::pairs(&records);
        records
    }
}

impl Observer for Recorder {
    type Held = Subscription<Probe>;

    fn enter(&mut self, task: Task, mm: &MmWithUser) -> Self::Held {
        assert_eq!(current().expect("set").task, task);
        let held = self
            .subsystem
            .get(mm)
            .expect("an address space is entered with no bracket open on it");
        self.log.push(Record::Get { task, mm: mm.id() });
        held
    }

    fn leave(&mut self, task: Task, held: Self::Held) {
        let cause = current().expect("set").cause;
        self.log.push(Record::Put {
            task,
            mm: held.mm().id(),
            cause,
        });
        held.put();
    }

    fn event(&mut self, event: &TaskEvent<'_>) {
        self.log.push(match *event {
            TaskEvent::MmNew { task, mm, .. } => {
                assert!(!mm.has_notifiers(), "a new address space has subscribers");
                Record::New { task, mm: mm.id() }
            }
            TaskEvent::Fork {
                task,
                child,
                mm,
                child_mm,
                ..
            } => Record::Fork {
                task,
                child,
                mm: mm.id(),
                child_mm: child_mm.id(),
            },
            TaskEvent::Exec {
                task, mm, old_mm, ..
            } => Record::Exec {
                task,
                mm: mm.id(),
                old_mm: old_mm.id(),
            },
            TaskEvent::Exit {
                task, mm, status, ..
            } => Record::Exit {
                task,
                mm: mm.id(),
                status,
            },
            TaskEvent::Detach { task, mm, .. } => Record::Detach { task, mm: mm.id() },
            ref other => panic!("unexpected: {other:?}"),
        });
    }
}

/// A program that ran to its end under a tracer.
pub(crate) struct Trace {
    pub(crate) pid: Pid,
    pub(crate) records: Vec<Record>,
    pub(crate) stdout: String,
    pub(crate) status: ExitStatus,
}

pub(crate) fn tracee(args: &[&str]) -> Command {
    Command::new(env!("CARGO_BIN_EXE_tracee")).args(args)
}

/// Traces `tracee ARGS` to its end.
pub(crate) fn trace(args: &[&str]) -> Trace {
    trace_with(Options::default(), Recorder::new(), args)
}

pub(crate) fn trace_with(options: Options, recorder: Recorder, args: &[&str]) -> Trace {
    let (stdout, command) = with_stdout(tracee(args));
    let mut tracer = Tracer::new(options, recorder).expect("a tracer");
    let pid = tracer.spawn(command).expect("the tracee starts");
    assert_eq!(
        tracer
            .run(&AtomicBool::new(false))
            .expect("the tracer runs"),
        Done::AllExited
    );
    let status = tracer.exit_status().expect("the tracee has ended");
    let (recorder, keeper) = tracer.detach();
    assert!(!keeper.is_needed());
    Trace {
        pid,
        records: recorder.finish(),
        stdout: read(stdout),
        status,
    }
}

/// Connects standard output to a pipe, and discards standard error. The whole output must fit into
/// the pipe.
pub(crate) fn with_stdout(command: Command) -> (PipeReader, Command) {
    let (read, write) = pipe().expect("a pipe");
    let stderr = File::options()
        .write(true)
        .open("/dev/null")
        .expect("/dev/null");
    (read, command.stdout(write).stderr(stderr))
}

fn read(mut pipe: PipeReader) -> String {
    let mut text = String::new();
    pipe.read_to_string(&mut text).expect("text");
    text
}

impl Trace {
    /// Returns the brackets in the order of their ends, as the tracee prints them.
    pub(crate) fn ends(&self) -> impl Iterator<Item = (&Part, Option<i64>)> {
        self.records.iter().filter_map(|record| match record {
            Record::End(part, result) => Some((part, *result)),
            _ => None,
        })
    }

    /// Returns the words of each output line that begins with `key`.
    pub(crate) fn said(&self, key: &str) -> Vec<Vec<&str>> {
        let words = self
            .stdout
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        words
            .filter(|words| words.first() == Some(&key))
            .map(|words| words[1..].to_vec())
            .collect()
    }
}

pub(crate) fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("a hexadecimal number")
}
