//! `synchronize`, `start_poll` and `poll`.

use crate::Gate;
use srcu::Srcu;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread;

#[test]
fn s_84_synchronize_waits_for_a_section_that_sleeps_and_nests() {
    let srcu = Srcu::new();
    let left = AtomicBool::new(false);
    let (inside, entered) = channel();
    let gate = Gate::new();
    let wait = gate.waiter();
    thread::scope(|scope| {
        let (srcu, left) = (&srcu, &left);
        scope.spawn(move || {
            let outer = srcu.read_lock();
            let inner = srcu.read_lock();
            inside.send(()).unwrap();
            wait();
            drop(inner);
            left.store(true, Ordering::SeqCst);
            drop(outer);
        });
        entered.recv().unwrap();
        let waiter = scope.spawn(|| {
            srcu.synchronize().unwrap();
            assert!(left.load(Ordering::SeqCst), "the section had not ended");
        });
        let cookie = srcu.start_poll();
        assert!(!srcu.poll(cookie), "the section is open");
        gate.open();
        waiter.join().unwrap();
    });
}

/// `synchronize` waits for a grace period. Unlike `barrier`, it does not return at once if no
/// callback is queued.
#[test]
fn s_82_with_nothing_pending_synchronize_still_waits_for_a_reader() {
    let srcu = Srcu::new();
    srcu.barrier().unwrap();
    let left = AtomicBool::new(false);
    let section = srcu.read_lock();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            srcu.synchronize().unwrap();
            assert!(left.load(Ordering::SeqCst), "the section had not ended");
        });
        // Wait until the waiter has switched the banks and sleeps.
        while format!("{srcu:?}").contains("waiting: [0, 0]") {
            thread::yield_now();
        }
        // The waiter does not wait for a later reader, which is in the other bank. The waiter also
        // does not take that reader's end for the end of the first reader.
        drop(srcu.read_lock());
        assert!(!waiter.is_finished());
        left.store(true, Ordering::SeqCst);
        drop(section);
        waiter.join().unwrap();
    });
}

#[test]
fn s_83_synchronize_ends_although_there_are_always_readers() {
    let srcu = Srcu::new();
    let stop = AtomicBool::new(false);
    let rounds = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut held = srcu.read_lock();
                while !stop.load(Ordering::Relaxed) {
                    let next = srcu.read_lock();
                    drop(std::mem::replace(&mut held, next));
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..100 {
            srcu.synchronize().unwrap();
            srcu.synchronize_expedited().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(!srcu.read_lock_held());
}

#[test]
fn many_synchronize_at_once() {
    let srcu = Srcu::new();
    let done = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..200 {
                    drop(srcu.read_lock());
                    srcu.synchronize().unwrap();
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(done.load(Ordering::Relaxed), 1600);
}

#[test]
fn a_polled_grace_period_ends_by_itself() {
    let srcu = Srcu::new();
    let section = srcu.read_lock();
    let cookie = srcu.start_poll();
    assert!(!srcu.poll(cookie));
    drop(section);
    while !srcu.poll(cookie) {
        thread::yield_now();
    }
    assert!(srcu.poll(cookie), "it stays over");
}

#[test]
fn a_later_section_does_not_hold_up_a_cookie() {
    let srcu = Srcu::new();
    let early = srcu.read_lock();
    let cookie = srcu.start_poll();
    thread::scope(|scope| {
        // Wait until the grace period waits for `early`, so that the next section begins after the
        // switch of the banks.
        while format!("{srcu:?}").contains("waiting: [0, 0]") {
            thread::yield_now();
        }
        let late = srcu.read_lock();
        drop(early);
        scope
            .spawn(|| {
                while !srcu.poll(cookie) {
                    thread::yield_now();
                }
            })
            .join()
            .unwrap();
        drop(late);
    });
}

#[test]
#[should_panic(expected = "made by another domain")]
fn a_cookie_of_another_domain_is_refused() {
    let (a, b) = (Srcu::new(), Srcu::new());
    let cookie = a.start_poll();
    let _ = b.poll(cookie);
}

/// If a grace period is under way, a cookie waits for the next one. The next grace period waits for
/// a section that began before it. It does not wait for a section that begins after it has sent new
/// sections to the other bank.
#[test]
fn s_83_a_grace_period_waits_for_no_section_that_begins_after_it() {
    let srcu = Srcu::new();
    let first = srcu.read_lock();
    let under_way = srcu.start_poll();
    // Wait until the grace period under way has switched the banks.
    while format!("{srcu:?}").contains("waiting: [0, 0]") {
        thread::yield_now();
    }
    let asked = srcu.start_poll();
    let second = srcu.read_lock();
    drop(first);
    while !srcu.poll(under_way) {
        thread::yield_now();
    }
    let bank = format!("{second:?}");
    let later = loop {
        let later = srcu.read_lock();
        if format!("{later:?}") != bank {
            break later;
        }
        thread::yield_now();
    };
    assert!(!srcu.poll(asked), "the second section is open");
    drop(second);
    while !srcu.poll(asked) {
        thread::yield_now();
    }
    drop(later);
}
