//! The calls the standard library lacks: fork, signal handlers, dying of a signal.
//!
//! # Safety
//! Everything unsafe in this program is here. Handlers touch atomics and make system calls, nothing
//! else, and leave `errno` as it was. Handlers are never inherited by the traced program (`execve`
//! resets them); what is set to *ignored* is, so the tracer ignores nothing before it has spawned
//! the program.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

mod privileges;
mod relay;
mod streams;

pub(crate) use privileges::{Rights, limit};
pub(crate) use relay::{
    Relay, end_relay, has_terminal, is_foreground_job, keep_signals, start_under_relay, stop,
};
pub(crate) use streams::keep_closed_in_programs;

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};

/// Set when tracing is to end early. Relaxed, because no other data is published through it.
pub(crate) static STOP: AtomicBool = AtomicBool::new(false);
/// The signal that asked for it; 0 if none did.
static ASKED_BY: AtomicI32 = AtomicI32::new(0);
/// Where the front forwards its signals.
static TRACER: AtomicI32 = AtomicI32::new(0);

/// The signals that ask a program to end.
const ENDING: [i32; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGXCPU,
];
/// Tells the tracer that the front is gone. No user sends it by hand.
const ORPHANED: i32 = libc::SIGIO;

/// Makes a pipe that programs do not inherit: the end to read from and the end to write to.
///
/// # Errors
/// `EMFILE` or `ENFILE`.
pub(crate) fn pipe() -> io::Result<(File, File)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((reader.into(), writer.into()))
}

/// Which side of a fork this is.
pub(crate) enum Fork {
    Parent(Pid),
    Child,
}

/// Forks. Signals that end a program wait in both processes until [`Held`] is dropped there.
///
/// # Errors
/// `EAGAIN` or `ENOMEM`.
pub(crate) fn fork() -> io::Result<(Fork, Held)> {
    let held = Held::new();
    // SAFETY: `fork` needs that the child does nothing another thread could have left half-done.
    // The front forks before there is a thread. The child that names is forked after the trace: the
    // locks it takes are those of memory, which the C library's `fork` hands over in order, and of
    // the hook of panics, which nothing changes any more.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok((Fork::Child, held)),
        pid => Ok((
            Fork::Parent(Pid::from_raw(pid).expect("a child's pid is positive")),
            held,
        )),
    }
}

/// Keeps the signals in [`ENDING`] pending; dropping it puts the mask back.
pub(crate) struct Held(libc::sigset_t);

impl Held {
    fn new() -> Held {
        Held(change_mask(libc::SIG_BLOCK, &set_of(&ENDING)))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        change_mask(libc::SIG_SETMASK, &self.0);
    }
}

/// Makes a write beyond `ulimit -f` fail like any other, where it would end this process.
pub(crate) fn survive_full_files() {
    if !is_ignored(libc::SIGXFSZ) {
        set_handler(libc::SIGXFSZ, on_full_file as *const () as usize);
    }
}

/// For the tracer, before it spawns a program: from now on a signal that ends programs sets
/// [`STOP`], except signals that are ignored.
pub(crate) fn stop_on_ending_signals() {
    for signal in ENDING {
        if !is_ignored(signal) {
            set_handler(signal, on_ending as *const () as usize);
        }
    }
    // The timer of a stop may ring before `heed_alarms`. The traced program inherits no handlers,
    // but it inherits which signals are ignored, so an ignored signal stays ignored here.
    if !is_ignored(libc::SIGALRM) {
        set_handler(libc::SIGALRM, on_alarm as *const () as usize);
    }
}

/// For the tracer, once the traced program has its own dispositions: the terminal cannot stop the
/// tracer, and the kernel does not reap the tracer's children by itself.
pub(crate) fn shield() {
    for signal in [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU] {
        set_handler(signal, libc::SIG_IGN);
    }
    set_handler(libc::SIGCHLD, libc::SIG_DFL);
    heed_alarms();
}

/// For the tracer: from now on the timer of a stop interrupts `waitpid`, even if `SIGALRM` was
/// inherited as ignored or blocked. Called after a program was spawned, because the program must
/// inherit the original settings.
pub(crate) fn heed_alarms() {
    set_handler(libc::SIGALRM, on_alarm as *const () as usize);
    change_mask(libc::SIG_UNBLOCK, &set_of(&[libc::SIGALRM, ORPHANED]));
}

/// For the tracer: sets [`STOP`] when its parent `front` ends, or has ended already.
pub(crate) fn stop_with(front: Option<Pid>) {
    set_handler(ORPHANED, on_orphaned as *const () as usize);
    let signal = Signal::from_named_raw(ORPHANED);
    // It cannot fail with a valid signal.
    let _ = rustix::process::set_parent_process_death_signal(signal);
    if rustix::process::getppid() != front {
        request_stop();
    }
}

