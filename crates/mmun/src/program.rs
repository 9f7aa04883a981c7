//! The program that a trace has started, and its end, which is seen even after the program was
//! detached or reaped.

use std::os::fd::OwnedFd;

use mmu_source::process::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};

/// A process by its descriptor, which never names another process.
#[derive(Debug)]
pub(crate) struct Program(OwnedFd);

impl Program {
    /// `None` if the process was reaped, or this process has no descriptor left.
    ///
    /// # Source
    /// pidfd_open(2), Linux 5.3.
    pub(crate) fn of(pid: Pid) -> Option<Program> {
        let pid = rustix::process::Pid::from_raw(pid)?;
        pidfd_open(pid, PidfdFlags::empty()).ok().map(Program)
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.poll(Some(&Timespec::default()))
    }

    /// Sleeps until the program ends or a signal handler has run.
    pub(crate) fn wait(&self) {
        self.poll(None);
    }

    fn poll(&self, limit: Option<&Timespec>) -> bool {
        poll(&mut [PollFd::new(&self.0, PollFlags::IN)], limit).is_ok_and(|ended| ended > 0)
    }
}
