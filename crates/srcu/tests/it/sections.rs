//! Read sections: nesting, ends in any order, several domains, handles, and ends on other threads.

use srcu::Srcu;
use std::thread;

#[test]
fn a_section_is_seen_by_the_thread_that_is_in_it() {
    let srcu = Srcu::new();
    assert!(!srcu.read_lock_held());
    let outer = srcu.read_lock();
    let inner = srcu.read_lock();
    assert!(srcu.read_lock_held());
    thread::scope(|scope| {
        assert!(
            !scope.spawn(|| srcu.read_lock_held()).join().unwrap(),
            "another thread is not in it"
        );
    });
    drop(outer);
    assert!(srcu.read_lock_held());
    inner.unlock();
    assert!(!srcu.read_lock_held());
}

#[test]
fn guards_of_one_thread_end_in_any_order() {
    let srcu = Srcu::new();
    let mut guards: Vec<_> = (0..1000).map(|_| srcu.read_lock()).collect();
    while guards.len() > 1 {
        drop(guards.swap_remove(guards.len() / 2));
        assert!(srcu.read_lock_held());
    }
    guards.clear();
    assert!(!srcu.read_lock_held());
    srcu.synchronize().unwrap();
}

#[test]
fn a_section_of_one_domain_is_none_of_another() {
    let (a, b) = (Srcu::new(), Srcu::new());
    let _in_a = a.read_lock();
    assert!(!b.read_lock_held());
    b.synchronize().unwrap();
    b.call(|| ());
    b.barrier().unwrap();
}

#[test]
fn a_reader_opens_the_same_sections() {
    let srcu = Srcu::new();
    let reader = srcu.reader();
    let guard = reader.read_lock();
    assert!(srcu.read_lock_held());
    assert!(srcu.synchronize().is_err());
    drop(guard);
    srcu.synchronize().unwrap();
}

#[test]
fn a_section_that_moved_is_waited_for_until_it_ends_there() {
    let srcu = Srcu::new();
    let section = srcu.down_read();
    assert!(!srcu.read_lock_held(), "it belongs to no thread");
    let cookie = srcu.start_poll();
    assert!(!srcu.poll(cookie));
    thread::scope(|scope| {
        scope.spawn(move || section.up_read());
        srcu.synchronize().unwrap();
    });
    assert!(srcu.poll(cookie));
}

#[test]
fn threads_come_and_go_and_their_counters_are_used_again() {
    let srcu = Srcu::new();
    for _ in 0..200 {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    assert!(!srcu.read_lock_held());
                    drop(srcu.read_lock());
                });
            }
        });
        srcu.synchronize().unwrap();
    }
}

#[test]
fn more_threads_than_fit_in_a_page_can_be_inside_at_once() {
    let srcu = Srcu::new();
    let inside = std::sync::Barrier::new(151);
    let leave = std::sync::Barrier::new(151);
    thread::scope(|scope| {
        for _ in 0..150 {
            scope.spawn(|| {
                let _section = srcu.read_lock();
                inside.wait();
                leave.wait();
            });
        }
        inside.wait();
        let cookie = srcu.start_poll();
        assert!(!srcu.poll(cookie));
        leave.wait();
        srcu.synchronize().unwrap();
        assert!(srcu.poll(cookie));
    });
}

#[test]
fn a_section_can_begin_and_end_in_a_thread_local_destructor() {
    use std::sync::Arc;
    struct AtExit(Arc<Srcu>);
    impl Drop for AtExit {
        fn drop(&mut self) {
            drop(self.0.read_lock());
            self.0.synchronize().unwrap();
        }
    }
    thread_local!(static AT_EXIT: std::cell::RefCell<Option<AtExit>> = const { std::cell::RefCell::new(None) });
    let srcu = Arc::new(Srcu::new());
    let for_thread = Arc::clone(&srcu);
    thread::spawn(move || AT_EXIT.set(Some(AtExit(for_thread))))
        .join()
        .unwrap();
    assert_eq!(Arc::strong_count(&srcu), 1, "the destructor has run");
    srcu.synchronize().unwrap();
}