/// Asks the tracing thread to stop, from any thread or handler.
///
/// That thread sits in `waitpid`. A signal that arrives after it has looked at [`STOP`] and before
/// it sleeps would be lost, and one that the kernel gives to another thread would not wake it; so a
/// timer rings until [`stop_seen`].
pub(crate) fn request_stop() {
    STOP.store(true, Relaxed);
    ring();
}

/// From now on `waitpid` of the tracing thread is interrupted again and again.
pub(crate) fn ring() {
    set_timer(10_000);
}

/// Stops the timer.
pub(crate) fn stop_seen() {
    set_timer(0);
}

/// The signal that asked to stop.
pub(crate) fn asked_by() -> Option<i32> {
    Some(ASKED_BY.load(Relaxed)).filter(|signal| *signal != 0)
}

/// The front hands ending signals on to `tracer`.
pub(crate) fn forward_to(tracer: Pid) {
    TRACER.store(tracer.as_raw_nonzero().get(), Relaxed);
    for signal in ENDING {
        if !is_ignored(signal) {
            set_handler(signal, on_forward as *const () as usize);
        }
    }
}

/// Ignores all that can be ignored: for a process that has to outlive everything its tracees do.
pub(crate) fn ignore_everything() {
    for signal in 1..32 {
        let fault = [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGABRT,
            libc::SIGTRAP,
        ];
        if ![libc::SIGKILL, libc::SIGSTOP, libc::SIGCHLD].contains(&signal)
            && !fault.contains(&signal)
        {
            set_handler(signal, libc::SIG_IGN);
        }
    }
}

/// Closes every descriptor but the standard ones: those that this process inherited, and what
/// is left of its own. For a process that neither uses nor drops any of them any more.
/// Linux 5.9.
pub(crate) fn close_inherited() {
    // SAFETY: closing a descriptor that something still owned could make that close another one
    // later. What calls this has dropped the output and the pipe to the front, which are all that
    // this program keeps.
    unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) };
}

/// Ends this process by `signal`, so that its parent sees what it would have seen of the traced
/// program, without a core dump of its own.
pub(crate) fn die_of(signal: i32) -> ! {
    let no_core = rustix::process::Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, no_core);
    // If the core pattern is a pipe, the kernel ignores the limit and looks at this flag.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    set_handler(signal, libc::SIG_DFL);
    change_mask(libc::SIG_UNBLOCK, &set_of(&[signal]));
    // SAFETY: `raise` takes any number.
    unsafe { libc::raise(signal) };
    // The signal does not kill: this is the init process of a container, or the signal is harmless
    // by default.
    std::process::exit(128 + signal)
}

/// Ends this process at once: nothing is flushed, no handler runs.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: it takes an integer.
    unsafe { libc::_exit(status) }
}

/// From now on this process is killed when `parent`, which started it, ends.
pub(crate) fn die_with(parent: Option<Pid>) {
    // It cannot fail with a valid signal.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    // It may have ended before that.
    if rustix::process::getppid() != parent {
        exit_now(0);
    }
}

/// How long the tasks of a process have run, in nanoseconds; `None` if it is gone.
///
/// # Source
/// clock_getcpuclockid(3). Of a process that is stopped the kernel knows it to the nanosecond.
pub(crate) fn process_time(pid: i32) -> Option<u64> {
    /// `CPUCLOCK_SCHED`, include/linux/posix-timers_types.h: time in the run queue's own unit.
    const SCHED: libc::clockid_t = 2;
    // A number that is none would name another clock.
    if !(1..1 << 28).contains(&pid) {
        return None;
    }
    let clock = !pid << 3 | SCHED;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it writes one `timespec` to a local; a clock that is none is refused.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return None;
    }
    u64::try_from(time.tv_sec)
        .ok()?
        .checked_mul(1_000_000_000)?
        .checked_add(u64::try_from(time.tv_nsec).ok()?)
}

/// Makes this process one that may fail: an error in it ends it without a message. Beyond what it
/// has, it gets so many bytes of `memory`.
pub(crate) fn be_expendable(parent: Option<Pid>, memory: u64) {
    die_with(parent);
    // `std` handles the first two, and would print a message about a stack overflow.
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGALRM, libc::SIGPIPE] {
        set_handler(signal, libc::SIG_DFL);
    }
    change_mask(libc::SIG_UNBLOCK, &set_of(&[libc::SIGALRM, libc::SIGPIPE]));
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stderr(&null);
    }
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm
        .split(' ')
        .next()
        .and_then(|pages| pages.parse::<u64>().ok());
    let most = pages.map(|pages| {
        let bytes = pages.saturating_mul(rustix::param::page_size() as u64);
        bytes.saturating_add(memory)
    });
    for (resource, most) in [
        (rustix::process::Resource::As, most),
        (rustix::process::Resource::Core, Some(0)),
    ] {
        let mut limit = rustix::process::getrlimit(resource);
        limit.current = [limit.maximum, most].into_iter().flatten().min();
        // A limit that is lowered is not refused.
        let _ = rustix::process::setrlimit(resource, limit);
    }
}

