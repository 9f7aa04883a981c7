//! The status line: shows on a terminal that a long trace still runs, if the terminal shows no
//! records.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How far a trace has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) events: u64,
    /// The tasks that are alive.
    pub(crate) tasks: u64,
}

/// The status line.
#[derive(Debug)]
pub(crate) struct Status {
    begin: Instant,
    /// When the line is written next; `None` if it never is.
    next: Option<Instant>,
    is_shown: bool,
}

const EVERY: Duration = Duration::from_secs(1);
/// The escape sequence that moves to the start of the line and erases it.
const ERASE: &str = "\r\x1b[K";

impl Status {
    /// Shows nothing unless the line is `wanted`, and standard error is a terminal that can erase a
    /// line.
    pub(crate) fn new(wanted: bool) -> Status {
        let is_dumb = std::env::var_os("TERM").is_none_or(|terminal| terminal == "dumb");
        let begin = Instant::now();
        let shows = wanted && !is_dumb && io::stderr().is_terminal();
        Status {
            begin,
            next: shows.then(|| begin + EVERY),
            is_shown: false,
        }
    }

    /// Writes the line, if it is time.
    pub(crate) fn tick(&mut self, progress: impl FnOnce() -> Progress) {
        let now = Instant::now();
        if self.next.is_some_and(|next| next <= now) {
            self.next = Some(now + EVERY);
            self.is_shown |= write(&format!("{ERASE}{}", line(progress(), now - self.begin)));
        }
    }

    /// Erases the line.
    pub(crate) fn erase(mut self) {
        if std::mem::take(&mut self.is_shown) {
            write(ERASE);
        }
    }
}

fn line(Progress { events, tasks }: Progress, time: Duration) -> String {
    let seconds = time.as_secs();
    let s = if tasks == 1 { "" } else { "s" };
    format!(
        "mmun: {} events, {tasks} task{s}, {}:{:02}",
        thousands(events),
        seconds / 60,
        seconds % 60
    )
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .filter_map(|group| std::str::from_utf8(group).ok())
        .collect();
    groups.join(",")
}

/// Writes `text`, and returns whether the text was written. Does not write to a terminal that ^S
/// has stopped, because the write would block. In the background this writes nothing, because the
/// terminal belongs to the shell.
fn write(text: &str) -> bool {
    let mut error = io::stderr();
    if !crate::sys::has_terminal(&error) {
        return false;
    }
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(&error, PollFlags::OUT)], Some(&at_once)).is_ok_and(|ready| ready > 0)
        && error.write_all(text.as_bytes()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_counts_in_thousands_and_minutes() {
        let text =
            |events, tasks, seconds| line(Progress { events, tasks }, Duration::from_secs(seconds));
        assert_eq!(
            text(1_234_567, 3, 67),
            "mmun: 1,234,567 events, 3 tasks, 1:07"
        );
        assert_eq!(text(0, 1, 0), "mmun: 0 events, 1 task, 0:00");
        assert_eq!(
            (thousands(999), thousands(1000)),
            ("999".into(), "1,000".into())
        );
    }

    #[test]
    fn an_unwanted_line_is_not_shown() {
        let mut status = Status::new(false);
        status.begin -= Duration::from_secs(5);
        status.tick(|| panic!("no output wants it"));
        assert!(!status.is_shown);
    }
}
