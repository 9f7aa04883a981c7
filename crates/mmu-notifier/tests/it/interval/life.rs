//! Inserts, removals and drops of intervals, and their callback at exit.

use super::{Shadow, insert, told};
use crate::support::{Counter, Gate, page, spawn};
use mmu_notifier::{
    Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, MmWithUser, Va, VaRange,
};
use std::sync::Arc;

#[test]
fn b_11_the_last_address_is_fine_and_overflow_is_not() {
    assert!(VaRange::covering(Va::new(0x1000), 0).is_err());
    assert!(VaRange::covering(Va::new(u64::MAX - 1), 3).is_err());
    let (mm, top) = (
        MmWithUser::new(),
        VaRange::covering(Va::new(u64::MAX), 1).unwrap(),
    );
    let node = insert(&mm, top);
    drop(mm.invalidate(top, Event::Unmap));
    assert_eq!(told(&node), 1);
}

/// The type system checks this: `insert` takes an `MmWithUser`, and after exit there is none.
#[test]
fn b_12_a_dead_address_space_takes_no_interval() {
    let mm = MmWithUser::new();
    let node = insert(&mm, page(1));
    let handle = node.mm().clone();
    drop(mm);
    assert!(handle.mmget_not_zero().is_none());
    assert_eq!(handle.mm_count(), 2, "this handle and the node's");
}

#[test]
fn b_15_an_insert_while_something_runs_makes_its_reader_wait() {
    let mm = Arc::new(MmWithUser::new());
    let _first = insert(&mm, page(9));
    let bracket = mm.invalidate(page(1), Event::Unmap);
    assert_eq!(mm.interval_snapshot(), (2, 1));
    let node = insert(&mm, page(1));
    assert_eq!(mm.interval_snapshot(), (3, 1));
    let reader = spawn(move || {
        let seq = node.read_begin();
        (node.try_install(seq, |_| ()), told(&node))
    });
    reader.assert_blocked();
    drop(bracket);
    assert_eq!(
        reader.join(),
        (Ok(()), 0),
        "it waited, and was not called for what it is too young for"
    );
}

#[test]
fn b_16_an_insert_into_a_full_window_is_deferred() {
    let mm = MmWithUser::new();
    let _hit = insert(&mm, page(1));
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let node = insert(&mm, page(1));
    let nested = mm.invalidate(page(1), Event::Unmap);
    drop(nested);
    assert_eq!(told(&node), 0, "no callback in this window");
    drop(bracket);
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(told(&node), 1, "and in the tree after it");
}

#[test]
fn b_17_a_deferred_insert_can_be_removed_at_once() {
    let mm = MmWithUser::new();
    let _hit = insert(&mm, page(1));
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let [a, b, c] = [(); 3].map(|()| insert(&mm, page(1)));
    for node in [b, a, c] {
        assert!(node.remove().unwrap().events.is_empty());
    }
    drop(bracket);
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(mm.interval_snapshot(), (6, 0));
}

#[test]
fn b_21_remove_in_a_full_window_returns_after_it() {
    let mm = Arc::new(MmWithUser::new());
    let node = insert(&mm, page(1));
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let remover = spawn(move || node.remove().unwrap().events.len());
    remover.assert_blocked();
    drop(bracket);
    assert_eq!(remover.join(), 1);
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(mm.interval_snapshot(), (4, 0), "it is in the tree no more");
}

#[test]
fn b_22_remove_waits_for_a_running_callback() {
    let (mm, gate, calls) = (Arc::new(MmWithUser::new()), Gate::new(), Counter::default());
    let shadow = Shadow::with({
        let (gate, calls) = (Arc::clone(&gate), calls.clone());
        move |_| {
            calls.add();
            gate.pass();
            Ok(None)
        }
    });
    let node = IntervalNotifier::insert(&mm, page(1), shadow).unwrap();
    let walker = spawn({
        let mm = Arc::clone(&mm);
        move || drop(mm.invalidate(page(1), Event::Clear))
    });
    gate.wait_for(1);
    let remover = spawn(move || node.remove().unwrap());
    remover.assert_blocked();
    gate.open();
    walker.join();
    let shadow = remover.join();
    drop(mm.invalidate(page(1), Event::Clear));
    drop(mm.try_invalidate(page(1), Event::Clear).unwrap());
    let handle = (**mm).clone();
    drop(mm);
    assert_eq!((shadow.events.len(), handle.mm_users()), (1, 0));
    assert_eq!(
        calls.get(),
        1,
        "no callback afterwards, not even that of exit"
    );
}

#[test]
fn b_23_remove_outside_a_full_window_is_immediate() {
    let mm = MmWithUser::new();
    let (node, other) = (insert(&mm, page(1)), insert(&mm, page(2)));
    assert!(node.remove().is_ok());
    let bracket = mm.invalidate(page(5), Event::Unmap);
    assert!(
        other.remove().is_ok(),
        "in a partial one, in this very thread"
    );
    drop(bracket);
}

#[test]
fn b_28_exit_calls_every_interval_and_keeps_it_in_the_tree() {
    let mm = MmWithUser::new();
    let top = VaRange::covering(Va::new(u64::MAX), 1).unwrap();
    let nodes = [insert(&mm, page(1)), insert(&mm, top)];
    drop(mm);
    for node in &nodes {
        assert_eq!(
            node.with_state(|state| state
                .events
                .iter()
                .map(|event| event.name())
                .collect::<Vec<_>>()),
            ["release"]
        );
        let seq = node.read_begin();
        assert!(
            node.try_install(seq, |_| ()).is_ok(),
            "the protocol is idle again; what fails is mmget_not_zero"
        );
        assert!(node.mm().mmget_not_zero().is_none());
    }
    drop(nodes[0].mm().invalidate(page(1), Event::Unmap));
    assert_eq!(told(&nodes[0]), 2, "and it is still told");
}

