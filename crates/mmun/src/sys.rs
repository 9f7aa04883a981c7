//! System calls that the standard library lacks: fork, signal handlers, dying of a signal.
//!
//! # Safety
//! Handlers only access atomics and make system calls, and they preserve `errno` unless they end
//! the process. The traced program does not inherit handlers, because `execve` resets them. It does
//! inherit which signals are ignored, so the tracer ignores no signal before it has spawned the
//! program.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

mod privileges;
mod relay;
mod streams;

pub(crate) use privileges::{Rights, limit};
pub(crate) use relay::{
    Relay, end_relay, has_terminal, is_foreground_job, keep_signals, release_signals,
    start_under_relay, stop,
};
pub(crate) use streams::{ignores_sigpipe, inherit_sigpipe, keep_closed_in_programs};

use std::ffi::{CStr, CString, OsStr, c_char};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};

/// Set when the trace must end early. Relaxed, because it publishes no data.
pub(crate) static STOP: AtomicBool = AtomicBool::new(false);
/// The signal that requested the early end; 0 if no signal did.
static ASKED_BY: AtomicI32 = AtomicI32::new(0);
/// The pid of the tracer, to which the front forwards its signals.
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
/// The signal that tells the tracer that the front has ended. Users do not send it.
const ORPHANED: i32 = libc::SIGIO;

/// Makes a pipe that programs do not inherit: the end to read from and the end to write to.
///
/// # Errors
/// `EMFILE` or `ENFILE`.
pub(crate) fn pipe() -> io::Result<(File, File)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((reader.into(), writer.into()))
}

/// The two sides of a fork.
pub(crate) enum Fork {
    Parent(Pid),
    Child,
}

/// Forks. In each process, signals that end a program stay pending until [`Held`] is dropped there.
///
/// # Errors
/// `EAGAIN` or `ENOMEM`.
pub(crate) fn fork() -> io::Result<(Fork, Held)> {
    let held = Held::new();
    // SAFETY: the child must not use state that another thread may have left inconsistent. The
    // front forks before it has threads. The child that names frames is forked after the trace,
    // and takes two kinds of locks. The C library's `fork` keeps the locks of the allocator
    // consistent, and no thread changes the panic hook any more, which has the other lock.
    // `coverage` forks before its sources start threads, or its child makes system calls only.
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

/// Makes a write beyond `ulimit -f` fail with an error instead of ending this process.
pub(crate) fn survive_full_files() {
    if !is_ignored(libc::SIGXFSZ) {
        set_handler(libc::SIGXFSZ, on_full_file as *const () as usize);
    }
}

/// For the tracer, before it spawns a program: from now on each signal in [`ENDING`] sets [`STOP`]
/// instead of ending this process. Ignored signals stay ignored.
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

/// The file that a signal in [`ENDING`] removes: its path, its device and its inode.
static REMOVED: OnceLock<(CString, u64, u64)> = OnceLock::new();

/// From now on a signal in [`ENDING`] removes the file at `path` before it ends this process,
/// unless another file is there by then. Ignored signals stay ignored.
pub(crate) fn remove_at_end(path: &Path) {
    let name = CString::new(path.as_os_str().as_bytes());
    let (Ok(name), Ok(about)) = (name, path.symlink_metadata()) else {
        return;
    };
    let _ = REMOVED.set((name, about.dev(), about.ino()));
    for signal in ENDING {
        if !is_ignored(signal) {
            set_handler(signal, on_end as *const () as usize);
        }
    }
}

/// For the tracer, once the traced program has its own dispositions. From now on the terminal
/// cannot stop the tracer, and the kernel does not reap the tracer's children by itself.
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
    // The call cannot fail with a valid signal.
    let _ = rustix::process::set_parent_process_death_signal(signal);
    if rustix::process::getppid() != front {
        request_stop();
    }
}

