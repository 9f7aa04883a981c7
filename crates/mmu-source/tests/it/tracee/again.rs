//! Calls that a signal interrupts, so that the kernel restarts them. The test sends the signal.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use libc::{PROT_READ, PROT_WRITE, c_int, c_long, c_void, siginfo_t, ucontext_t};

use crate::machine::{FORK, return_to};
use crate::sys::{self, call, map, munmap, page_size};

type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

static RUNS: AtomicU64 = AtomicU64::new(0);
static CHILD: AtomicI64 = AtomicI64::new(0);

/// The address of the page that the handler unmaps.
static PAGE_AT: AtomicU64 = AtomicU64::new(0);

/// Sets the handler for the test's signal, and prints which page the handler unmaps.
fn handle(handler: Handler) {
    // SAFETY: zero is a valid value of each field.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    assert_eq!(
        // SAFETY: the action is complete. The handlers of this file only make system calls and use
        // atomics.
        unsafe { libc::sigaction(libc::SIGUSR2, &action, std::ptr::null_mut()) },
        0
    );
    PAGE_AT.store(map(page_size(), PROT_READ | PROT_WRITE), Ordering::Relaxed);
    println!("page {:#x}", PAGE_AT.load(Ordering::Relaxed));
}

fn unmap_the_page() {
    assert_eq!(munmap(PAGE_AT.load(Ordering::Relaxed), page_size()), 0);
}

fn fork_with(number: c_long) -> i64 {
    let args = [0, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
    let child = match number {
        libc::SYS_clone3 => call(number, &[sys::address(&args), size_of_val(&args) as u64]),
        // `fork` takes no arguments and ignores these.
        _ => call(number, &[libc::SIGCHLD as u64, 0, 0, 0, 0]),
    };
    if child == 0 {
        call(libc::SYS_exit_group, &[0]);
    }
    child
}

extern "C" fn count_and_unmap(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    RUNS.fetch_add(1, Ordering::Relaxed);
    unmap_the_page();
}

/// Forks by the call `number`. The signal handler unmaps a page.
pub(crate) fn interrupted(number: u64) {
    handle(count_and_unmap);
    let child = fork_with(number as c_long);
    println!(
        "child {child} {} {}",
        sys::wait(child as i32, 0),
        RUNS.load(Ordering::Relaxed)
    );
}

extern "C" fn count_and_fork(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    // The second signal arrives in the fork of the first signal's handler.
    if RUNS.fetch_add(1, Ordering::Relaxed) == 0 {
        CHILD.store(fork_with(FORK), Ordering::Relaxed);
    } else {
        unmap_the_page();
    }
}

/// Forks, and forks again in the signal handler. A signal interrupts both.
pub(crate) fn interrupted_twice() {
    handle(count_and_fork);
    let outer = fork_with(FORK);
    let inner = CHILD.load(Ordering::Relaxed);
    let wait = |child| sys::wait(child as i32, 0);
    println!(
        "children {outer} {inner} {} {}",
        wait(outer) | wait(inner),
        RUNS.load(Ordering::Relaxed)
    );
}

/// Runs at a higher stack address than the interrupted call, and never returns.
extern "C" fn elsewhere() -> ! {
    unmap_the_page();
    call(libc::SYS_exit_group, &[5]);
    unreachable!("exit_group returned")
}

extern "C" fn jump(_: c_int, _: *mut siginfo_t, context: *mut c_void) {
    let context = context.cast::<ucontext_t>();
    // SAFETY: the kernel passes a context that lives as long as the handler runs, and only the
    // handler uses it.
    return_to(unsafe { &mut *context }, elsewhere);
}

/// Forks, and leaves the handler by a jump, as `siglongjmp` does. So the kernel does not restart
/// the fork.
pub(crate) fn gives_up() {
    handle(jump);
    fork_with(FORK);
}

extern "C" fn die(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    call(libc::SYS_exit_group, &[6]);
}

/// Forks, and ends the process in the handler.
pub(crate) fn dies_in_its_handler() {
    handle(die);
    fork_with(FORK);
}
