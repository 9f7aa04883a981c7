//! Tests the child of a real `fork`.
//!
//! This is a test program of its own, and its tests run one at a time. A child runs the callbacks
//! that it inherits, and the callbacks of other tests may wait for threads that the child does not
//! have.
#![cfg(not(mmun_loom))]

use srcu::Srcu;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use testkit::{in_child, in_raw_child};

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A counter shared with callbacks.
#[derive(Clone, Default)]
struct Count(Arc<AtomicUsize>);

impl Count {
    fn add(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// Runs `f` while another thread is in a section.
fn with_another_section(srcu: &Srcu, f: impl FnOnce()) {
    let (inside, entered) = channel();
    let (open, gate) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let _section = srcu.read_lock();
            inside.send(()).unwrap();
            // Ends when `open` is dropped, also if `f` panics.
            let _ = gate.recv();
        });
        entered.recv().unwrap();
        f();
        drop(open);
    });
}

#[test]
fn a_child_uses_inherited_domains_and_runs_inherited_callbacks() {
    let _alone = alone();
    let srcu = Srcu::new();
    let count = Count::default();
    let mut section = Some(srcu.read_lock());
    for _ in 0..10 {
        let count = count.clone();
        srcu.call(move || count.add());
    }
    let good = in_child(|| {
        let inside = srcu.read_lock_held() && srcu.synchronize().is_err();
        section.take();
        srcu.synchronize().unwrap();
        srcu.barrier().unwrap();
        let inherited = count.get();
        let own = count.clone();
        srcu.call(move || own.add());
        srcu.barrier().unwrap();
        inside && inherited == 10 && count.get() == 11
    });
    assert!(good);
    assert!(
        section.is_some() && srcu.barrier().is_err(),
        "the parent is still inside"
    );
    assert_eq!(count.get(), 0);
    drop(section);
    srcu.barrier().unwrap();
    assert_eq!(count.get(), 10);
}

#[test]
fn sections_of_other_threads_are_over_in_the_child() {
    let _alone = alone();
    let srcu = Srcu::new();
    with_another_section(&srcu, || {
        let cookie = srcu.start_poll();
        assert!(!srcu.poll(cookie));
        let good = in_child(|| {
            srcu.synchronize().unwrap();
            srcu.poll(cookie)
        });
        assert!(good);
        assert!(!srcu.poll(cookie), "in the parent the section is open");
    });
    srcu.synchronize().unwrap();
}

#[test]
fn a_child_of_a_busy_process_is_not_stuck() {
    let _alone = alone();
    let domains: Arc<Vec<Srcu>> = Arc::new((0..8).map(|_| Srcu::new()).collect());
    let start = Arc::new(Barrier::new(4));
    let stop = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (0..3)
        .map(|_| {
            let (domains, start, stop) =
                (Arc::clone(&domains), Arc::clone(&start), Arc::clone(&stop));
            thread::spawn(move || {
                start.wait();
                while !stop.load(Ordering::Relaxed) {
                    for srcu in domains.iter() {
                        drop(srcu.read_lock());
                        srcu.call(|| ());
                        srcu.synchronize().unwrap();
                    }
                    let short = Srcu::new();
                    short.call(|| ());
                }
            })
        })
        .collect();
    start.wait();
    for round in 0..50 {
        let good = in_child(|| {
            for srcu in domains.iter() {
                srcu.synchronize().unwrap();
                srcu.call(|| ());
                srcu.drain_until_idle().unwrap();
            }
            let own = Srcu::new();
            thread::scope(|scope| {
                scope.spawn(|| drop(own.read_lock()));
                scope.spawn(|| own.synchronize().unwrap());
            });
            true
        });
        assert!(good, "round {round}");
    }
    stop.store(true, Ordering::Relaxed);
    workers
        .into_iter()
        .for_each(|worker| worker.join().unwrap());
}

