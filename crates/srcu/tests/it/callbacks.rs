//! `call`, `call_raw`, `barrier`, `drain_until_idle`.

use crate::{Count, Gate};
use srcu::{Head, Srcu};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::thread;

#[test]
fn a_callback_waits_for_the_reader_and_a_barrier_for_the_callback() {
    let srcu = Srcu::new();
    let count = Count::default();
    let section = srcu.read_lock();
    let in_callback = count.clone();
    srcu.call(move || in_callback.add());
    let other = Srcu::new();
    other.call(|| ());
    other.barrier().unwrap();
    assert_eq!(
        count.get(),
        0,
        "the reclaimer has had a turn, and the section is open"
    );
    drop(section);
    srcu.barrier().unwrap();
    assert_eq!(count.get(), 1);
}

#[test]
fn callbacks_of_a_domain_run_in_order() {
    let srcu = Srcu::new();
    let seen = Arc::new(Mutex::new(Vec::new()));
    for n in 0..2000 {
        let seen = Arc::clone(&seen);
        srcu.call(move || seen.lock().unwrap().push(n));
    }
    srcu.barrier().unwrap();
    assert_eq!(*seen.lock().unwrap(), (0..2000).collect::<Vec<_>>());
}

#[test]
fn a_barrier_waits_for_the_callbacks_of_all_threads_that_called_before() {
    let srcu = Srcu::new();
    let count = Count::default();
    for round in 1..=100 {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let count = count.clone();
                    srcu.call(move || count.add());
                });
            }
        });
        srcu.barrier().unwrap();
        assert_eq!(count.get(), round * 4);
    }
}

#[test]
fn a_barrier_waits_for_a_callback_that_is_slow_to_return() {
    let srcu = Srcu::new();
    let count = Count::default();
    let gate = Gate::new();
    let (wait, in_callback) = (gate.waiter(), count.clone());
    srcu.call(move || {
        wait();
        in_callback.add();
    });
    thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            srcu.barrier().unwrap();
            assert_eq!(count.get(), 1, "the callback had not returned");
        });
        srcu.synchronize().unwrap();
        gate.open();
        waiter.join().unwrap();
    });
}

#[test]
fn a_stuck_reader_of_one_domain_delays_no_callback_of_another() {
    let (stuck, free) = (Srcu::new(), Srcu::new());
    let count = Count::default();
    let section = stuck.read_lock();
    let in_stuck = count.clone();
    stuck.call(move || in_stuck.add());
    for _ in 0..100 {
        free.call(|| ());
        free.barrier().unwrap();
    }
    assert_eq!(count.get(), 0);
    drop(section);
    stuck.barrier().unwrap();
    assert_eq!(count.get(), 1);
}

#[test]
fn draining_covers_callbacks_that_callbacks_queue() {
    let srcu = Arc::new(Srcu::new());
    let count = Count::default();
    fn again(srcu: Arc<Srcu>, count: Count, left: usize) {
        let next = Arc::clone(&srcu);
        srcu.call(move || {
            count.add();
            if left > 0 {
                again(next, count, left - 1);
            }
        });
    }
    again(Arc::clone(&srcu), count.clone(), 20);
    srcu.drain_until_idle().unwrap();
    assert_eq!(count.get(), 21);
}

#[test]
fn s_90_a_hundred_thousand_callbacks_wait_for_a_stuck_reader_and_then_all_run() {
    let srcu = Srcu::new();
    let count = Count::default();
    let section = srcu.read_lock();
    for _ in 0..100_000 {
        let count = count.clone();
        srcu.call(move || count.add());
    }
    assert_eq!(count.get(), 0);
    drop(section);
    srcu.barrier().unwrap();
    assert_eq!(count.get(), 100_000);
}

#[test]
fn panicking_callbacks_are_counted_and_reported_and_the_others_run() {
    static REPORTED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    struct PanicsWhenDropped;
    impl Drop for PanicsWhenDropped {
        fn drop(&mut self) {
            panic!("the payload of a test");
        }
    }
    srcu::set_callback_panic_hook(|payload| {
        if let Some(text) = payload.downcast_ref::<&str>() {
            REPORTED.lock().unwrap().push((*text).to_owned());
        }
    });
    let srcu = Srcu::new();
    let count = Count::default();
    let after = count.clone();
    srcu.call(|| panic!("of a test"));
    srcu.call(|| std::panic::panic_any(PanicsWhenDropped));
    srcu.call(move || after.add());
    srcu.barrier().unwrap();
    assert_eq!((count.get(), srcu.callback_panics()), (1, 2));
    assert_eq!(*REPORTED.lock().unwrap(), ["of a test"]);
}

#[test]
fn embedded_heads_run_and_can_be_queued_again() {
    #[repr(C)]
    struct Node {
        head: Head,
        count: Count,
    }
    unsafe fn run(head: NonNull<Head>) {
        // SAFETY: The head is the first field of the node below, which the test keeps until after
        // the barrier.
        let node = unsafe { head.cast::<Node>().as_ref() };
        node.count.add();
    }
    let srcu = Srcu::new();
    srcu.prepare();
    let node = Box::leak(Box::new(Node {
        head: Head::new(),
        count: Count::default(),
    }));
    let count = node.count.clone();
    let node = NonNull::from(node);
    for round in 1..=3 {
        let _section = (round == 2).then(|| srcu.read_lock());
        // SAFETY: The node outlives the call, and the barrier of the previous round has returned.
        unsafe { srcu.call_raw(node.cast(), run) };
        drop(_section);
        srcu.barrier().unwrap();
        assert_eq!(count.get(), round);
    }
    // SAFETY: The node comes from `Box::leak` above, and the last callback has returned.
    drop(unsafe { Box::from_raw(node.as_ptr()) });
}
