//! If the system gives no thread (`RLIMIT_NPROC`, `pids.max`), callbacks wait for a barrier, which
//! runs them itself. There is one test only, because all domains of a process share one reclaimer.
#![cfg(not(mmun_loom))]

use srcu::{Srcu, WouldDeadlock};
use std::sync::Arc;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;

/// Queues a callback that counts its runs and checks its thread.
fn count(srcu: &Arc<Srcu>, called: &Arc<AtomicUsize>, expected: Option<thread::ThreadId>) {
    let (inner, called) = (Arc::downgrade(srcu), Arc::clone(called));
    srcu.call(move || {
        if let Some(expected) = expected {
            assert_eq!(thread::current().id(), expected);
        }
        // A barrier in a callback would wait for itself.
        let refused = inner.upgrade().map(|srcu| srcu.barrier());
        assert_ne!(refused, Some(Ok(())));
        called.fetch_add(1, SeqCst);
    });
}

#[test]
fn without_a_thread_a_barrier_runs_the_callbacks() {
    // Neither domain starts a thread before its first use.
    let (a, b) = (Arc::new(Srcu::new()), Arc::new(Srcu::new()));
    let called = Arc::new(AtomicUsize::new(0));
    let meet = Arc::new(Barrier::new(2));
    let other = {
        let (a, b, called, meet) = (a.clone(), b.clone(), called.clone(), meet.clone());
        thread::spawn(move || {
            testkit::refuse_threads();
            let section = a.read_lock();
            meet.wait();
            // The barrier of the first thread waits for this section. This thread, inside the
            // section, waits in a barrier of another domain.
            count(&b, &called, Some(thread::current().id()));
            assert_eq!(b.barrier(), Ok(()));
            assert_eq!(a.barrier(), Err(WouldDeadlock));
            drop(section);
        })
    };
    let first = {
        let (a, called) = (a.clone(), called.clone());
        thread::spawn(move || {
            testkit::refuse_threads();
            a.prepare();
            meet.wait();
            let cookie = a.start_poll();
            (0..300).for_each(|_| count(&a, &called, Some(thread::current().id())));
            assert_eq!(a.barrier(), Ok(()));
            assert!(a.poll(cookie));
            // A polled grace period needs no barrier.
            let section = a.read_lock();
            let cookie = a.start_poll();
            assert!(!a.poll(cookie));
            drop(section);
            while !a.poll(cookie) {
                thread::yield_now();
            }
        })
    };
    first.join().unwrap();
    other.join().unwrap();
    assert_eq!(called.load(SeqCst), 301);
    assert_eq!(a.callback_panics() + b.callback_panics(), 0);
    // The filters applied only to the two threads that have ended, so this thread can start the
    // reclaimer.
    count(&a, &called, None);
    let here = thread::current().id();
    a.call(move || assert_ne!(thread::current().id(), here));
    assert_eq!(a.barrier(), Ok(()));
    assert_eq!(called.load(SeqCst), 302);
    assert_eq!(a.callback_panics(), 0);
}
