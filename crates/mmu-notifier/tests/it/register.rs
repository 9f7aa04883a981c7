//! Register and unregister.

use crate::support::{
    At, Counter, Gate, Hook, Log, Probe, nothing, page, probes, spawn, stop, wait_until,
};
use mmu_notifier::{
    Event, Finish, GetError, IntervalNotifier, IntervalOps, InvalidateRange, Mm, MmWithUser,
    Notifier, OwnedBracket, Registration, Va, WouldDeadlock,
};
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

#[test]
fn s_60_unregister_releases_once_and_hands_the_object_back() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let count = mm.mm_count();
    let registration = Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap();
    let probe = registration.unregister().unwrap();
    assert_eq!(
        log.all(),
        [("a", At::Release), ("a", At::Released)],
        "and it was not freed"
    );
    assert_eq!(mm.mm_count(), count);
    drop(probe);
}

#[test]
fn s_61_unregister_waits_for_a_running_callback() {
    let (mm, log, gate) = (Arc::new(MmWithUser::new()), Log::default(), Gate::new());
    let registration =
        Registration::new(&mm, Probe::new("a", &log, stop(At::Start, &gate))).unwrap();
    let walker = spawn({
        let mm = Arc::clone(&mm);
        move || drop(mm.invalidate(page(1), Event::Clear))
    });
    gate.wait_for(1);
    let unregister = spawn(move || registration.unregister().unwrap());
    unregister.assert_blocked();
    gate.open();
    walker.join();
    let probe = unregister.join();
    log.clear();
    drop(mm.invalidate(page(1), Event::Clear));
    assert_eq!(log.all(), [], "no callback ever again");
    drop(probe);
}

/// Many events occur, and after `unregister` none of them calls the notifier.
#[test]
fn s_61_after_unregister_the_count_of_callbacks_stands_still() {
    struct Counts(Counter);
    impl Notifier for Counts {
        fn invalidate_range_start(&self, _range: &InvalidateRange<'_>) {
            self.0.add();
        }
        fn invalidate_range_end(&self, _range: &InvalidateRange<'_>) {
            self.0.add();
        }
    }
    let (mm, stop, events) = (
        MmWithUser::new(),
        AtomicBool::new(false),
        Counter::default(),
    );
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    drop(mm.invalidate(page(1), Event::Clear));
                    events.add();
                }
            });
        }
        for _ in 0..200 {
            let registration = Registration::new(&mm, Counts(Counter::default())).unwrap();
            wait_until(|| registration.0.get() > 0);
            let counts = registration.unregister().unwrap();
            let (calls, before) = (counts.0.get(), events.get());
            wait_until(|| events.get() > before + 2);
            assert_eq!(counts.0.get(), calls, "called after it was unregistered");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(mm.callback_panics(), 0);
}

#[test]
fn s_62_unregister_from_a_callback_is_an_error() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let slot: Arc<Mutex<Option<Registration<Probe>>>> = Arc::default();
    let hook: Hook = {
        let (slot, log) = (Arc::clone(&slot), log.clone());
        Arc::new(move |at| {
            let registration = slot.lock().unwrap().take();
            if let Some(registration) = registration {
                let refused = registration
                    .unregister()
                    .err()
                    .expect("it would wait for itself");
                assert!(!refused.to_string().is_empty());
                log.add("refused", at);
                *slot.lock().unwrap() = Some(refused.registration);
            }
            true
        })
    };
    *slot.lock().unwrap() = Some(Registration::new(&mm, Probe::new("a", &log, hook)).unwrap());
    drop(mm.invalidate(page(1), Event::Clear));
    drop(mm.try_invalidate(page(1), Event::Clear).unwrap());
    assert!(!mm.test_young(Va::new(0x1000)));
    assert_eq!(
        (log.count("a", At::End), mm.callback_panics()),
        (2, 0),
        "still registered, and unharmed"
    );
    let handle = (*mm).clone();
    drop(mm);
    assert_eq!(
        log.names(At::Release),
        ["a", "refused"],
        "in the release of exit too"
    );
    let all = [
        At::Start,
        At::End,
        At::TryStart,
        At::End,
        At::Young,
        At::Release,
    ]
    .map(|at| ("refused", at));
    assert_eq!(
        log.all()
            .into_iter()
            .filter(|entry| entry.0 == "refused")
            .collect::<Vec<_>>(),
        all
    );
    let registration = slot.lock().unwrap().take().unwrap();
    assert_eq!(
        (
            registration.unregister().unwrap().name,
            handle.callback_panics()
        ),
        ("a", 0)
    );
}

