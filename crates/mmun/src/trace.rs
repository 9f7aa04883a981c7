//! `mmun trace`: turns the arguments into a plan, and runs the plan.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use mmu_source::Error;
use mmu_source::process::{Command, Done, Keeper, Options, Pid, Tracer};

use crate::args::{TraceArgs, TraceFormat};
use crate::calibrate;
use crate::capture::runtime::Overhead;
use crate::events::EventSet;
use crate::front;
use crate::observer::TraceObserver;
use crate::outcome::{FAILED, NOT_EXECUTABLE, NOT_FOUND, Outcome};
use crate::output::{Output, STDOUT, is_same, is_standard, must_not_be_used};
use crate::program::Program;
use crate::recorder::{Form, Recorder, Settings};
use crate::report::{Pending, Product};
use crate::status::Status;
use crate::style;
use crate::summary::By;
use crate::sys;
use crate::text::Color;
use crate::{complain, explain_with, reason, refusal};

#[derive(Debug)]
struct Plan {
    target: Target,
    options: Options,
    settings: Settings,
    output: Output,
    /// Whether to show a status line.
    status: bool,
    report: Option<Report>,
}

/// A page or a viewer's file that will be made, and the output for its records.
type Report = (Pending, Output);

#[derive(Debug)]
enum Target {
    Spawn(Vec<OsString>),
    Attach(Vec<Pid>),
}

pub(crate) fn main(args: TraceArgs) -> Outcome {
    let viewer = match args.format {
        Some(TraceFormat::Perfetto) => Some(Product::Perfetto),
        Some(TraceFormat::Chrome) => Some(Product::Chrome),
        _ => None,
    };
    // A process that is attached to has streams of its own.
    if args.pids.is_empty() {
        let outputs = [("-o", &args.output), ("--report", &args.report)];
        let mut outputs = outputs
            .into_iter()
            .filter_map(|(option, path)| Some((option, path.as_deref()?)));
        if let Err(line) =
            outputs.try_for_each(|output| must_not_be_used("trace", output, &args.program))
        {
            complain(&line);
            return FAILED;
        }
    }
    // With a viewer's format, -o names the viewer's file, so a summary goes to standard error.
    let output = match Output::open(args.output.as_deref().filter(|_| viewer.is_none())) {
        Ok(output) => output,
        Err(error) => {
            let name = match args.output.as_deref() {
                None => Output::STDERR.into(),
                Some(path) if is_standard(path) => STDOUT.into(),
                Some(path) => path.display().to_string(),
            };
            complain(&format!(
                "open on {name}: {}; the -o file must be writable",
                reason(&error)
            ));
            return FAILED;
        }
    };
    let product = match (&args.report, viewer, &args.output) {
        (Some(_), Some(_), _) => {
            complain(
                "trace on --format: a file for a viewer and --report cannot be made in one run; 'mmun report' makes both of a --json trace",
            );
            return FAILED;
        }
        (Some(path), ..) => Some((path, Product::Page)),
        (None, viewer, path) => path.as_ref().zip(viewer),
    };
    let report = match product
        .map(|(path, product)| Pending::open(path, product))
        .transpose()
    {
        Ok(report) => report,
        Err(line) => {
            complain(&line);
            return FAILED;
        }
    };
    if let (Some(page), Some(path)) = (&args.report, &args.output) {
        if is_same(page, path) || is_standard(page) && is_standard(path) {
            complain(&format!(
                "trace on {}: -o and --report must name different files",
                path.display()
            ));
            report
                .into_iter()
                .for_each(|(pending, _)| pending.discard());
            return FAILED;
        }
    }
    let plan = Plan::new(args, output, report);
    match plan.target {
        Target::Attach(_) => {
            sys::stop_on_ending_signals();
            sys::heed_alarms();
            trace(plan, None).0
        }
        Target::Spawn(_) => front::run(|front| {
            let (outcome, keeper) = trace(plan, front.pid());
            front.tell(outcome, keeper.is_some());
            if let Some(keeper) = keeper {
                keep(keeper);
            }
        }),
    }
}

