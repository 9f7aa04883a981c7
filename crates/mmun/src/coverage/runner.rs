//! Runs the children: two at a time, each with a time limit.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::ops::ControlFlow;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::operation::Operation;
use super::report::{Report, Seen};
use crate::source::Source;

/// How many children run at a time.
const ABREAST: usize = 2;
/// The time limit of a child. A child usually takes a tenth of a second, but a busy or emulated
/// machine takes longer.
const LIMIT: Duration = Duration::from_secs(180);

/// How many times at most to run an operation that the source `kernel` seems to report too late.
const TRIES: usize = 3;

/// One cell of the matrix.
pub(crate) type Place = (&'static Operation, Source);

/// Runs every place in a separate child. Calls `done` with each report and the index of its place.
/// Ends early if `done` returns `Break`.
pub(crate) fn run(places: &[Place], done: impl FnMut(usize, Report) -> ControlFlow<()>) {
    let command = |index: usize| {
        let (operation, source) = &places[index];
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["coverage-cell", operation.name, source.name()]);
        Ok(command)
    };
    // `munmap` takes a mapping out of the kernel's list of mappings before the change is announced.
    // In between, `/proc` shows no page any more although the page tables are as they were. The
    // thread that reads the state rarely meets that moment. A counter that really moves too late is
    // found in every run. So a late report is measured again.
    let report = |index: usize| {
        let is_late =
            |report: &Report| report.seen == Seen::After && places[index].1 == Source::Kernel;
        let mut report = once(command(index));
        for _ in 1..TRIES {
            if !is_late(&report) {
                break;
            }
            report = once(command(index));
        }
        report
    };
    run_each(places.len(), report, done);
}

/// Runs `count` commands that write a report, like [`run`], but each command only once.
pub(crate) fn run_commands(
    count: usize,
    command: impl Fn(usize) -> io::Result<Command> + Sync,
    done: impl FnMut(usize, Report) -> ControlFlow<()>,
) {
    run_each(count, |index| once(command(index)), done);
}

/// Runs a child, and returns its report.
fn once(command: io::Result<Command>) -> Report {
    command
        .and_then(|command| supervise(command, LIMIT))
        .unwrap_or_else(|error| Report::broken(crate::reason(&error)))
}

fn run_each(
    count: usize,
    report: impl Fn(usize) -> Report + Sync,
    mut done: impl FnMut(usize, Report) -> ControlFlow<()>,
) {
    let left = Mutex::new(0..count);
    let (sender, reports) = channel();
    thread::scope(|scope| {
        for _ in 0..ABREAST.min(count) {
            let (sender, left, report) = (sender.clone(), &left, &report);
            scope.spawn(move || {
                loop {
                    let next = left.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some(index) = next else { return };
                    // This fails only if `done` has returned `Break`, which ends the receiver.
                    let _ = sender.send((index, report(index)));
                }
            });
        }
        drop(sender);
        for (index, report) in reports {
            if done(index, report).is_break() {
                *left.lock().unwrap_or_else(PoisonError::into_inner) = 0..0;
                return;
            }
        }
    });
}

/// Runs `command`, which must write a report and end within `limit`. Then kills every process that
/// is still in the group of `command`.
fn supervise(mut command: Command, limit: Duration) -> io::Result<Report> {
    // Files, not pipes, because processes that the child leaves behind would keep a pipe open.
    let mut output = File::from(memfd_create("coverage-output", MemfdFlags::CLOEXEC)?);
    let mut errors = File::from(memfd_create("coverage-errors", MemfdFlags::CLOEXEC)?);
    command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(errors.try_clone()?)
        .process_group(0);
    let mut child = command.spawn()?;
    let in_time = wait(&child, limit);
    // The child's pid is its group's id until the child is reaped. It is no error if the group has
    // ended.
    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    let status = child.wait()?;
    if !in_time? {
        return Ok(Report::broken(format!("it did not end within {limit:?}")));
    }
    let (mut line, mut complaint) = (String::new(), String::new());
    output.rewind()?;
    output.read_to_string(&mut line)?;
    errors.rewind()?;
    errors.read_to_string(&mut complaint)?;
    Ok(Report::from_line(&line).unwrap_or_else(|| Report::broken(end_of(status, &complaint))))
}

/// Waits for the child's end, up to the limit; returns whether it has ended. Does not reap it.
fn wait(child: &Child, limit: Duration) -> io::Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    loop {
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)) {
            Err(Errno::INTR) => {}
            result => return Ok(result? > 0),
        }
    }
}

/// Why there is no report.
fn end_of(status: ExitStatus, complaint: &str) -> String {
    let end = match status.signal() {
        Some(signal) => format!("it was killed by {}", crate::names::signal(signal)),
        None => format!(
            "it exited with status {}",
            status.code().unwrap_or_default()
        ),
    };
    match complaint.lines().find(|line| !line.trim().is_empty()) {
        Some(first) => format!("{end}: {first}"),
        None => end,
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Seen;
    use super::*;

    fn shell(script: &str, limit: Duration) -> Report {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        supervise(command, limit).unwrap()
    }

    #[test]
    fn a_report_is_read_although_a_grandchild_still_runs() {
        let report = shell("sleep 1000 & echo 'before true false '", LIMIT);
        assert_eq!(report, Report::told(Seen::Before, true));
    }

    #[test]
    fn a_child_that_hangs_is_killed() {
        let report = shell("while :; do sleep 1000; done", Duration::from_millis(50));
        assert!(
            report.broken && report.reason.contains("did not end within 50ms"),
            "{report:?}"
        );
    }

    #[test]
    fn the_end_of_a_child_without_a_report_is_the_reason() {
        let report = shell("kill -SEGV $$", LIMIT);
        assert!(
            report.broken && report.reason.contains("SIGSEGV"),
            "{report:?}"
        );
        let report = shell("echo complaint >&2; exit 3", LIMIT);
        assert_eq!(report.reason, "it exited with status 3: complaint");
    }
}
