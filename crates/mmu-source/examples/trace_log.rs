//! Runs a program and writes a line for the start and for the end of every invalidation that the
//! program causes: `trace_log FILE PROG [ARGS..]`.
//!
//! The callbacks of this program lock, format and write. They may do so, because they run for other
//! processes only. Callbacks for this process's own address space must not: see `own_process.rs`.
//!
//! The benchmarks compare this program with strace: `trace_log /dev/null PROG`.

use std::env;
use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{LazyLock, Mutex, OnceLock};

use mmu_notifier::{InvalidateRange, MmWithUser, Notifier, Subscription, Subsystem};
use mmu_source::process::{Command, ExitStatus, Observer, Options, Task, Tracer, current};

static LOG: OnceLock<Mutex<BufWriter<File>>> = OnceLock::new();

/// Writes the invalidations of one address space.
struct Lines;

impl Lines {
    fn line(&self, kind: &str, range: &InvalidateRange<'_>) {
        let (Some(log), Some(current)) = (LOG.get(), current()) else {
            return;
        };
        let mut log = log.lock().expect("no thread panics with the log locked");
        let (task, event, range) = (current.task, range.event().name(), range.range());
        // If the disk is full, the log ends and the program continues.
        let _ = writeln!(
            log,
            "{} {kind} {event} {} {range} {:?}",
            task.tid, current.cause, current.result
        );
    }
}

impl Notifier for Lines {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        self.line("start", range);
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        self.line("end", range);
    }
}

static LINES: LazyLock<Subsystem<Lines>> = LazyLock::new(|| Subsystem::new(|_| Ok(Lines)));

struct GetAndPut;

impl Observer for GetAndPut {
    type Held = Subscription<Lines>;

    fn enter(&mut self, _: Task, mm: &MmWithUser) -> Subscription<Lines> {
        LINES
            .get(mm)
            .expect("the first task of an address space enters while no bracket is open on it")
    }

    fn leave(&mut self, _: Task, held: Subscription<Lines>) {
        held.put();
    }
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut args = env::args_os().skip(1);
    let file = args.next().ok_or("usage: trace_log FILE PROG [ARGS..]")?;
    let program = args.next().ok_or("usage: trace_log FILE PROG [ARGS..]")?;
    let log = LOG.get_or_init(|| {
        Mutex::new(BufWriter::new(
            File::create(file).expect("the log can be written"),
        ))
    });
    let mut tracer = Tracer::new(Options::default(), GetAndPut)?;
    tracer.spawn(Command::new(program).args(args))?;
    tracer.run(&AtomicBool::new(false))?;
    log.lock()
        .expect("no thread panics with the log locked")
        .flush()?;
    Ok(match tracer.exit_status() {
        Some(ExitStatus::Code(code)) => ExitCode::from(code as u8),
        _ => ExitCode::FAILURE,
    })
}