/// Kills a child of this process.
pub(crate) fn kill(child: mmu_source::process::Pid) {
    if let Some(pid) = Pid::from_raw(child) {
        // This fails if the child has ended, which is harmless.
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
}

/// Asks the tracing thread to stop, from any thread or handler.
///
/// The tracing thread sleeps in `waitpid`. A signal would be lost if it arrived after that thread
/// has read [`STOP`] and before it sleeps. A signal that the kernel delivers to another thread
/// would not wake the tracing thread either. So a timer sends signals until [`stop_seen`].
pub(crate) fn request_stop() {
    STOP.store(true, Relaxed);
    ring();
}

/// Starts the timer, which interrupts `waitpid` of the tracing thread periodically.
pub(crate) fn ring() {
    set_timer(10_000);
}

/// Stops the timer.
pub(crate) fn stop_seen() {
    set_timer(0);
}

/// The signal that requested the stop.
pub(crate) fn asked_by() -> Option<i32> {
    Some(ASKED_BY.load(Relaxed)).filter(|signal| *signal != 0)
}

/// From now on the front forwards ending signals to `tracer`.
pub(crate) fn forward_to(tracer: Pid) {
    TRACER.store(tracer.as_raw_nonzero().get(), Relaxed);
    for signal in ENDING {
        if !is_ignored(signal) {
            set_handler(signal, on_forward as *const () as usize);
        }
    }
}

/// Ignores the standard signals, except SIGCHLD, those of faults, and those that cannot be ignored.
/// For a process that must outlive its tracees.
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

/// Closes every descriptor but the standard ones, inherited or not. For a process that neither uses
/// nor drops any of them any more. Linux 5.9.
pub(crate) fn close_inherited() {
    // SAFETY: if a value still owned a closed descriptor, it could later close another file with
    // the same number. The caller has dropped the output and the pipe to the front, which are the
    // only descriptors that this program keeps.
    unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) };
}

/// Ends this process by `signal`, so that its parent sees the same status as the traced program
/// had, but without a core dump of this process.
pub(crate) fn die_of(signal: i32) -> ! {
    let no_core = rustix::process::Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, no_core);
    // If the core pattern is a pipe, the kernel ignores the limit and checks this flag.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    set_handler(signal, libc::SIG_DFL);
    change_mask(libc::SIG_UNBLOCK, &set_of(&[signal]));
    // SAFETY: `raise` takes any integer.
    unsafe { libc::raise(signal) };
    // The signal did not kill: this process is the init of a container, or the signal's default
    // action is harmless.
    std::process::exit(128 + signal)
}

/// Ends this process at once: nothing is flushed, no handler runs.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` takes any integer.
    unsafe { libc::_exit(status) }
}

/// From now on this process is killed when `parent`, which started it, ends.
pub(crate) fn die_with(parent: Option<Pid>) {
    // The call cannot fail with a valid signal.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    // The parent may have ended before the call.
    if rustix::process::getppid() != parent {
        exit_now(0);
    }
}

/// The CPU time of all tasks of a process, in nanoseconds; `None` if the process has ended.
///
/// # Source
/// clock_getcpuclockid(3). For a stopped process the time is exact to the nanosecond.
pub(crate) fn process_time(pid: i32) -> Option<u64> {
    /// `CPUCLOCK_SCHED` of include/linux/posix-timers_types.h: the scheduler's count of run time.
    const SCHED: libc::clockid_t = 2;
    // An invalid pid would name another clock.
    if !(1..1 << 28).contains(&pid) {
        return None;
    }
    let clock = !pid << 3 | SCHED;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `clock_gettime` writes one `timespec` to a local variable, and refuses an invalid
    // clock.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return None;
    }
    u64::try_from(time.tv_sec)
        .ok()?
        .checked_mul(1_000_000_000)?
        .checked_add(u64::try_from(time.tv_nsec).ok()?)
}

/// For a process that may crash: an error ends it without a message. The process may allocate
/// `memory` more bytes than it has.
pub(crate) fn be_expendable(parent: Option<Pid>, memory: u64) {
    die_with(parent);
    // `std` handles the first two signals, and would print a message about a stack overflow.
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
        // Lowering a limit cannot fail.
        let _ = rustix::process::setrlimit(resource, limit);
    }
}

/// Ends this process after `seconds`, unless this function is called again; see [`be_expendable`].
pub(crate) fn end_in(seconds: u32) {
    // SAFETY: `alarm` takes any integer.
    unsafe { libc::alarm(seconds) };
}

/// Sleeps until `parent` ends, then ends this process.
pub(crate) fn wait_for_the_end_of(parent: Pid) -> ! {
    die_with(Some(parent));
    loop {
        // SAFETY: `pause` has no arguments; it returns after a handled signal, and is called again.
        unsafe { libc::pause() };
    }
}

