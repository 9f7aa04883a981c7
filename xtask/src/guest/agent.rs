//! Inside the guest: runs the recorded commands, and reports the results to the host.
//!
//! Standard output is the serial line to the host. The commands' output goes there unchanged; lines
//! that begin with [`MARK`] come from the agent.

use super::record;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// Begins a line of the agent: the ASCII record separator, which no test writes.
pub(crate) const MARK: char = '\u{1e}';
/// The variable that says how many seconds a command may take.
pub(crate) const LIMIT: &str = "MMUN_GUEST_LIMIT";
/// The variable that lists the capabilities which the machine's kernel lacks.
pub(crate) const LACKS: &str = "MMUN_GUEST_LACKS";
/// The variable with the index of the first command to run.
pub(crate) const FIRST: &str = "MMUN_GUEST_FIRST";

pub(crate) fn run(plan: &Path) -> ExitCode {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let limit = number(LIMIT).unwrap_or(240);
    let first = number(FIRST).unwrap_or(0) as usize;
    let lacks = std::env::var(LACKS).unwrap_or_default();
    for number in first..record::count(plan) {
        tell(&format!("begin {number}"));
        let end = match record::read(plan, number) {
            Some(mut command) => {
                // A test may skip only for lack of a capability in `lacks`. The machine has all
                // others, so if a test finds that another is missing, the test fails.
                command
                    .env("MMUN_REQUIRE", "all")
                    .env("MMUN_WITHOUT", &lacks);
                one(command, Duration::from_secs(limit)).unwrap_or_else(|error| error.to_string())
            }
            None => "its note cannot be read".to_owned(),
        };
        tell(&format!("end {number} {end}"));
    }
    tell("over");
    ExitCode::SUCCESS
}

fn tell(what: &str) {
    // A failure cannot be reported, because standard output is the only way to the host.
    let _ = io::stdout().write_all(format!("\n{MARK}{what}\n").as_bytes());
}

/// Runs a command in a process group of its own. Returns how the command ended.
fn one(mut command: Command, limit: Duration) -> io::Result<String> {
    let (mut output, writer) = io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .process_group(0);
    let child = command.spawn();
    // `command` holds write ends of the pipe. While they are open, the output has no end for the
    // thread that reads it.
    drop(command);
    let child = child?;
    let group = child.id();
    let (ended, end) = channel();
    let waiter = thread::spawn(move || {
        let mut child: Child = child;
        let _ = ended.send(child.wait());
    });
    // This thread is not joined, because processes that the command leaves behind may hold the pipe
    // open.
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut bytes) {
            let _ = io::stdout().write_all(&bytes[..count]);
            let _ = io::stdout().flush();
        }
    });
    let status = match end.recv_timeout(limit) {
        Err(RecvTimeoutError::Timeout) => {
            kill(group);
            let _ = waiter.join();
            return Ok(format!("it did not end within {limit:?}"));
        }
        Err(RecvTimeoutError::Disconnected) => {
            return Err(io::Error::other("no process waited for it"));
        }
        Ok(status) => status?,
    };
    kill(group);
    Ok(name(status))
}

/// Kills the remaining processes of a group.
fn kill(group: u32) {
    // It is no error if the group has ended.
    let _ = Command::new("kill")
        .args(["-KILL", "--", &format!("-{group}")])
        .stderr(Stdio::null())
        .status();
}

fn name(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) => "passed".into(),
        (Some(code), _) => format!("it exited with status {code}"),
        (None, signal) => format!("it was killed by signal {}", signal.unwrap_or_default()),
    }
}
