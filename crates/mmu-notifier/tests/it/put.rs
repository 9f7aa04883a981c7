//! Put and the deferred free.

use crate::support::{
    At, Counter, Gate, Hook, Log, Probe, Slot, nothing, page, probes, put_at, spawn, stop,
};
use mmu_notifier::{Event, MmWithUser, Notifier, Registration, Subsystem, Va};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

#[test]
fn s_20_a_put_that_is_not_the_last_changes_nothing() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    let (first, second) = (subsystem.get(&mm).unwrap(), subsystem.get(&mm).unwrap());
    second.put();
    subsystem.synchronize().unwrap();
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(first.users(), 1);
    assert_eq!(
        log.all(),
        [("a", At::Alloc), ("a", At::Start), ("a", At::End)]
    );
}

#[test]
fn s_21_the_last_put_delists_before_it_returns() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    subsystem.get(&mm).unwrap().put();
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(log.names(At::Start), Vec::<&str>::new());
    assert!(!mm.has_notifiers());
}

#[test]
fn s_22_the_free_waits_for_a_walker_and_put_does_not() {
    let (mm, log, gate) = (Arc::new(MmWithUser::new()), Log::default(), Gate::new());
    let subsystem = Arc::new(probes("a", &log, stop(At::Start, &gate)));
    let subscription = subsystem.get(&mm).unwrap();
    let walker = spawn({
        let mm = Arc::clone(&mm);
        move || drop(mm.invalidate(page(1), Event::Clear))
    });
    gate.wait_for(1);
    subscription.put();
    let freed = spawn({
        let subsystem = Arc::clone(&subsystem);
        move || subsystem.synchronize().unwrap()
    });
    freed.assert_blocked();
    assert_eq!(log.count("a", At::Free), 0);
    gate.open();
    walker.join();
    freed.join();
    assert_eq!(log.count("a", At::Free), 1);
}

/// Each address space has its own domain, so a reader of another address space delays no free.
#[test]
fn s_23_a_reader_of_another_address_space_delays_no_free() {
    let (mm, other, log) = (MmWithUser::new(), MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    let subscription = subsystem.get(&mm).unwrap();
    let (open, release) = (Gate::new(), Gate::new());
    let reader = spawn({
        let (open, release) = (Arc::clone(&open), Arc::clone(&release));
        move || {
            let bracket = other.invalidate(page(1), Event::Clear);
            open.open();
            release.pass();
            drop(bracket);
        }
    });
    open.pass();
    subscription.put();
    subsystem.synchronize().unwrap();
    assert_eq!(log.count("a", At::Free), 1);
    release.open();
    reader.join();
}

#[test]
fn s_24_the_free_is_done_before_the_address_space_is_let_go() {
    let mm = MmWithUser::new();
    let handle = Arc::new(Mutex::new(Some((*mm).clone())));
    let seen = Arc::new(AtomicUsize::new(0));
    let hook: Hook = {
        let (handle, seen) = (Arc::clone(&handle), Arc::clone(&seen));
        Arc::new(move |at| {
            if at == At::Free {
                let handle = handle.lock().unwrap().take().unwrap();
                seen.store(handle.mm_count(), Ordering::SeqCst);
            }
            true
        })
    };
    let log = Log::default();
    let subsystem = probes("a", &log, hook);
    let subscription = subsystem.get(&mm).unwrap();
    let keep = (*mm).clone();
    drop(mm);
    // The free waits for the bracket, so it runs after `put` has returned and dropped its handle.
    let bracket = keep.invalidate(page(1), Event::Clear);
    subscription.put();
    drop(bracket);
    subsystem.synchronize().unwrap();
    assert_eq!(
        seen.load(Ordering::SeqCst),
        3,
        "this handle, the hook's, and the notifier's own, still there"
    );
    assert_eq!(keep.mm_count(), 1);
}

#[test]
fn s_25_a_free_that_panics_still_lets_the_address_space_go() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes(
        "a",
        &log,
        Arc::new(|at| {
            assert!(
                at != At::Free,
                "a notifier's drop panics, as this test wants"
            );
            true
        }),
    );
    let count = mm.mm_count();
    subsystem.get(&mm).unwrap().put();
    subsystem.synchronize().unwrap();
    assert_eq!((mm.mm_count(), mm.callback_panics()), (count, 1));
    drop(mm.invalidate(page(1), Event::Unmap));
}

