//! If the system gives the reclaimer no thread (`RLIMIT_NPROC`, `pids.max`), `synchronize` runs the
//! frees itself. There is one test only, because all domains of a process share one reclaimer,
//! which must not run here.
#![cfg(not(mmun_loom))]

use mmu_notifier::{MmWithUser, Notifier, Subsystem};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::thread;

struct Plain;
impl Notifier for Plain {}

static PLAIN: Subsystem<Plain> = Subsystem::new(|_| Ok(Plain));

#[test]
fn without_a_thread_synchronize_runs_the_frees() {
    it_returns_in_the_child_too_if_the_drop_of_a_notifier_forks();
    callbacks_that_always_queue_another_one_do_not_delay_it();
}

fn callbacks_that_always_queue_another_one_do_not_delay_it() {
    static STOP: AtomicBool = AtomicBool::new(false);
    static OTHER: srcu::Srcu = srcu::Srcu::new();
    fn again() {
        if !STOP.load(SeqCst) {
            OTHER.call(again);
        }
    }
    testkit::within("synchronize", || {
        testkit::refuse_threads();
        OTHER.call(again);
        PLAIN.get(&MmWithUser::new()).unwrap().put();
        PLAIN.synchronize().unwrap();
    });
    STOP.store(true, SeqCst);
    OTHER.barrier().unwrap();
}

/// A notifier whose drop forks.
struct Forks;
impl Notifier for Forks {}

static CHILD: AtomicI32 = AtomicI32::new(-1);

impl Drop for Forks {
    fn drop(&mut self) {
        // SAFETY: the child makes no call that needs another thread of the parent.
        CHILD.store(unsafe { libc::fork() }, SeqCst);
    }
}

fn it_returns_in_the_child_too_if_the_drop_of_a_notifier_forks() {
    static FORKS: Subsystem<Forks> = Subsystem::new(|_| Ok(Forks));
    let waiter = thread::spawn(|| {
        testkit::refuse_threads();
        FORKS.get(&MmWithUser::new()).unwrap().put();
        FORKS.synchronize().unwrap();
        if CHILD.load(SeqCst) == 0 {
            // SAFETY: `_exit` takes an exit status, and ends only this child.
            unsafe { libc::_exit(7) };
        }
    });
    let status = testkit::within("the child", move || {
        waiter.join().unwrap();
        let mut status = 0;
        // SAFETY: `waitpid` needs a place for the status, which is a local.
        let ended = unsafe { libc::waitpid(CHILD.load(SeqCst), &raw mut status, 0) };
        assert_eq!(ended, CHILD.load(SeqCst));
        status
    });
    assert!(
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7,
        "{status:#x}"
    );
}