/// Renames this process in `ps`, so that `pkill` with the program's name does not kill it.
pub(crate) fn rename(name: &std::ffi::CStr) {
    let _ = rustix::thread::set_name(name);
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else {
        return;
    };
    // The fields after the name in parentheses; the area of the arguments is fields 48 and 49 of
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
    // SAFETY: the slice must be writable memory that no other code uses. The kernel has put the
    // argument strings there, at the top of the stack, and allows the process to change them. Their
    // only reader, `std::env::args_os`, was called before and copies them; this process has one
    // thread so far.
    let arguments = unsafe { std::slice::from_raw_parts_mut(begin as *mut u8, length) };
    arguments.fill(0);
    arguments[..name.count_bytes()].copy_from_slice(name.to_bytes());
}

extern "C" fn on_ending(signal: i32) {
    let _ = ASKED_BY.compare_exchange(0, signal, Relaxed, Relaxed);
    request_stop();
}

extern "C" fn on_end(signal: i32) {
    if let Some((name, device, inode)) = REMOVED.get() {
        let mut about = MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: the name is a string that ends in a zero byte, and the call writes to a local.
        unsafe { libc::lstat(name.as_ptr(), about.as_mut_ptr()) };
        // SAFETY: all zeroes are a valid value, which the call may have overwritten.
        let about = unsafe { about.assume_init() };
        if (about.st_dev, about.st_ino) == (*device, *inode) {
            // SAFETY: the name is a string that ends in a zero byte.
            unsafe { libc::unlink(name.as_ptr()) };
        }
    }
    set_handler(signal, libc::SIG_DFL);
    // SAFETY: `raise` takes any integer. The signal stays pending until this handler has returned.
    unsafe { libc::raise(signal) };
}

extern "C" fn on_orphaned(_: i32) {
    request_stop();
}

/// A path of this program, for a process that runs it again. Without `/proc`, the path with which
/// this process was started, as it was by the working directory of then.
pub(crate) fn own_program() -> PathBuf {
    let shown = PathBuf::from("/proc/self/exe");
    if shown.exists() {
        return shown;
    }
    // SAFETY: `getauxval` takes any integer.
    let name = unsafe { libc::getauxval(libc::AT_EXECFN) } as *const c_char;
    if name.is_null() {
        return shown;
    }
    // SAFETY: the kernel has put this string at the end of the stack, where it stays.
    let name = unsafe { CStr::from_ptr(name) };
    PathBuf::from(OsStr::from_bytes(name.to_bytes()))
}

/// Makes a memory call that does nothing: its address is not aligned.
pub(crate) fn idle_call() {
    // SAFETY: the kernel refuses an address that is not aligned, so this unmaps nothing.
    unsafe { libc::munmap(std::ptr::without_provenance_mut(1), 4096) };
}

/// Empty: the arrival of the signal alone interrupts `waitpid`.
extern "C" fn on_alarm(_: i32) {}

/// Empty: the write fails with `EFBIG`.
extern "C" fn on_full_file(_: i32) {}

extern "C" fn on_forward(signal: i32) {
    // SAFETY: `kill` takes any integers. The tracer's pid is not reused, because no code reaps the
    // tracer while this handler is installed.
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
    // SAFETY: `__errno_location` always returns this thread's own, valid location.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: valid and this thread's own, see above.
    let before = unsafe { errno.read() };
    call();
    // SAFETY: valid and this thread's own, see above.
    unsafe { errno.write(before) };
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the pointer is to room for a set, which `sigemptyset` fills.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in signals {
        // SAFETY: the set was initialised by `sigemptyset`; an invalid signal is an error, not
        // undefined behaviour.
        unsafe { libc::sigaddset(set.as_mut_ptr(), *signal) };
    }
    // SAFETY: `sigemptyset` initialised the set.
    unsafe { set.assume_init() }
}

/// Changes the signal mask; returns the old one.
fn change_mask(how: i32, set: &libc::sigset_t) -> libc::sigset_t {
    let mut before = set_of(&[]);
    // SAFETY: both pointers are to live sets, and `how` is one of the three constants.
    unsafe { libc::pthread_sigmask(how, set, &mut before) };
    before
}

fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: with a null new action `sigaction` changes nothing; the other pointer is to room for
    // an action.
    unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: an action may be all zeroes, and the call has filled it in.
    unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Installs a handler without `SA_RESTART`, so that the signal interrupts a blocking call.
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