#[test]
fn s_26_get_after_last_put_makes_a_new_object() {
    let (mm, log, gate) = (Arc::new(MmWithUser::new()), Log::default(), Gate::new());
    let first = Counter::default();
    let hook: Hook = {
        let (gate, first) = (Arc::clone(&gate), first.clone());
        Arc::new(move |at| {
            if at == At::Free && first.add() == 1 {
                gate.pass();
            }
            true
        })
    };
    let subsystem = probes("a", &log, hook);
    let count = mm.mm_count();
    subsystem.get(&mm).unwrap().put();
    gate.wait_for(1);
    let new = subsystem.get(&mm).unwrap();
    assert_eq!(
        (log.count("a", At::Alloc), mm.mm_count()),
        (2, count + 2),
        "both are there"
    );
    gate.open();
    subsystem.synchronize().unwrap();
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(
        (
            log.count("a", At::Free),
            log.count("a", At::Start),
            new.users()
        ),
        (1, 1, 1)
    );
}

/// A notifier whose drop overwrites its state, so that a second drop or a later use is found.
struct Canary<'a> {
    state: AtomicU64,
    frees: &'a AtomicUsize,
}

const ALIVE: u64 = 0x5afe_5afe_5afe_5afe;

impl Notifier for Canary<'static> {}

impl Drop for Canary<'_> {
    fn drop(&mut self) {
        assert_eq!(
            self.state.swap(0xdead, Ordering::Relaxed),
            ALIVE,
            "freed twice"
        );
        self.frees.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn s_27_get_racing_the_last_put_never_returns_a_dying_object() {
    static ALLOCS: AtomicUsize = AtomicUsize::new(0);
    static FREES: AtomicUsize = AtomicUsize::new(0);
    static CANARIES: Subsystem<Canary<'static>> = Subsystem::new(|_| {
        ALLOCS.fetch_add(1, Ordering::Relaxed);
        Ok(Canary {
            state: AtomicU64::new(ALIVE),
            frees: &FREES,
        })
    });
    let mm = MmWithUser::new();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..500_000 {
                    let canary = CANARIES.get(&mm).unwrap();
                    assert_eq!(canary.state.load(Ordering::Relaxed), ALIVE);
                }
            });
        }
    });
    CANARIES.synchronize().unwrap();
    let (allocs, frees) = (
        ALLOCS.load(Ordering::Relaxed),
        FREES.load(Ordering::Relaxed),
    );
    assert!(
        allocs == frees && allocs > 0,
        "{allocs} made, {frees} freed"
    );
}

#[test]
fn s_28_many_putters_free_once() {
    for _ in 0..100 {
        let (mm, log) = (MmWithUser::new(), Log::default());
        let subsystem = probes("a", &log, nothing());
        let held: Vec<_> = (0..8).map(|_| subsystem.get(&mm).unwrap()).collect();
        std::thread::scope(|scope| {
            for one in held {
                scope.spawn(move || one.put());
            }
        });
        subsystem.synchronize().unwrap();
        assert_eq!(log.count("a", At::Free), 1);
    }
}

/// A surplus put does not compile, because `put` consumes its handle (see the doc test of
/// `Subscription`). A program can only put once for each get and each clone.
#[test]
fn s_29_each_reference_is_put_exactly_once() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    let first = subsystem.get(&mm).unwrap();
    let clone = first.try_clone().unwrap();
    first.put();
    assert_eq!(clone.users(), 1);
    clone.put();
    subsystem.synchronize().unwrap();
    assert_eq!(log.count("a", At::Free), 1);
}