/// Ends this process in so many seconds, unless it is called again; see [`be_expendable`].
pub(crate) fn end_in(seconds: u32) {
    // SAFETY: it takes an integer.
    unsafe { libc::alarm(seconds) };
}

/// Does nothing until `parent` ends, then ends too.
pub(crate) fn wait_for_the_end_of(parent: Pid) -> ! {
    die_with(Some(parent));
    loop {
        // SAFETY: it has no arguments; it returns after a handled signal, and is called again.
        unsafe { libc::pause() };
    }
}

/// Calls this process something else in `ps`, so that `pkill` for the program's name does not hit
/// it.
pub(crate) fn rename(name: &std::ffi::CStr) {
    let _ = rustix::thread::set_name(name);
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else {
        return;
    };
    // The fields after the name in parentheses; the area of the arguments is numbers 48 and 49 of
    // proc(5).
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let mut area = fields
        .split_whitespace()
        .skip(45)
        .map(|field| field.parse::<usize>().ok());
    let (Some(Some(begin)), Some(Some(end))) = (area.next(), area.next()) else {
        return;
    };
    let Some(length) = end
        .checked_sub(begin)
        .filter(|length| begin != 0 && *length > name.count_bytes())
    else {
        return;
    };
    // SAFETY: the slice must be writable memory that nothing else uses. The kernel put the argument
    // strings there, at the top of the stack, and counts them as this process's to change. The one
    // reader, `std::env::args_os`, was called before and copies; there is one thread yet.
    let arguments = unsafe { std::slice::from_raw_parts_mut(begin as *mut u8, length) };
    arguments.fill(0);
    arguments[..name.count_bytes()].copy_from_slice(name.to_bytes());
}

extern "C" fn on_ending(signal: i32) {
    let _ = ASKED_BY.compare_exchange(0, signal, Relaxed, Relaxed);
    request_stop();
}

extern "C" fn on_orphaned(_: i32) {
    request_stop();
}

/// Makes a memory call that does nothing: its address is not aligned.
pub(crate) fn idle_call() {
    // SAFETY: the kernel refuses the call whatever is mapped.
    unsafe { libc::munmap(std::ptr::without_provenance_mut(1), 4096) };
}

/// Its arrival alone ends a `waitpid`.
extern "C" fn on_alarm(_: i32) {}

/// The write says `EFBIG`, which is all there is to know.
extern "C" fn on_full_file(_: i32) {}

extern "C" fn on_forward(signal: i32) {
    // SAFETY: `kill` takes any numbers. The tracer's is not reused, because no code waits for it
    // while this handler is installed.
    keeping_errno(|| unsafe { libc::kill(TRACER.load(Relaxed), signal) });
}

fn set_timer(every_us: i64) {
    let every = libc::timeval {
        tv_sec: 0,
        tv_usec: every_us,
    };
    let timer = libc::itimerval {
        it_interval: every,
        it_value: every,
    };
    // SAFETY: the first pointer is to a live value, a null second one is allowed.
    keeping_errno(|| unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) });
}

fn keeping_errno(call: impl FnOnce() -> i32) {
    // SAFETY: it always returns this thread's own, valid location.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: valid and this thread's own, see above.
    let before = unsafe { errno.read() };
    call();
    // SAFETY: valid and this thread's own, see above.
    unsafe { errno.write(before) };
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the pointer is to room for a set, which this fills.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in signals {
        // SAFETY: the set was initialised by `sigemptyset`; a bad number is an error, not
        // undefined.
        unsafe { libc::sigaddset(set.as_mut_ptr(), *signal) };
    }
    // SAFETY: `sigemptyset` initialised it.
    unsafe { set.assume_init() }
}

/// Returns the mask as it was.
fn change_mask(how: i32, set: &libc::sigset_t) -> libc::sigset_t {
    let mut before = set_of(&[]);
    // SAFETY: both pointers are to live sets, and `how` is one of the three constants.
    unsafe { libc::pthread_sigmask(how, set, &mut before) };
    before
}

fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null new action only asks; the other pointer is to room for an action.
    unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: an action may be all zeroes, and is no less after the call.
    unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Without `SA_RESTART`: a handled signal ends a blocking call.
fn set_handler(signal: i32, handler: usize) {
    let action = libc::sigaction {
        sa_sigaction: handler,
        sa_mask: set_of(&[]),
        sa_flags: 0,
        sa_restorer: None,
    };
    // SAFETY: the action is live; its handler is a constant or one of the functions above, which
    // are safe in a handler.
    unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
}
