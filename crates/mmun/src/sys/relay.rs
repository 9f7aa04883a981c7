//! Standing in front of a program without being noticed: signals, stops, and the death of either.
//!
//! The program is in the same process group, so a ^C at the terminal reaches it without help. What
//! comes to this process alone is handed on: what another process sends, the hang-up of a terminal
//! whose session this process leads, and a timer that was set before it was started.

use super::{change_mask, is_ignored, keeping_errno, set_handler, set_of};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed};

/// Where signals go. 0 while there is no program.
static PROGRAM: AtomicI32 = AtomicI32::new(0);
/// This process leads its session: a terminal that hangs up tells it alone.
static LEADS_SESSION: AtomicBool = AtomicBool::new(false);

/// What is never handed on: what cannot be caught, what says something about this process, and what
/// the terminal sends to stop all of its group.
const OURS: [i32; 11] = [
    libc::SIGKILL,
    libc::SIGSTOP,
    libc::SIGCHLD,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
];

/// The program that runs behind this process.
#[derive(Debug)]
pub(crate) struct Relay(pub(crate) Child);

/// Starts `command` with the signals' dispositions and mask that this process was started with, and
/// hands signals on from now on. If this process is killed, so is the program.
///
/// # Errors
/// The errors of starting `command`.
pub(crate) fn start_under_relay(mut command: Command) -> io::Result<Relay> {
    // A signal that arrives meanwhile waits until the program runs and the handlers are there. By
    // default, SIGCONT would be lost, and others would end this process.
    let relayed: Vec<i32> = (1..=libc::SIGRTMAX())
        .filter(|signal| !OURS.contains(signal))
        .collect();
    let inherited = change_mask(libc::SIG_BLOCK, &set_of(&relayed));
    let own = rustix::process::getpid();
    let prepare = move || {
        // The standard library has emptied the mask.
        change_mask(libc::SIG_SETMASK, &inherited);
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        if rustix::process::getppid() != Some(own) {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, and makes system calls only.
    unsafe { command.pre_exec(prepare) };
    let started = command.spawn();
    if let Ok(child) = &started {
        PROGRAM.store(child.id() as i32, Relaxed);
        LEADS_SESSION.store(leads_session(), Relaxed);
        for signal in relayed {
            // SIGCONT lets a process go on also where it is ignored.
            if !is_ignored(signal) || signal == libc::SIGCONT {
                relay(signal);
            }
        }
    }
    change_mask(libc::SIG_SETMASK, &inherited);
    started.map(Relay)
}

/// Stops this process. What continues it is handed on to the program.
pub(crate) fn stop() {
    // SAFETY: it takes any number.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// Whether a shell with job control has started this process, and waits for its end *or stop*: this
/// process leads a group that has the terminal.
///
/// Any other parent does not notice that this process is stopped. It would stay stopped, because a
/// stopped process cannot see its program go on.
pub(crate) fn is_foreground_job() -> bool {
    let own = std::process::id() as i32;
    // SAFETY: it has no arguments. 0: the leader is in another pid namespace, and rustix's function
    // takes that for impossible.
    let group = unsafe { libc::getpgrp() };
    if group != own || leads_session() {
        return false;
    }
    let Ok(terminal) = std::fs::File::open("/dev/tty") else {
        return false;
    };
    // SAFETY: it takes a descriptor, which is open. -1: the terminal has hung up.
    unsafe { libc::tcgetpgrp(terminal.as_raw_fd()) == own }
}

/// Whether this process is in the group that `terminal` gives its input and signals to.
pub(crate) fn has_terminal(terminal: &impl AsRawFd) -> bool {
    // SAFETY: it takes a descriptor, which is open. -1: the terminal has hung up.
    let foreground = unsafe { libc::tcgetpgrp(terminal.as_raw_fd()) };
    // SAFETY: it has no arguments.
    foreground == unsafe { libc::getpgrp() }
}

/// A leader of a session was started by a terminal, a container or `setsid`, and by no shell.
fn leads_session() -> bool {
    // SAFETY: it takes a number. 0: the leader is in another pid namespace, see above.
    unsafe { libc::getsid(0) == std::process::id() as i32 }
}

/// No signal is handed on any more: the program has ended, and once it is waited for, its number
/// can be another process's. A signal does to this process what it does to any other.
pub(crate) fn end_relay() {
    PROGRAM.store(0, Relaxed);
    for signal in (1..=libc::SIGRTMAX()).filter(|signal| !OURS.contains(signal)) {
        if !is_ignored(signal) {
            set_handler(signal, libc::SIG_DFL);
        }
    }
}

fn relay(signal: i32) {
    let action = libc::sigaction {
        sa_sigaction: on_signal as *const () as usize,
        sa_mask: set_of(&[]),
        sa_flags: libc::SA_SIGINFO | libc::SA_RESTART,
        sa_restorer: None,
    };
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: both are live; the handler touches atomics and makes one call. A number that glibc
    // keeps is refused.
    unsafe { libc::sigaction(signal, &raw const action, before.as_mut_ptr()) };
}

extern "C" fn on_signal(signal: i32, info: *const libc::siginfo_t, _: *const libc::c_void) {
    // SAFETY: the kernel passes a live structure with SA_SIGINFO.
    let is_sent = unsafe { (*info).si_code } <= 0;
    let is_for_this_one = match signal {
        libc::SIGHUP => LEADS_SESSION.load(Relaxed),
        libc::SIGALRM | libc::SIGVTALRM | libc::SIGPROF => true,
        _ => false,
    };
    let program = PROGRAM.load(Relaxed);
    if (is_sent || is_for_this_one) && program != 0 {
        // SAFETY: `kill` takes any numbers. The program is not waited for before `end_relay` has
        // run in this thread, the only one, so the number is its own.
        keeping_errno(|| unsafe { libc::kill(program, signal) });
    }
}