#[test]
fn s_14_a_notifier_of_ones_own_is_registered_under_the_write_lock() {
    let (mm, log) = (Arc::new(MmWithUser::new()), Log::default());
    let bracket = mm.invalidate(page(1), Event::Clear);
    let registrar = spawn({
        let (mm, log) = (Arc::clone(&mm), log.clone());
        move || {
            let mut locked = mm.mmap_write_lock().unwrap();
            let refused = Registration::new(&mm, Probe::new("a", &log, nothing()))
                .err()
                .unwrap();
            Registration::new_locked(&mut locked, refused.notifier).unwrap()
        }
    });
    registrar.assert_blocked();
    drop(bracket);
    let registration = registrar.join();
    drop(mm.invalidate(page(1), Event::Clear));
    assert_eq!(
        log.all(),
        [("a", At::Start), ("a", At::End)],
        "nothing of the bracket that was open"
    );
    let mut locked = mm.mmap_write_lock().unwrap();
    let bracket = mm.invalidate(page(1), Event::Clear);
    let refused = Registration::new_locked(&mut locked, Probe::new("b", &log, nothing()))
        .err()
        .unwrap();
    assert_eq!(
        (refused.notifier.name, refused.error),
        ("b", WouldDeadlock),
        "it would wait for the bracket"
    );
    drop((bracket, locked));
    registration.unregister().unwrap();
    assert!(!mm.has_notifiers());
}

/// `?` keeps the reason and drops the value.
#[test]
fn errors_that_hand_a_value_back_convert_to_the_reason() {
    struct Quiet;
    impl IntervalOps for Quiet {
        fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
            None
        }
    }
    fn all(mm: &MmWithUser, log: &Log) -> Result<(), WouldDeadlock> {
        let interval = IntervalNotifier::insert(mm, page(1), Quiet)?;
        let registration = Registration::new(mm, Probe::new("a", log, nothing()))?;
        interval.remove()?;
        registration.unregister()?;
        Ok(())
    }
    let (mm, log) = (MmWithUser::new(), Log::default());
    assert_eq!(all(&mm, &log), Ok(()));
    let bracket = mm.invalidate(page(1), Event::Clear);
    assert_eq!(all(&mm, &log), Err(WouldDeadlock));
    drop(bracket);
    assert_eq!(
        (log.count("a", At::Free), mm.has_notifiers()),
        (2, true),
        "true: there has been an interval"
    );
}

thread_local! {
    static KEPT: RefCell<Option<OwnedBracket>> = const { RefCell::new(None) };
}

/// A notifier whose first `release` leaves a bracket open on its thread.
struct LeavesOpen(Counter);

impl Notifier for LeavesOpen {
    fn release(&self, mm: &Mm) {
        if self.0.add() == 1 {
            KEPT.set(Some(mm.invalidate_owned(page(1), Event::Clear)));
        }
    }
}

/// `unregister` checks a second time, after `release`, whether it would wait for its own thread.
#[test]
fn s_62_unregister_does_not_wait_for_a_bracket_that_release_left_open() {
    let (mm, releases, log) = (MmWithUser::new(), Counter::default(), Log::default());
    let registration = Registration::new(&mm, LeavesOpen(releases.clone())).unwrap();
    let refused = registration
        .unregister()
        .err()
        .expect("it would wait for the bracket of this thread");
    assert!(mm.has_notifiers(), "the registration is still good");
    assert_eq!(
        Registration::new(&mm, Probe::new("a", &log, nothing()))
            .err()
            .unwrap()
            .error,
        WouldDeadlock
    );
    KEPT.set(None);
    refused.registration.unregister().unwrap();
    assert_eq!(
        (releases.get(), mm.has_notifiers(), mm.callback_panics()),
        (2, false, 0)
    );
}

/// After `release`, exit checks whether it would wait for its own thread. It cannot return an
/// error, so it skips the wait.
#[test]
fn s_62_exit_does_not_wait_for_a_bracket_that_release_left_open() {
    let (mm, releases) = (MmWithUser::new(), Counter::default());
    let registration = Registration::new(&mm, LeavesOpen(releases.clone())).unwrap();
    let handle = (*mm).clone();
    drop(mm);
    assert_eq!((releases.get(), handle.has_notifiers()), (1, false));
    KEPT.set(None);
    assert!(registration.unregister().is_ok());
}

