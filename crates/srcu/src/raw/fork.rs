//! Makes the domains usable in the child of a `fork`.
//!
//! No lock of this crate is taken before the fork, because that could deadlock: `fork` takes the
//! allocator's lock next, and the thread that holds that lock may be waiting for a lock of this
//! crate. So the child may find any slow-path lock held by a thread that does not exist there, with
//! the guarded data half changed. Therefore each single store leaves every structure consistent,
//! and the child frees the locks.
//!
//! In the child, the sections of the calling thread stay open. The sections of all other threads
//! have ended, except those of `SendGuard`s, which may have been handed to the calling thread. The
//! reclaimer does not exist in the child, unless the reclaimer itself called `fork`. Queued
//! callbacks stay queued.

use super::state::pool;
use super::{ids, pages, process, reclaimer};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

/// How many registrations have begun. More than one only if several threads registered at the same
/// time.
static REGISTERED: AtomicUsize = AtomicUsize::new(0);

/// Registers the handler before `main`. A fork runs only the handlers that were registered when it
/// began. Suppose the handler were registered with the first domain, while a fork is already in
/// progress. Then another thread could take a lock of this crate before that fork ends, and the
/// child would find the lock held. One case remains: a library that is loaded and used while
/// another thread is in the middle of `fork`.
///
/// The loader calls the functions of the section `.init_array` at start, with arguments that
/// `register` ignores. `register` may run before `main`, because it needs only atomics, system
/// calls and `pthread_atfork`.
#[cfg(not(miri))]
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = register;

/// Registers the handler that repairs the domains in a child of this process, and prepares for
/// children without handlers.
pub(super) extern "C" fn register() {
    static DONE: AtomicBool = AtomicBool::new(false);
    // Several threads may come here at the same time at first. None of them may continue before at
    // least one registration is complete, because no handler would repair the child of a fork
    // before that. But none may wait for another thread's registration either: in the child of a
    // fork, that registration never completes. So each of these threads registers the handler.
    // ORDER(srcu-fork): Acquire; partner below.
    if !DONE.load(Ordering::Acquire) {
        REGISTERED.fetch_add(1, Ordering::Relaxed);
        process::mark_children(repair);
        // SAFETY: `pthread_atfork` needs a function that stays loaded as long as it is registered.
        // When glibc unloads a library, it removes the handlers of that library. (glibc registers
        // the first 48 handlers without allocating.)
        unsafe { libc::pthread_atfork(None, None, Some(child)) };
        // ORDER(srcu-fork): Release: the registration comes before the flag. Partner: the load
        // above.
        DONE.store(true, Ordering::Release);
    }
}

/// The fork handler.
unsafe extern "C" fn child() {
    static REPAIRED: AtomicI32 = AtomicI32::new(0);
    if !process::marks_children() {
        // SAFETY: the call has no preconditions.
        let this_process = unsafe { libc::getpid() };
        // If several threads registered this handler, it runs several times in a child, and must
        // repair the domains only the first time. The pid alone does not tell a repeated run: in a
        // pid namespace of its own, a child can have the same pid as its parent.
        let is_again = REPAIRED.swap(this_process, Ordering::Relaxed) == this_process;
        if is_again && REGISTERED.load(Ordering::Relaxed) > 1 {
            return;
        }
        process::mark_this_child();
    }
    process::check();
}

/// Repairs the domains in a child.
///
/// The thread that forked is the first thread of the child. Only that thread may do it, because the
/// repair ends the sections of all others. If another thread comes first, the domains of the parent
/// stay as they are. Until then, no thread but the first one can be in a section, because each
/// checks for a fork before its first section ([`ids`]).
fn repair() {
    // SAFETY: the call has no preconditions.
    let process = unsafe { libc::getpid() };
    // SAFETY: as above.
    if unsafe { libc::syscall(libc::SYS_gettid) } != process.into() {
        return reclaimer::lose();
    }
    ids::after_fork();
    pages::after_fork();
    // A thread that exists only in the parent may have set `scheduled` without adding the domain to
    // the inbox. (If the reclaimer survived, the count that the thread took keeps the page.)
    pool::each(|state| {
        if state.pending.scheduled.load(Ordering::Relaxed) {
            state.pending.scheduled.store(false, Ordering::Relaxed);
        }
    });
    let reclaimer_survived = reclaimer::after_fork();
    pool::each(|state| {
        state.updater.gp.after_fork();
        state.updater.event.after_fork();
        let mine = state.table.mine().map(ptr::from_ref);
        state.table.each(|slot| {
            if mine != Some(ptr::from_ref(slot)) {
                slot.local.settle();
            }
        });
        state.restart();
        reclaimer::adopt(state, reclaimer_survived);
    });
}

#[cfg(all(test, not(miri)))]
mod tests {
    use crate::Srcu;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, mpsc::channel};

    /// The callback sets the mark that another thread would set just before it adds the domain to
    /// the inbox.
    #[test]
    fn a_domain_that_was_being_scheduled_is_served_in_the_child_of_a_callback() {
        let (forks, marked, queued) = (Srcu::new(), Arc::new(Srcu::new()), Arc::new(Srcu::new()));
        let domains = [Arc::clone(&marked), Arc::clone(&queued)];
        let (send, children) = channel();
        forks.call(move || {
            let scheduled = &marked.state().pending.scheduled;
            scheduled.store(true, Ordering::Relaxed);
            queued.call(|| ());
            // SAFETY: the child allocates, which `fork` of glibc allows, and runs callbacks.
            let child = unsafe { libc::fork() };
            if child != 0 {
                scheduled.store(false, Ordering::Relaxed);
                return send.send(child).unwrap();
            }
            // The alarm ends a child that hangs. The reclaimer has blocked all signals.
            // SAFETY: all zeroes are a valid set.
            let mut signals: libc::sigset_t = unsafe { std::mem::zeroed() };
            // SAFETY: the call writes to a set, which is a local variable.
            unsafe { libc::sigemptyset(&mut signals) };
            // SAFETY: as above.
            unsafe { libc::sigaddset(&mut signals, libc::SIGALRM) };
            // SAFETY: the call reads an initialised set, and may have no old set to write.
            unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &signals, std::ptr::null_mut()) };
            // SAFETY: the call has no preconditions.
            unsafe { libc::alarm(10) };
            let ran = Arc::new(AtomicUsize::new(0));
            for srcu in [&marked, &queued] {
                let ran = Arc::clone(&ran);
                srcu.call(move || {
                    if ran.fetch_add(1, Ordering::Relaxed) == 1 {
                        // SAFETY: ends the process at once, which is always allowed.
                        unsafe { libc::_exit(0) };
                    }
                });
            }
            // The child's only thread is the reclaimer, and goes on as such.
        });
        let (child, mut status) = (children.recv().unwrap(), 0);
        // SAFETY: the call writes to an integer, which is a local variable.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0, "a domain of the child was not served");
        domains.iter().for_each(|srcu| srcu.barrier().unwrap());
    }
}
