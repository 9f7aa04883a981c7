//! The children: two at a time, each in its time.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::operation::Operation;
use super::report::Report;
use crate::source::Source;

/// How many children run at a time.
const ABREAST: usize = 2;
/// How long one may take.
const LIMIT: Duration = Duration::from_secs(5);

/// One cell of the matrix.
pub(crate) type Place = (&'static Operation, Source);

/// Runs every place in a child of its own, and hands each report, with the index of its place, to `done` as it comes.
pub(crate) fn run(places: &[Place], mut done: impl FnMut(usize, Report)) {
    let next = Mutex::new(places.iter().enumerate());
    let (sender, reports) = channel();
    thread::scope(|scope| {
        for _ in 0..ABREAST.min(places.len()) {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let place = next.lock().expect("nothing panics with it held").next();
                    let Some((index, place)) = place else { return };
                    let report = child(place).unwrap_or_else(|error| Report::broken(crate::reason(&error)));
                    // Nobody listens any more if `done` panicked.
                    let _ = sender.send((index, report));
                }
            });
        }
        drop(sender);
        receive(&reports, &mut done);
    });
}

fn receive(reports: &Receiver<(usize, Report)>, done: &mut impl FnMut(usize, Report)) {
    for (index, report) in reports {
        done(index, report);
    }
}

fn child((operation, source): &Place) -> io::Result<Report> {
    // Files, not pipes: whatever the child leaves running cannot hold us up.
    let mut output = File::from(memfd_create("coverage-output", MemfdFlags::CLOEXEC)?);
    let mut errors = File::from(memfd_create("coverage-errors", MemfdFlags::CLOEXEC)?);
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["coverage-cell", operation.name, source.name()]).stdin(Stdio::null());
    command.stdout(output.try_clone()?).stderr(errors.try_clone()?).process_group(0);
    let mut child = command.spawn()?;
    let in_time = wait(&child);
    // Its own children go with it. Its number is that of its group until it is reaped.
    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    let status = child.wait()?;
    if !in_time? {
        return Ok(Report::broken(format!("it did not end within {} s", LIMIT.as_secs())));
    }
    let (mut line, mut complaint) = (String::new(), String::new());
    output.rewind()?;
    output.read_to_string(&mut line)?;
    errors.rewind()?;
    errors.read_to_string(&mut complaint)?;
    Ok(Report::from_line(&line).unwrap_or_else(|| Report::broken(end_of(status, &complaint))))
}

/// Waits for the child's end, as long as it may take, and says whether it came. Does not reap it.
fn wait(child: &Child) -> io::Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
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
        None => format!("it exited with status {}", status.code().unwrap_or_default()),
    };
    match complaint.lines().find(|line| !line.trim().is_empty()) {
        Some(first) => format!("{end}: {first}"),
        None => end,
    }
}