/// `release` panics both in exit and in `unregister`. The panics are counted, and everything else
/// continues.
#[test]
fn a_release_that_panics_is_counted_and_holds_nothing_up() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let bad: Hook =
        Arc::new(|at| at != At::Release || panic!("a release panics, as this test wants"));
    let first = Registration::new(&mm, Probe::new("first", &log, Arc::clone(&bad))).unwrap();
    let second = Registration::new(&mm, Probe::new("second", &log, bad)).unwrap();
    let _last = Registration::new(&mm, Probe::new("last", &log, nothing())).unwrap();
    assert_eq!(
        (second.unregister().unwrap().name, mm.callback_panics()),
        ("second", 1)
    );
    let handle = (*mm).clone();
    drop(mm);
    assert_eq!(
        (log.names(At::Release), handle.callback_panics()),
        (vec!["second", "last", "first"], 2)
    );
    assert!(!handle.has_notifiers() && first.unregister().is_ok());
}

/// In a deferred free, functions that could wait are refused, because the reclaimer could wait for
/// itself.
#[test]
fn s_65_register_and_unregister_in_a_deferred_free_are_refused() {
    struct Frees(Box<dyn FnMut() + Send + Sync>);
    impl Notifier for Frees {}
    impl Drop for Frees {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    let (mm, log, refused) = (MmWithUser::new(), Log::default(), Counter::default());
    let other = Arc::new(MmWithUser::new());
    let mut held = Some(Registration::new(&other, Probe::new("held", &log, nothing())).unwrap());
    let on_free = {
        let (other, log, refused) = (Arc::clone(&other), log.clone(), refused.clone());
        move || {
            let subsystem = probes("never", &log, nothing());
            refused.add_if(
                subsystem
                    .get(&other)
                    .is_err_and(|error| error == GetError::WouldDeadlock),
            );
            refused.add_if(Registration::new(&other, Probe::new("b", &log, nothing())).is_err());
            refused.add_if(other.mmap_write_lock().is_err());
            refused
                .add_if(subsystem.drain_until_idle().is_err() && subsystem.synchronize().is_err());
            refused.add_if(held.take().unwrap().unregister().is_err());
        }
    };
    Registration::new(&mm, Frees(Box::new(on_free)))
        .unwrap()
        .put();
    wait_until(|| mm.mm_count() == 1);
    assert_eq!((refused.get(), mm.callback_panics()), (5, 0));
    let (freed, wait) = std::sync::mpsc::channel();
    let again = Arc::clone(&other);
    Registration::new(&mm, Probe::new("c", &log, nothing()))
        .unwrap()
        .unregister_no_release(move |_| {
            freed.send(again.mmap_write_lock().is_err()).unwrap();
            panic!("a deferred free panics, as this test wants");
        });
    assert!(wait.recv().unwrap(), "in this kind of free as well");
    wait_until(|| mm.mm_count() == 1);
    assert_eq!(
        (mm.callback_panics(), log.count("never", At::Alloc)),
        (1, 0)
    );
}

/// If a thread drops an interval inside a bracket of its own, the reclaimer drops the state. There,
/// functions that could wait are refused as in a deferred free.
#[test]
fn s_65_register_in_the_deferred_drop_of_an_interval_is_refused() {
    struct State(Box<dyn FnMut() + Send>);
    impl IntervalOps for State {
        fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
            None
        }
    }
    impl Drop for State {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    let (mm, other, log, refused) = (
        MmWithUser::new(),
        MmWithUser::new(),
        Log::default(),
        Counter::default(),
    );
    let on_drop = {
        let (log, refused) = (log.clone(), refused.clone());
        move || {
            refused.add_if(Registration::new(&other, Probe::new("a", &log, nothing())).is_err());
            refused.add_if(other.mmap_write_lock().is_err());
        }
    };
    let node = IntervalNotifier::insert(&mm, page(1), State(Box::new(on_drop))).unwrap();
    let bracket = mm.invalidate(page(1), Event::Clear);
    drop(node);
    assert_eq!(refused.get(), 0, "the window is open");
    drop(bracket);
    wait_until(|| mm.mm_count() == 1);
    assert_eq!((refused.get(), mm.callback_panics()), (2, 0));
}

#[test]
fn s_65_a_failed_register_hands_the_object_back_for_another_try() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let bracket = mm.invalidate(page(1), Event::Clear);
    let failed = Registration::new(&mm, Probe::new("a", &log, nothing()))
        .err()
        .unwrap();
    drop(bracket);
    let registration = Registration::new(&mm, failed.notifier).unwrap();
    assert_eq!(registration.unregister().unwrap().name, "a");
}

#[test]
fn s_66_register_waits_for_a_start_in_flight_and_sees_none_of_it() {
    let (mm, log) = (Arc::new(MmWithUser::new()), Log::default());
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let register = spawn({
        let (mm, log) = (Arc::clone(&mm), log.clone());
        move || Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap()
    });
    wait_until(|| mm.has_notifiers());
    register.assert_blocked();
    drop(bracket);
    let _registered = register.join();
    assert_eq!(log.all(), []);
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(log.all(), [("a", At::Start), ("a", At::End)]);
}

