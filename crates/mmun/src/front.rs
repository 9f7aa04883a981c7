//! The front: the process that the user started, in front of the process that traces.
//!
//! A task under our seccomp filter gets `ENOSYS` for its memory calls once it has no tracer. So the
//! tracer must survive even if the front is killed. The front only waits, forwards signals, and
//! ends as the traced program did. The front keeps the default action of `SIGTSTP`, so that the
//! shell gets the terminal back when the program is stopped. The tracer ignores `SIGTSTP`, because
//! it must handle the program's own stop.

use std::fs::File;
use std::io::{Read, Write};

use rustix::process::{Pid, WaitOptions};

use crate::complain;
use crate::outcome::{FAILED, Outcome};
use crate::sys::{self, Fork};

/// The tracer's end of the pipe.
#[derive(Debug)]
pub(crate) struct Front {
    pipe: File,
    pid: Option<Pid>,
}

impl Front {
    /// Sends the outcome to the front, which then ends. Without `stays`, the tracer ends as well,
    /// and the front reaps the tracer before it ends. If the front did not, process 1 would have to
    /// reap the tracer; not every process 1 does, and then a zombie would stay.
    pub(crate) fn tell(mut self, outcome: Outcome, stays: bool) {
        let mut message = [u8::from(stays); 6];
        message[..5].copy_from_slice(&outcome.to_bytes());
        // This fails if the front has ended, which is harmless.
        let _ = self.pipe.write_all(&message);
    }

    /// The pid of the front, which is this process's parent as long as the front lives.
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.pid
    }
}

/// Runs `tracer` in a process of its own and returns the outcome that the tracer sent, or `FAILED`
/// if it sent none.
pub(crate) fn run(tracer: impl FnOnce(Front)) -> Outcome {
    let pid = Some(rustix::process::getpid());
    let forked = sys::pipe().and_then(|pipe| Ok((pipe, sys::fork()?)));
    let ((reader, writer), (side, held)) = match forked {
        Ok(forked) => forked,
        Err(error) => {
            complain(&format!("fork on the tracer: {error}"));
            return FAILED;
        }
    };
    match side {
        Fork::Child => {
            drop(reader);
            sys::rename(c"mm-tracer");
            sys::stop_on_ending_signals();
            drop(held);
            tracer(Front { pipe: writer, pid });
            std::process::exit(0)
        }
        Fork::Parent(tracer) => {
            drop(writer);
            sys::forward_to(tracer);
            drop(held);
            listen(reader, tracer)
        }
    }
}

fn listen(mut pipe: File, tracer: Pid) -> Outcome {
    let wait = || {
        rustix::process::waitpid(Some(tracer), WaitOptions::empty())
            .ok()
            .flatten()
    };
    let mut told = [0; 6];
    match pipe.read_exact(&mut told) {
        Ok(()) => {
            let [outcome @ .., stays] = told;
            if stays == 0 {
                wait();
            }
            Outcome::from_bytes(outcome)
        }
        Err(_) => {
            // Only the tracer has the other end, so it has died or is dying.
            let status = wait();
            let reason = match status.and_then(|(_, status)| status.terminating_signal()) {
                Some(signal) => format!("killed by {}", crate::names::signal(signal)),
                None => "ended without a word".into(),
            };
            complain(&format!("wait on the tracer: {reason}"));
            FAILED
        }
    }
}