impl Plan {
    fn new(args: TraceArgs, output: Output, report: Option<Report>) -> Plan {
        let color = match output.is_terminal() && style::is_wanted() {
            true => Color::Always,
            false => Color::Never,
        };
        let summary = args.summary.wanted(args.summary_only);
        let details = args.details;
        // A page needs all details; a viewer's format has the requested details.
        let page = args.report.is_some();
        let births = details.births || page && !details.no_births;
        let by_place = summary.is_some_and(|wanted| wanted.tables.has(By::Where));
        let stacks = details.stacks || by_place || page;
        let json = args.json || args.format == Some(TraceFormat::Json);
        let only_report = match page {
            true => args.output.is_none() && !json && !details.stacks,
            false => report.is_some(),
        };
        let form = if json { Form::Json } else { Form::Text(color) };
        let settings = Settings {
            form: (!args.summary_only && !only_report).then_some(form),
            events: EventSet::of(&args.events),
            summary,
            json,
            lifecycle: details.lifecycle,
            details: details.details || stacks || summary.is_some(),
            overhead: Overhead::default(),
            follow: !args.no_follow,
            stacks: stacks.then_some(details.not_place),
            list_stacks: details.stacks,
            samples: false,
        };
        let status = settings.form.is_none() && !args.quiet;
        let mut options = Options::default();
        options.follow = !args.no_follow;
        options.seccomp = !args.no_seccomp;
        options.births = births;
        let target = if args.pids.is_empty() {
            Target::Spawn(args.program)
        } else {
            let mut pids = args.pids;
            pids.sort_unstable();
            pids.dedup();
            Target::Attach(pids)
        };
        Plan {
            target,
            options,
            settings,
            output,
            status,
            report,
        }
    }
}

/// The maximum time for which a record is buffered.
const LAG: Duration = Duration::from_millis(200);

/// Never sent: the flusher waits until the other end is dropped.
#[derive(Debug, PartialEq)]
enum Never {}

