//! Relays signals and stops between the parent and a program that runs behind this process.
//!
//! The program is in the same process group, so a ^C at the terminal reaches it directly. This
//! module forwards signals that reach only this process. Another process may send them, a terminal
//! whose session this process leads may hang up, or a timer may expire that was set before this
//! process started.

use super::{change_mask, is_ignored, keeping_errno, set_handler, set_of};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::Relaxed};

/// The pid of the program, to which signals are forwarded. 0 while there is no program.
static PROGRAM: AtomicI32 = AtomicI32::new(0);
/// Whether this process leads its session: then only this process gets the terminal's hang-up.
static LEADS_SESSION: AtomicBool = AtomicBool::new(false);
/// Whether SIGCONT was ignored when this process was started.
static IGNORES_CONT: AtomicBool = AtomicBool::new(false);

/// Signals that are never forwarded: those that cannot be caught, those that concern only this
/// process, and those by which the terminal stops the whole group.
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

/// Signals that arrived before there was a program, as bits: those to hand on, and those that a
/// terminal sends to all of a group.
static EARLY: AtomicU64 = AtomicU64::new(0);
static EARLY_FROM_TERMINAL: AtomicU64 = AtomicU64::new(0);

/// The program that runs behind this process.
#[derive(Debug)]
pub(crate) struct Relay(pub(crate) Child);

/// Keeps signals for the program that [`start_under_relay`] starts, from now on.
///
/// # How no signal is lost, and none comes twice
/// The signals are handled, not blocked, because the kernel then never forks between the arrival of
/// a signal and its handler: the kernel restarts a fork during which a signal arrives.
///
/// | | arrives before the fork | after it |
/// | --- | --- | --- |
/// | from the terminal | noted; the child finds the note, and raises it | the child gets it too |
/// | for this process | noted; handed on once the pid is known | as before, or handed on at once |
pub(crate) fn keep_signals() {
    LEADS_SESSION.store(leads_session(), Relaxed);
    for signal in relayed() {
        // SIGCONT continues a process even if it is ignored.
        if signal == libc::SIGCONT {
            IGNORES_CONT.store(is_ignored(signal), Relaxed);
            relay(signal);
        } else if !is_ignored(signal) {
            relay(signal);
        }
    }
}

