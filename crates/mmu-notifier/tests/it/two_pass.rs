//! The callbacks of intervals and their second pass.

use crate::interval::Shadow;
use crate::support::{At, Gate, Log, Probe, Slot, nothing, page, probes, spawn};
use mmu_notifier::{Event, Finish, IntervalNotifier, MmWithUser, VaRange, WouldBlock};
use std::sync::{Arc, Mutex};

type Order = Arc<Mutex<Vec<(&'static str, u32)>>>;

/// Makes a state that records its start and its finish.
fn two_pass(order: &Order, number: u32) -> Shadow {
    let order = Arc::clone(order);
    Shadow::with(move |_| {
        order.lock().unwrap().push(("start", number));
        let order = Arc::clone(&order);
        Ok(Some(Finish::new(move || {
            order.lock().unwrap().push(("finish", number))
        })))
    })
}

#[test]
fn b_33_all_starts_come_before_all_finishes() {
    let (mm, order) = (MmWithUser::new(), Order::default());
    let nodes = [1, 2, 3]
        .map(|n| IntervalNotifier::insert(&mm, page(u64::from(n)), two_pass(&order, n)).unwrap());
    drop(mm.invalidate(VaRange::ALL, Event::Clear));
    let expected: Vec<_> = [
        ("start", 1),
        ("start", 2),
        ("start", 3),
        ("finish", 1),
        ("finish", 2),
        ("finish", 3),
    ]
    .into();
    assert_eq!(std::mem::take(&mut *order.lock().unwrap()), expected);
    let _refuses =
        IntervalNotifier::insert(&mm, page(4), Shadow::with(|_| Err(WouldBlock))).unwrap();
    assert!(mm.try_invalidate(VaRange::ALL, Event::Clear).is_err());
    assert_eq!(
        *order.lock().unwrap(),
        expected,
        "on a refusal the earlier finishes still run"
    );
    drop(nodes);
}

#[test]
fn b_34_remove_waits_for_a_pending_finish() {
    let (mm, gate) = (Arc::new(MmWithUser::new()), Gate::new());
    let shadow = Shadow::with({
        let gate = Arc::clone(&gate);
        move |_| {
            let gate = Arc::clone(&gate);
            Ok(Some(Finish::new(move || gate.pass())))
        }
    });
    let node = IntervalNotifier::insert(&mm, page(1), shadow).unwrap();
    let walker = spawn({
        let mm = Arc::clone(&mm);
        move || drop(mm.invalidate(page(1), Event::Clear))
    });
    gate.wait_for(1);
    let remover = spawn(move || drop(node.remove().unwrap()));
    remover.assert_blocked();
    gate.open();
    walker.join();
    remover.join();
}

#[test]
fn a_panicking_interval_is_counted_and_the_window_closes() {
    let mm = MmWithUser::new();
    let node =
        IntervalNotifier::insert(&mm, page(1), Shadow::with(|_| panic!("as this test wants")))
            .unwrap();
    let seq = node.read_begin();
    drop(mm.invalidate(page(1), Event::Clear));
    assert_eq!((mm.callback_panics(), mm.interval_snapshot()), (1, (4, 0)));
    assert!(
        node.check_retry(seq),
        "the sequence was there before the callback"
    );
    assert_eq!(node.remove().unwrap().events.len(), 1);
}

/// The second passes run in the window of their invalidation, which closes only after the last one
/// has run.
#[test]
fn b_33_finishes_run_before_the_window_closes() {
    let (mm, seen) = (MmWithUser::new(), Arc::new(Mutex::new(Vec::new())));
    let shadow = || {
        let (handle, seen) = ((*mm).clone(), Arc::clone(&seen));
        Shadow::with(move |_| {
            let (handle, seen) = (handle.clone(), Arc::clone(&seen));
            Ok(Some(Finish::new(move || {
                seen.lock().unwrap().push(handle.interval_snapshot())
            })))
        })
    };
    let nodes = [(); 2].map(|()| IntervalNotifier::insert(&mm, page(1), shadow()).unwrap());
    drop(mm.invalidate(page(1), Event::Clear));
    let refuses =
        IntervalNotifier::insert(&mm, page(2), Shadow::with(|_| Err(WouldBlock))).unwrap();
    assert!(mm.try_invalidate(VaRange::ALL, Event::Clear).is_err());
    assert_eq!(
        *seen.lock().unwrap(),
        [(3, 1), (3, 1), (5, 1), (5, 1)],
        "of a refusal as well"
    );
    drop((nodes, refuses));
}

/// Two invalidations of one interval run at once, and each has its own second pass.
#[test]
fn b_33_parallel_invalidations_have_a_finish_each() {
    let (mm, gate, made) = (
        Arc::new(MmWithUser::new()),
        Gate::new(),
        Arc::new(Mutex::new(0)),
    );
    let (log, shadow) = (Order::default(), {
        let (gate, made) = (Arc::clone(&gate), Arc::clone(&made));
        move |log: &Order| {
            let log = Arc::clone(log);
            Shadow::with(move |_| {
                let (gate, log) = (Arc::clone(&gate), Arc::clone(&log));
                let mut made = made.lock().unwrap();
                *made += 1;
                let number = *made;
                Ok(Some(Finish::new(move || {
                    gate.pass();
                    log.lock().unwrap().push(("finish", number));
                })))
            })
        }
    });
    let node = IntervalNotifier::insert(&mm, page(1), shadow(&log)).unwrap();
    let walkers = [(); 2].map(|()| {
        let mm = Arc::clone(&mm);
        spawn(move || drop(mm.invalidate(page(1), Event::Clear)))
    });
    gate.wait_for(2);
    assert_eq!(
        mm.interval_snapshot(),
        (3, 2),
        "both are in their second pass, in one window"
    );
    gate.open();
    walkers.into_iter().for_each(|walker| walker.join());
    let mut finished = log.lock().unwrap().clone();
    finished.sort_unstable();
    assert_eq!(finished, [("finish", 1), ("finish", 2)]);
    drop(node);
}

#[test]
fn b_33_a_finish_that_panics_is_counted_and_the_others_run() {
    let (mm, order) = (MmWithUser::new(), Order::default());
    let bad = Shadow::with(|_| {
        Ok(Some(Finish::new(|| {
            panic!("a second pass panics, as this test wants")
        })))
    });
    let _bad = IntervalNotifier::insert(&mm, page(1), bad).unwrap();
    let _good = IntervalNotifier::insert(&mm, page(2), two_pass(&order, 2)).unwrap();
    drop(mm.invalidate(VaRange::ALL, Event::Clear));
    assert_eq!((mm.callback_panics(), mm.interval_snapshot()), (1, (4, 0)));
    assert_eq!(*order.lock().unwrap(), [("start", 2), ("finish", 2)]);
}

/// In the callback of an interval, in a bracket or at exit, `remove` and `read_begin` must not
/// wait: the window stays open until the callback returns.
#[test]
fn b_22_remove_and_read_begin_inside_a_callback_are_refused() {
    let (mm, refused) = (MmWithUser::new(), Arc::new(Mutex::new(Vec::new())));
    let slot = Arc::new(Mutex::new(None::<IntervalNotifier<Shadow>>));
    let shadow = Shadow::with({
        let (slot, refused) = (Arc::clone(&slot), Arc::clone(&refused));
        move |range| {
            let other = slot
                .lock()
                .unwrap()
                .take()
                .expect("it is put back each time");
            let seq = other.read_begin();
            let stale = other.try_install(seq, |_| ()).is_err();
            let other = other
                .remove()
                .err()
                .expect("it would wait for this callback")
                .interval;
            refused.lock().unwrap().push((range.event().name(), stale));
            *slot.lock().unwrap() = Some(other);
            Ok(None)
        }
    });
    // The core calls intervals in the order of their first pages.
    let other = IntervalNotifier::insert(&mm, page(1), Shadow::default()).unwrap();
    let caller = IntervalNotifier::insert(&mm, page(2), shadow).unwrap();
    *slot.lock().unwrap() = Some(other);
    drop(mm.invalidate(VaRange::ALL, Event::Clear));
    let handle = (*mm).clone();
    drop(mm);
    assert_eq!(
        *refused.lock().unwrap(),
        [("clear", true), ("release", true)]
    );
    assert_eq!(
        (handle.callback_panics(), handle.interval_snapshot()),
        (0, (6, 0))
    );
    drop(caller);
    let other = slot.lock().unwrap().take().unwrap();
    assert_eq!(other.remove().unwrap().events.len(), 2);
}

/// S-31 for the callbacks of intervals: put is allowed in both passes, and the free comes after the
/// bracket.
#[test]
fn s_31_an_intervals_callbacks_may_put() {
    for in_finish in [false, true] {
        let (mm, log) = (MmWithUser::new(), Log::default());
        let slot: Slot<Probe> = Slot::default();
        let subsystem = probes("a", &log, nothing());
        *slot.lock().unwrap() = Some(subsystem.get(&mm).unwrap());
        let shadow = Shadow::with(move |_| {
            let slot = Arc::clone(&slot);
            let put = move || drop(slot.lock().unwrap().take());
            if in_finish {
                return Ok(Some(Finish::new(put)));
            }
            put();
            Ok(None)
        });
        let _node = IntervalNotifier::insert(&mm, page(1), shadow).unwrap();
        let bracket = mm.invalidate(page(1), Event::Clear);
        assert_eq!(
            log.all(),
            [("a", At::Alloc)],
            "delisted before its turn came, and not freed yet"
        );
        drop(bracket);
        subsystem.synchronize().unwrap();
        assert_eq!(log.all(), [("a", At::Alloc), ("a", At::Free)]);
    }
}