#[test]
fn s_30_a_walker_on_a_put_object_still_reaches_the_rest() {
    let (mm, log, gate) = (Arc::new(MmWithUser::new()), Log::default(), Gate::new());
    let subsystems = [
        probes("b", &log, nothing()),
        probes("x", &log, stop(At::Start, &gate)),
        probes("a", &log, nothing()),
    ];
    let [_b, x, _a] = subsystems
        .each_ref()
        .map(|subsystem| subsystem.get(&mm).unwrap());
    let walker = spawn({
        let mm = Arc::clone(&mm);
        move || drop(mm.invalidate(page(1), Event::Clear))
    });
    gate.wait_for(1);
    x.put();
    gate.open();
    walker.join();
    assert_eq!(log.names(At::Start), ["a", "x", "b"]);
    assert_eq!(log.names(At::End), ["a", "b"]);
}

#[test]
fn s_31_a_callback_may_put_its_own_object() {
    for at in [At::Start, At::TryStart, At::End, At::Young] {
        let (mm, log) = (MmWithUser::new(), Log::default());
        let slot: Slot<Probe> = Slot::default();
        let after = probes("after", &log, nothing());
        let _after = after.get(&mm).unwrap();
        let subsystem = probes("x", &log, put_at(at, &slot));
        *slot.lock().unwrap() = Some(subsystem.get(&mm).unwrap());
        let start = if at == At::TryStart {
            At::TryStart
        } else {
            At::Start
        };
        let bracket = match start {
            At::TryStart => mm.try_invalidate(page(1), Event::Clear).unwrap(),
            _ => mm.invalidate(page(1), Event::Clear),
        };
        assert_eq!(log.count("x", At::Free), 0, "its section is open");
        drop(bracket);
        assert!(!mm.test_young(Va::new(0x1000)));
        subsystem.synchronize().unwrap();
        assert_eq!(
            (log.count("x", At::Free), log.count("x", at)),
            (1, 1),
            "at {at:?}"
        );
        let all = (
            log.count("after", start),
            log.count("after", At::End),
            log.count("after", At::Young),
        );
        assert_eq!(all, (1, 1, 1), "the walk went on");
        let place = |entry| log.all().iter().position(|one| *one == entry).unwrap();
        assert!(
            place(("x", At::Free)) > place(("after", at)),
            "freed after the walk that it was put in"
        );
    }
}

/// The walk calls the putter first, whose callback puts the victim. The victim is the next
/// subscriber of the walk, or the one after `between`. The rest of the walk must not call it.
/// `two_pass.rs` has the test of a callback of an interval that puts a subscriber.
#[test]
fn s_31_a_walk_does_not_call_a_notifier_that_its_callback_has_put() {
    for (at, between) in [At::Start, At::TryStart, At::End, At::Release]
        .map(|at| [(at, false), (at, true)])
        .concat()
    {
        let (mm, log) = (MmWithUser::new(), Log::default());
        let slot: Slot<Probe> = Slot::default();
        let victim = probes("victim", &log, nothing());
        *slot.lock().unwrap() = Some(victim.get(&mm).unwrap());
        let other = probes("between", &log, nothing());
        let _other = between.then(|| other.get(&mm).unwrap());
        let putter = probes("putter", &log, put_at(at, &slot));
        let _putter = putter.get(&mm).unwrap();
        match at {
            At::TryStart => drop(mm.try_invalidate(page(1), Event::Clear).unwrap()),
            At::Release => drop(mm),
            _ => drop(mm.invalidate(page(1), Event::Clear)),
        }
        victim.synchronize().unwrap();
        assert_eq!(
            (log.count("putter", at), log.count("victim", at)),
            (1, 0),
            "at {at:?}, one between: {between}"
        );
        assert_eq!(
            (log.count("victim", At::Free), log.count("between", at)),
            (1, usize::from(between))
        );
    }
}