#[test]
fn a_callback_that_forks_leaves_a_reclaimer_in_both() {
    let _alone = alone();
    let (first, second) = (Arc::new(Srcu::new()), Arc::new(Srcu::new()));
    let (send, answers) = channel();
    let in_callback = Arc::clone(&second);
    first.call(move || {
        let good = in_child(|| {
            in_callback.synchronize().unwrap();
            // This thread is the reclaimer, so it cannot wait for callbacks, and the barrier must
            // be refused.
            in_callback.call(|| ());
            in_callback.barrier().is_err()
        });
        send.send(good).unwrap();
    });
    assert!(answers.recv().unwrap());
    second.call(|| ());
    second.barrier().unwrap();
    first.barrier().unwrap();
}

/// The parent and its child are each in a PID namespace of their own, so both have the PID 1.
#[test]
fn a_child_with_its_parents_number_is_distinguished_from_it() {
    if !testkit::require(testkit::Cap::Root) {
        return;
    }
    let _alone = alone();
    // SAFETY: The call affects only children of this process.
    let next_is_first = || unsafe { libc::unshare(libc::CLONE_NEWPID) } == 0;
    let is_first = || std::process::id() == 1;
    assert!(in_child(|| {
        next_is_first()
            && in_child(|| {
                let forks = srcu::forks();
                is_first() && next_is_first() && in_child(|| is_first() && srcu::forks() != forks)
            })
    }));
}

/// The standard library has a lock that each of its threads takes when it starts and when it ends.
/// A fork copies the lock in its current state. If the reclaimer of a child needed the lock, the
/// child could wait for a thread that it does not have.
#[test]
fn a_child_has_its_reclaimer_whatever_threads_were_starting_in_the_parent() {
    let _alone = alone();
    let (srcu, count, stop) = (Srcu::new(), Count::default(), AtomicBool::new(false));
    srcu.call(|| ());
    srcu.barrier().unwrap();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    thread::spawn(|| ()).join().unwrap();
                }
            });
        }
        let _stopped = Stop(&stop);
        // Each fork may show the fault. With a sanitizer, a fork takes a hundred times as long.
        let begin = Instant::now();
        for _ in (0..4000).take_while(|_| begin.elapsed() < Duration::from_secs(30)) {
            let good = in_child(|| {
                // SAFETY: `alarm` has no preconditions. If the child hangs, the signal kills it
                // after 20 seconds.
                unsafe { libc::alarm(20) };
                let own = count.clone();
                srcu.call(move || own.add());
                srcu.barrier().unwrap();
                count.get() == 1
            });
            assert!(good, "a child was not served");
        }
    });
}

/// Ends the threads when it is dropped, also if the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The domain has a queued callback, an open section of another thread, and a reclaimer that exists
/// only in the parent.
#[test]
fn a_child_without_fork_handlers_is_repaired_by_its_first_call() {
    let _alone = alone();
    let (srcu, count) = (Srcu::new(), Count::default());
    with_another_section(&srcu, || {
        let own = count.clone();
        srcu.call(move || own.add());
        let mut section = Some(srcu.read_lock());
        let forks = srcu::forks();
        let firsts: [&dyn Fn() -> bool; 3] = [
            &|| srcu.synchronize().is_ok(),
            &|| srcu.barrier().is_ok() && count.get() == 1,
            &|| thread::scope(|scope| scope.spawn(srcu::forks).join().unwrap() != forks),
        ];
        let good = |first: &dyn Fn() -> bool, section: &mut Option<_>| {
            in_raw_child(|| {
                let inside = srcu.read_lock_held() && srcu.barrier().is_err();
                section.take();
                inside && first() && srcu::forks() != forks
            })
        };
        for (number, first) in firsts.iter().enumerate() {
            assert!(good(first, &mut section), "{number}");
        }
        assert_eq!(srcu::forks(), forks);
    });
    srcu.barrier().unwrap();
}