/// Runs the plan to its end. Returns a keeper if live tracees still need a tracer.
fn trace(mut plan: Plan, front: Option<rustix::process::Pid>) -> (Outcome, Option<Keeper>) {
    if mmu_source::process::proc_is_foreign() {
        complain(
            "/proc is another pid namespace's, so names and details are not known: mount one of this namespace (unshare --mount-proc)",
        );
    }
    if plan.settings.details {
        let mut options = plan.options;
        // A process that is attached to gets no filter.
        options.seccomp &= matches!(plan.target, Target::Spawn(_));
        let overhead = calibrate::overhead(options);
        if overhead.is_none() {
            complain(
                "what a call that does nothing takes could not be measured: times in the calls are some microseconds too long",
            );
        }
        plan.settings.overhead = overhead.unwrap_or_default();
    }
    let recorder = Arc::new(Recorder::new(plan.settings, plan.output, sys::request_stop));
    let mut report = plan.report.map(|(pending, spool)| {
        recorder.spool_to(spool);
        pending
    });
    let mut tracer = match Tracer::new(plan.options, TraceObserver::new(Arc::clone(&recorder))) {
        Ok(tracer) => tracer,
        Err(error) => {
            report.into_iter().for_each(Pending::discard);
            return (fail(&error), None);
        }
    };
    let started = start(&mut tracer, plan.target, front);
    let mut outcome = started.as_ref().err().copied();
    let program = started.ok().flatten();
    if outcome.is_none() {
        let (end, ended) = channel::<Never>();
        let flusher = std::thread::spawn({
            let recorder = Arc::clone(&recorder);
            // A reader of a pipe or of `tail -f` lags at most this much, even while the program is
            // idle.
            let mut status = Status::new(plan.status);
            move || {
                while ended.recv_timeout(LAG) == Err(RecvTimeoutError::Timeout) {
                    recorder.flush();
                    status.tick(|| recorder.progress());
                }
                status.erase();
            }
        });
        outcome = Some(serve(&mut tracer));
        drop(end);
        // The flusher cannot panic: it only writes, and takes a lock that ignores poisoning.
        let _ = flusher.join();
    } else {
        recorder.discard();
        report.take().into_iter().for_each(Pending::discard);
    }
    let (mut observer, mut keeper) = tracer.detach();
    observer.finish();
    let missed = observer.missed();
    let (written, is_reported) = while_kept(&mut keeper, || {
        let written = recorder.finish();
        if missed > 0 {
            complain(&format!(
                "{missed} system calls of an unknown ABI: what they changed is not in the trace"
            ));
        }
        let unseen = recorder.unseen();
        if unseen > 0 {
            complain(&format!(
                "/proc did not show {unseen} of the changed ranges: what lay there, how much was resident and, with -k, where it was changed are not known of them"
            ));
        }
        (written, report.is_none_or(Pending::finish))
    });
    sys::stop_seen();
    let runs_on = match &program {
        Some(program) => !program.has_ended() || keeper.is_needed(),
        None => sys::STOP.load(Relaxed),
    };
    let outcome = match written {
        Err((_, error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            Outcome::Signal(libc::SIGPIPE)
        }
        // No process reads standard error, so a message would not be read either, and writing it
        // might block.
        Err((name, error)) if error.kind() == io::ErrorKind::TimedOut && name == Output::STDERR => {
            FAILED
        }
        Err((name, error)) => {
            complain(&format!(
                "write on {name}: {}; {}",
                reason(&error),
                if runs_on {
                    "the trace ends here, and the program runs on untraced"
                } else {
                    "the trace is incomplete"
                }
            ));
            FAILED
        }
        Ok(()) if !is_reported => FAILED,
        Ok(()) => outcome.unwrap_or(FAILED),
    };
    // The user did not ask for this end. If the shell got its prompt back now, it would share the
    // terminal with the program, and a script would go on before the program has ended.
    let waits = program.filter(|_| sys::asked_by().is_none());
    let asked = waits.and_then(|program| outlast(&program, &mut keeper, front));
    let outcome = asked.map_or(outcome, Outcome::Signal);
    (outcome, Some(keeper).filter(Keeper::is_needed))
}

/// Waits until the program has ended, although it is not traced any more. Returns early if a signal
/// asks this process to end, which is returned, or if the front has ended.
fn outlast(
    program: &Program,
    keeper: &mut Keeper,
    front: Option<rustix::process::Pid>,
) -> Option<i32> {
    if program.has_ended() {
        return None;
    }
    // The signal that arrives just before a wait does not interrupt it, but its handler starts the
    // timer, which does.
    let is_over =
        || sys::asked_by().is_some() || rustix::process::getppid() != front || program.has_ended();
    keeper.serve_until(is_over);
    while !is_over() {
        program.wait();
    }
    sys::stop_seen();
    sys::asked_by()
}

/// Runs `finish`, which can take a while. Meanwhile the keeper serves the tracees that need a
/// tracer, so they do not stop.
fn while_kept<T: Send>(keeper: &mut Keeper, finish: impl FnOnce() -> T + Send) -> T {
    if !keeper.is_needed() {
        return finish();
    }
    sys::ring();
    std::thread::scope(|scope| {
        let finish = scope.spawn(finish);
        keeper.serve_until(|| finish.is_finished());
        finish.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Starts the trace. Returns the program, if one was started.
///
/// # Errors
/// The outcome if there is nothing to trace; the reason was printed.
fn start(
    tracer: &mut Tracer<TraceObserver>,
    target: Target,
    front: Option<rustix::process::Pid>,
) -> Result<Option<Program>, Outcome> {
    match target {
        Target::Spawn(words) => {
            let (program, args) = words
                .split_first()
                .expect("the table of options requires a program");
            not_asked_to_stop()?;
            let mut command = Command::new(program).args(args);
            if sys::ignores_sigpipe() {
                command = command.ignore_sigpipe();
            }
            let pid = tracer.spawn(command).map_err(|error| fail(&error))?;
            sys::shield();
            sys::stop_with(front);
            // The program is stopped before its first instruction. A signal to the whole group did
            // not end it if it still had the handlers of this process.
            not_asked_to_stop().inspect_err(|_| sys::kill(pid))?;
            Ok(Program::of(pid))
        }
        Target::Attach(pids) => {
            for pid in pids {
                tracer.attach(pid).map_err(|error| fail(&error))?;
                if io::stderr().is_terminal() {
                    complain(&format!("attached to process {pid}"));
                }
            }
            Ok(None)
        }
    }
}

/// A user who ends the trace before the program runs does not want the program.
fn not_asked_to_stop() -> Result<(), Outcome> {
    match sys::STOP.load(Relaxed) {
        true => Err(sys::asked_by().map_or(FAILED, Outcome::Signal)),
        false => Ok(()),
    }
}

/// Traces until the program or the trace ends. A panic only ends the trace: the tracer still
/// detaches properly.
fn serve(tracer: &mut Tracer<TraceObserver>) -> Outcome {
    match catch_unwind(AssertUnwindSafe(|| tracer.run(&sys::STOP))) {
        Ok(Ok(Done::Stopped)) => sys::asked_by().map_or(FAILED, Outcome::Signal),
        Ok(Ok(_)) => tracer.exit_status().map_or(Outcome::Exit(0), Outcome::from),
        Ok(Err(error)) => fail(&error),
        Err(_) => FAILED,
    }
}

/// Stays in the background until the last tracee that needs a tracer has ended.
fn keep(keeper: Keeper) {
    sys::ignore_everything();
    sys::stop_seen();
    // Release everything that another process may wait for: pipes, locks, and the mount of the
    // working directory. Errors are harmless.
    let _ = std::env::set_current_dir("/");
    if let Ok(null) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
    {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
    sys::close_inherited();
    keeper.serve();
}

/// Prints the error as one line; returns the outcome.
fn fail(error: &Error) -> Outcome {
    let refused = match error {
        Error::Attach { pid, source } if source.raw_os_error() == Some(libc::EPERM) => {
            refusal::why(*pid)
        }
        _ => None,
    };
    let mut line = explain_with(error, refused.as_deref());
    match error {
        Error::Exec { program, source }
            if source.kind() == io::ErrorKind::NotFound
                && program.as_encoded_bytes().contains(&b'/')
                && Path::new(program).exists() =>
        {
            line.push_str("; the file is there, its interpreter is not");
        }
        _ => {}
    }
    complain(&line);
    match error {
        Error::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => NOT_FOUND,
        Error::Exec { .. } => NOT_EXECUTABLE,
        _ => FAILED,
    }
}