#[test]
fn s_32_a_put_between_start_and_end_leaves_a_start_alone() {
    let (mm, log) = (Arc::new(MmWithUser::new()), Log::default());
    let old = probes("old", &log, nothing());
    let subscription = old.get(&mm).unwrap();
    let bracket = mm.invalidate(page(1), Event::Clear);
    subscription.put();
    let new = spawn({
        let (mm, log) = (Arc::clone(&mm), log.clone());
        move || probes("new", &log, nothing()).get(&mm).unwrap()
    });
    new.assert_blocked();
    drop(bracket);
    let _new = new.join();
    old.synchronize().unwrap();
    assert_eq!(
        (log.names(At::Start), log.names(At::End)),
        (vec!["old"], vec![])
    );
}

#[test]
fn s_33_put_never_calls_release() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    subsystem.get(&mm).unwrap().put();
    subsystem.synchronize().unwrap();
    drop(mm);
    assert_eq!(log.all(), [("a", At::Alloc), ("a", At::Free)]);
}

#[test]
fn s_34_a_registered_object_may_be_put() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let count = mm.mm_count();
    let (freed, wait) = std::sync::mpsc::channel();
    let hook: Hook = Arc::new(move |at| at != At::Free || freed.send(()).is_ok());
    Registration::new(&mm, Probe::new("a", &log, hook))
        .unwrap()
        .put();
    wait.recv().unwrap();
    crate::support::wait_until(|| mm.mm_count() == count);
    assert_eq!(log.all(), [("a", At::Free)]);
}

#[test]
fn s_35_put_returns_while_a_grace_period_is_stuck() {
    let (mm, log, gate) = (Arc::new(MmWithUser::new()), Log::default(), Gate::new());
    let stuck = probes("stuck", &log, stop(At::Start, &gate));
    let _stuck = stuck.get(&mm).unwrap();
    let others: Vec<_> = (0..100).map(|_| probes("a", &log, nothing())).collect();
    let held: Vec<_> = others.iter().map(|one| one.get(&mm).unwrap()).collect();
    let walker = spawn({
        let mm = Arc::clone(&mm);
        move || drop(mm.invalidate(page(1), Event::Clear))
    });
    gate.wait_for(1);
    drop(held);
    assert!(
        log.count("a", At::Free) == 0,
        "every put returned, no free has run"
    );
    assert!(
        mm.mmap_write_lock().is_ok() && stuck.get(&mm).is_ok(),
        "and none has kept a lock"
    );
    gate.open();
    walker.join();
    for one in &others {
        one.synchronize().unwrap();
    }
    assert_eq!(log.count("a", At::Free), 100);
}

/// The object holds the mutex. Each putter unlocks before it puts, so the object outlives every
/// unlock.
#[test]
fn s_36_unlock_then_put_touches_nothing_freed() {
    static COMPLETE: AtomicUsize = AtomicUsize::new(0);
    #[derive(Default)]
    struct Locked(Mutex<u64>);
    impl Notifier for Locked {}
    impl Drop for Locked {
        fn drop(&mut self) {
            COMPLETE.fetch_add(
                usize::from(*self.0.get_mut().unwrap() == 4),
                Ordering::Relaxed,
            );
        }
    }
    static LOCKED: Subsystem<Locked> = Subsystem::new(|_| Ok(Locked::default()));
    for _ in 0..200 {
        let mm = MmWithUser::new();
        let held: Vec<_> = (0..4).map(|_| LOCKED.get(&mm).unwrap()).collect();
        std::thread::scope(|scope| {
            for one in held {
                scope.spawn(move || {
                    *one.0.lock().unwrap() += 1;
                    one.put();
                });
            }
        });
    }
    LOCKED.synchronize().unwrap();
    assert_eq!(
        COMPLETE.load(Ordering::Relaxed),
        200,
        "each free came after every putter's unlock"
    );
}