/// A second getter may find the listed object while the first one still waits. The second getter
/// must wait too, because otherwise it could cache a translation that an older bracket is about to
/// change.
#[test]
fn s_66_a_second_getter_waits_for_the_start_in_flight_too() {
    let (mm, log) = (Arc::new(MmWithUser::new()), Log::default());
    let subsystem = Arc::new(probes("a", &log, nothing()));
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let get = || {
        let (mm, subsystem) = (Arc::clone(&mm), Arc::clone(&subsystem));
        spawn(move || subsystem.get(&mm).unwrap())
    };
    let first = get();
    wait_until(|| mm.has_notifiers());
    let second = get();
    second.assert_blocked();
    drop(bracket);
    assert!(std::ptr::eq(&*first.join(), &*second.join()));
}

#[test]
fn s_67_a_nested_start_passes_a_waiting_registrar() {
    let (mm, log) = (Arc::new(MmWithUser::new()), Log::default());
    let outer = mm.invalidate(page(1), Event::Unmap);
    let register = spawn({
        let (mm, log) = (Arc::clone(&mm), log.clone());
        move || Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap()
    });
    wait_until(|| mm.has_notifiers());
    let inner = mm.invalidate(page(2), Event::Unmap);
    register.assert_blocked();
    drop(inner);
    assert_eq!(
        log.all(),
        [("a", At::Start), ("a", At::End)],
        "the inner one is younger than the registration"
    );
    drop(outer);
    let _registered = register.join();
    assert_eq!(
        log.all().len(),
        2,
        "and the outer one is older: neither its start nor its end"
    );
}

/// If a signal comes during `register`, the kernel returns EINTR. In this crate, the registrar that
/// waits for brackets and the registrar that waits for the lock both continue to wait, and both
/// succeed.
#[test]
fn s_68_a_signal_does_not_interrupt_a_waiting_register() {
    let (mm, log) = (Arc::new(MmWithUser::new()), Log::default());
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let register = |name| {
        let (mm, log) = (Arc::clone(&mm), log.clone());
        spawn(move || Registration::new(&mm, Probe::new(name, &log, nothing())).unwrap())
    };
    let first = register("first");
    wait_until(|| mm.has_notifiers());
    let second = register("second");
    for _ in 0..3 {
        second.assert_blocked();
        first.interrupt();
        second.interrupt();
        first.assert_blocked();
    }
    drop(bracket);
    let _registered = [first.join(), second.join()];
    assert_eq!(log.all(), [], "neither knows the bracket");
    drop(mm.invalidate(page(1), Event::Unmap));
    let mut started = log.names(At::Start);
    started.sort_unstable();
    assert_eq!(started, ["first", "second"]);
}

#[test]
fn s_69_an_event_that_begins_after_register_is_delivered() {
    let (mm, log) = (Arc::new(MmWithUser::new()), Log::default());
    let _registered = Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap();
    let other = Arc::clone(&mm);
    spawn(move || drop(other.invalidate(page(1), Event::Unmap))).join();
    assert_eq!(log.all(), [("a", At::Start), ("a", At::End)]);
}

#[test]
fn s_70_an_object_can_be_registered_again_after_unregister() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let mut probe = Probe::new("a", &log, nothing());
    for _ in 0..3 {
        let registration = Registration::new(&mm, probe).unwrap();
        drop(mm.invalidate(page(1), Event::Clear));
        probe = registration.unregister().unwrap();
    }
    let counts = [At::Start, At::End, At::Released, At::Free].map(|at| log.count("a", at));
    assert_eq!(counts, [3, 3, 3, 0], "and each time it was at work");
    drop(probe);
}

#[test]
fn s_64_unregister_no_release_does_not_wait_and_frees_after_the_walker() {
    let (mm, log, gate) = (Arc::new(MmWithUser::new()), Log::default(), Gate::new());
    let registration =
        Registration::new(&mm, Probe::new("a", &log, stop(At::Start, &gate))).unwrap();
    let count = mm.mm_count();
    let walker = spawn({
        let mm = Arc::clone(&mm);
        move || drop(mm.invalidate(page(1), Event::Clear))
    });
    gate.wait_for(1);
    let (hand_back, back) = std::sync::mpsc::channel();
    registration.unregister_no_release(move |probe| hand_back.send(probe).unwrap());
    assert!(
        !mm.has_notifiers(),
        "it has returned, and the walker is still inside"
    );
    let waiter = spawn(move || back.recv().unwrap());
    waiter.assert_blocked();
    gate.open();
    walker.join();
    drop(waiter.join());
    wait_until(|| mm.mm_count() == count - 1);
    assert_eq!(log.names(At::Release), Vec::<&str>::new());
}