fn relayed() -> impl Iterator<Item = i32> {
    (1..=libc::SIGRTMAX()).filter(|signal| !OURS.contains(signal))
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Starts `command` with the signals' dispositions and mask that this process was started with, and
/// hands signals on from now on, those that were kept first. If this process is killed, so is the
/// program.
///
/// # Errors
/// The errors of starting `command`.
pub(crate) fn start_under_relay(mut command: Command) -> io::Result<Relay> {
    let inherited = change_mask(libc::SIG_BLOCK, &set_of(&[]));
    let kept = set_of(&relayed().collect::<Vec<_>>());
    let own = rustix::process::getpid();
    let prepare = move || {
        // The standard library has emptied the mask. Until the mask is restored, signals stay
        // blocked.
        change_mask(libc::SIG_BLOCK, &kept);
        let early = EARLY_FROM_TERMINAL.load(Relaxed);
        for signal in relayed().filter(|signal| !is_ignored(*signal)) {
            set_handler(signal, disposition(signal));
            if early & bit(signal) != 0 {
                // SAFETY: `raise` takes any integer.
                unsafe { libc::raise(signal) };
            }
        }
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        if rustix::process::getppid() != Some(own) {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        change_mask(libc::SIG_SETMASK, &inherited);
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, and makes system calls only.
    unsafe { command.pre_exec(prepare) };
    let started = command.spawn();
    match &started {
        Ok(child) => {
            PROGRAM.store(child.id() as i32, Relaxed);
            // A signal that arrived before the store is in `EARLY`. The handler hands later signals
            // on.
            let early = EARLY.swap(0, Relaxed);
            for signal in relayed().filter(|signal| early & bit(*signal) != 0) {
                // SAFETY: `kill` takes any integers. No code has reaped the program yet, so the pid
                // is the program's.
                unsafe { libc::kill(child.id() as i32, signal) };
            }
        }
        Err(_) => end_relay(),
    }
    started.map(Relay)
}

/// The disposition with which this process was started. A signal that this process handles was not
/// ignored, except SIGCONT.
fn disposition(signal: i32) -> usize {
    if signal == libc::SIGCONT && IGNORES_CONT.load(Relaxed) {
        libc::SIG_IGN
    } else {
        libc::SIG_DFL
    }
}

/// Stops this process. The SIGCONT that continues it is forwarded to the program.
pub(crate) fn stop() {
    // SAFETY: `raise` takes any integer.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// Whether a shell with job control has started this process, and waits for its end *or stop*: this
/// process leads a group that has the terminal.
///
/// Any other parent does not notice the stop. This process would then stay stopped, because a
/// stopped process cannot notice that its program continues.
pub(crate) fn is_foreground_job() -> bool {
    let own = std::process::id() as i32;
    // SAFETY: `getpgrp` has no arguments. It returns 0 if the leader is in another pid namespace;
    // rustix's function takes 0 for impossible.
    let group = unsafe { libc::getpgrp() };
    if group != own || leads_session() {
        return false;
    }
    let Ok(terminal) = std::fs::File::open("/dev/tty") else {
        return false;
    };
    // SAFETY: `tcgetpgrp` takes a descriptor, which is open. It returns -1 if the terminal has hung
    // up.
    unsafe { libc::tcgetpgrp(terminal.as_raw_fd()) == own }
}

/// Whether this process is in the group that `terminal` gives its input and signals to.
pub(crate) fn has_terminal(terminal: &impl AsRawFd) -> bool {
    // SAFETY: `tcgetpgrp` takes a descriptor, which is open. It returns -1 if the terminal has hung
    // up.
    let foreground = unsafe { libc::tcgetpgrp(terminal.as_raw_fd()) };
    // SAFETY: `getpgrp` has no arguments.
    foreground == unsafe { libc::getpgrp() }
}

/// Whether this process leads its session. A terminal, a container or `setsid` has started such a
/// process, not a shell.
fn leads_session() -> bool {
    // SAFETY: `getsid` takes any integer. It returns 0 if the leader is in another pid namespace.
    unsafe { libc::getsid(0) == std::process::id() as i32 }
}

/// Stops forwarding: the program has ended, and once it is reaped, another process can get its pid.
/// From now on signals have their default effect on this process.
pub(crate) fn end_relay() {
    PROGRAM.store(0, Relaxed);
    for signal in relayed().filter(|signal| !is_ignored(*signal)) {
        set_handler(signal, disposition(signal));
    }
}

/// Undoes [`keep_signals`], because this process is about to execute the program in its own place.
/// The signals that were kept are raised, and take their effect on this process.
pub(crate) fn release_signals() {
    // A signal that arrives before the mask is set is kept, and raised below. A later one is
    // pending until the mask is restored.
    let inherited = change_mask(libc::SIG_BLOCK, &set_of(&relayed().collect::<Vec<_>>()));
    end_relay();
    let early = EARLY.swap(0, Relaxed) | EARLY_FROM_TERMINAL.swap(0, Relaxed);
    for signal in relayed().filter(|signal| early & bit(*signal) != 0) {
        // SAFETY: `raise` takes any integer.
        unsafe { libc::raise(signal) };
    }
    change_mask(libc::SIG_SETMASK, &inherited);
}

fn relay(signal: i32) {
    let action = libc::sigaction {
        sa_sigaction: on_signal as *const () as usize,
        sa_mask: set_of(&[]),
        sa_flags: libc::SA_SIGINFO | libc::SA_RESTART,
        sa_restorer: None,
    };
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: both pointers are live; the handler only accesses atomics and calls `kill`. glibc
    // refuses signals that it reserves.
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
    let is_handed_on = is_sent || is_for_this_one;
    if program == 0 {
        let early = match is_handed_on {
            true => &EARLY,
            false => &EARLY_FROM_TERMINAL,
        };
        early.fetch_or(bit(signal), Relaxed);
    } else if is_handed_on {
        // SAFETY: `kill` takes any integers. This process has one thread, which reaps the program
        // only after `end_relay`, so the pid is the program's.
        keeping_errno(|| unsafe { libc::kill(program, signal) });
    }
}