#[test]
fn b_29_a_node_keeps_the_address_spaces_memory() {
    let mm = MmWithUser::new();
    let node = insert(&mm, page(1));
    drop(mm);
    assert_eq!((node.mm().mm_count(), node.mm().mm_users()), (1, 0));
    assert!(matches!(
        node.remove().unwrap().events[..],
        [Event::Release(_)]
    ));
}

#[test]
fn b_30_the_first_insert_waits_for_brackets_that_do_not_count() {
    let mm = Arc::new(MmWithUser::new());
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let first = spawn({
        let mm = Arc::clone(&mm);
        move || insert(&mm, page(1))
    });
    first.assert_blocked();
    drop(bracket);
    let node = first.join();
    assert_eq!(
        mm.interval_snapshot(),
        (2, 0),
        "its end did not count below zero"
    );
    assert_eq!(told(&node), 0);
}

#[test]
fn b_31_a_first_insert_that_cannot_wait_links_nothing() {
    let mm = MmWithUser::new();
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let state = Shadow {
        entry: Some(7),
        ..Shadow::default()
    };
    let refused = IntervalNotifier::insert(&mm, page(1), state).err().unwrap();
    drop(bracket);
    assert_eq!((mm.interval_snapshot(), mm.mm_count()), ((2, 0), 1));
    let node = IntervalNotifier::insert(&mm, page(1), refused.state).unwrap();
    assert_eq!(
        node.with_state(|state| state.entry),
        Some(7),
        "the state came back"
    );
}

/// The holder of the write lock may insert the first interval of the address space. This insert,
/// like one without the write lock, waits for the brackets of other threads.
#[test]
fn b_30_the_first_insert_may_be_under_the_write_lock() {
    let mm = Arc::new(MmWithUser::new());
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let first = spawn({
        let mm = Arc::clone(&mm);
        move || {
            let mut locked = mm.mmap_write_lock().unwrap();
            assert!(
                IntervalNotifier::insert(&mm, page(1), Shadow::default()).is_err(),
                "it would wait for the lock"
            );
            IntervalNotifier::insert_locked(&mut locked, page(1), Shadow::default()).unwrap()
        }
    });
    first.assert_blocked();
    drop(bracket);
    let node = first.join();
    assert_eq!((mm.interval_snapshot(), node.range()), ((2, 0), page(1)));
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(told(&node), 1);
    let mut locked = mm.mmap_write_lock().unwrap();
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let second = IntervalNotifier::insert_locked(&mut locked, page(2), Shadow::default());
    assert!(second.is_ok(), "only the first one waits");
    drop((bracket, second));
}

#[test]
fn b_31_a_first_insert_under_the_write_lock_is_refused_in_a_bracket() {
    let mm = MmWithUser::new();
    let mut locked = mm.mmap_write_lock().unwrap();
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let state = Shadow {
        entry: Some(7),
        ..Shadow::default()
    };
    let refused = IntervalNotifier::insert_locked(&mut locked, page(1), state)
        .err()
        .unwrap();
    drop(bracket);
    assert_eq!(
        (refused.state.entry, mm.has_notifiers(), mm.mm_count()),
        (Some(7), false, 1)
    );
    assert!(IntervalNotifier::insert_locked(&mut locked, page(1), refused.state).is_ok());
}

/// If the drop of an interval would wait for its own thread, the reclaimer completes it.
#[test]
fn dropping_an_interval_in_its_own_bracket_does_not_hang_or_leak() {
    struct Held(Option<std::sync::mpsc::Sender<()>>);
    impl IntervalOps for Held {
        fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
            None
        }
    }
    impl Drop for Held {
        fn drop(&mut self) {
            self.0.take().unwrap().send(()).unwrap();
        }
    }
    let mm = MmWithUser::new();
    let (dropped, wait) = std::sync::mpsc::channel();
    let node = IntervalNotifier::insert(&mm, page(1), Held(Some(dropped))).unwrap();
    let bracket = mm.invalidate(page(1), Event::Clear);
    drop(node);
    assert!(wait.try_recv().is_err(), "its window is open");
    drop(bracket);
    wait.recv().unwrap();
    drop(mm.invalidate(page(1), Event::Clear));
    assert_eq!(mm.interval_snapshot(), (4, 0));
}

/// If the drop of an interval would wait for its own thread, the reclaimer completes it. So the
/// drop of the state runs on the reclaimer.
#[test]
fn a_panic_in_the_drop_of_a_state_on_the_reclaimer_is_counted() {
    struct Panics;
    impl IntervalOps for Panics {
        fn invalidate(&mut self, _: &InvalidateRange<'_>) -> Option<Finish> {
            None
        }
    }
    impl Drop for Panics {
        fn drop(&mut self) {
            panic!("the drop of a state");
        }
    }
    let mm = MmWithUser::new();
    let interval = IntervalNotifier::insert(&mm, page(1), Panics).unwrap();
    let bracket = mm.invalidate(page(1), Event::Unmap);
    drop(interval);
    assert_eq!(
        mm.callback_panics(),
        0,
        "it is in the tree until the bracket ends"
    );
    drop(bracket);
    crate::support::wait_until(|| mm.mm_count() == 1);
    assert_eq!(mm.callback_panics(), 1);
}
