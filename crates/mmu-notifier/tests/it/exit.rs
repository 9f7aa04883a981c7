//! Exit and release.

use crate::support::{
    At, Counter, Gate, Hook, Log, Probe, Slot, nothing, page, probes, put_at, spawn, stop,
};
use mmu_notifier::{Event, MmWithUser, Notifier, Registration, Subsystem};
use std::sync::{Arc, Barrier};

#[test]
fn s_40_exit_releases_newest_first_and_then_delists() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystems = [probes("a", &log, nothing()), probes("b", &log, nothing())];
    let _held = subsystems
        .each_ref()
        .map(|subsystem| subsystem.get(&mm).unwrap());
    let handle = (*mm).clone();
    drop(mm);
    assert_eq!(log.names(At::Release), ["b", "a"]);
    assert!(!handle.has_notifiers());
}

#[test]
fn s_41_exit_does_not_return_before_release_has() {
    let (mm, log, gate) = (MmWithUser::new(), Log::default(), Gate::new());
    let subsystem = probes("a", &log, stop(At::Release, &gate));
    let _held = subsystem.get(&mm).unwrap();
    let exit = spawn(move || drop(mm));
    gate.wait_for(1);
    exit.assert_blocked();
    gate.open();
    exit.join();
    assert_eq!(log.count("a", At::Released), 1);
}

#[test]
fn s_42_exit_also_delists_a_subscriber_without_release() {
    struct Plain;
    impl Notifier for Plain {}
    static PLAIN: Subsystem<Plain> = Subsystem::new(|_| Ok(Plain));
    let mm = MmWithUser::new();
    let _held = PLAIN.get(&mm).unwrap();
    let handle = (*mm).clone();
    drop(mm);
    assert!(!handle.has_notifiers());
}

#[test]
fn s_43_after_exit_no_invalidation_reaches_a_subscriber() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    let held = subsystem.get(&mm).unwrap();
    drop(mm);
    drop(held.mm().invalidate(page(1), Event::Unmap));
    assert_eq!((log.count("a", At::Start), log.count("a", At::End)), (0, 0));
}

#[test]
fn s_44_an_invalidation_may_run_in_parallel_with_release() {
    let (mm, log, gate) = (MmWithUser::new(), Log::default(), Gate::new());
    let subsystem = probes("a", &log, stop(At::Release, &gate));
    let held = subsystem.get(&mm).unwrap();
    let exit = spawn(move || drop(mm));
    gate.wait_for(1);
    drop(held.mm().invalidate(page(1), Event::Clear));
    assert_eq!(
        log.names(At::Start),
        ["a"],
        "it is still listed while its release runs"
    );
    gate.open();
    exit.join();
}

#[test]
fn s_45_a_put_long_after_exit_frees_once() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    let held = subsystem.get(&mm).unwrap();
    let handle = (*mm).clone();
    drop(mm);
    assert_eq!(
        (held.users(), held.mm().id(), handle.mm_count()),
        (1, handle.id(), 2)
    );
    held.put();
    subsystem.synchronize().unwrap();
    assert_eq!((log.count("a", At::Free), handle.mm_count()), (1, 1));
}

#[test]
fn s_46_release_may_put_its_own_object() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let slot: Slot<Probe> = Slot::default();
    let subsystem = probes("a", &log, put_at(At::Release, &slot));
    *slot.lock().unwrap() = Some(subsystem.get(&mm).unwrap());
    drop(mm);
    subsystem.synchronize().unwrap();
    assert_eq!(
        log.all()[1..],
        [("a", At::Release), ("a", At::Released), ("a", At::Free)]
    );
}

#[test]
fn s_47_a_put_racing_exit_frees_once_and_not_before_release_returned() {
    for _ in 0..testkit::rounds(2000) {
        let (mm, log, line) = (MmWithUser::new(), Log::default(), Arc::new(Barrier::new(2)));
        let subsystem = probes("a", &log, nothing());
        let held = subsystem.get(&mm).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                line.wait();
                drop(mm);
            });
            line.wait();
            held.put();
        });
        subsystem.synchronize().unwrap();
        assert!(log.count("a", At::Release) <= 1);
        assert_eq!(log.count("a", At::Release), log.count("a", At::Released));
        assert_eq!(log.count("a", At::Free), 1);
        assert_eq!(
            log.all().last(),
            Some(&("a", At::Free)),
            "nothing comes after the free"
        );
    }
}

#[test]
fn s_48_exit_and_unregister_may_both_release_and_exit_waits_for_both() {
    let (mm, log, gate) = (MmWithUser::new(), Log::default(), Gate::new());
    let registration =
        Registration::new(&mm, Probe::new("a", &log, stop(At::Release, &gate))).unwrap();
    let unregister = spawn(move || registration.unregister().unwrap().name);
    gate.wait_for(1);
    let exit = spawn(move || drop(mm));
    gate.wait_for(2);
    exit.assert_blocked();
    unregister.assert_blocked();
    gate.open();
    exit.join();
    assert_eq!(
        log.count("a", At::Released),
        2,
        "two at once, and both are over"
    );
    assert_eq!(unregister.join(), "a");
}

/// A hook whose first release ends when the gate opens. Later releases end at once.
fn stays_in_first_release(gate: &Arc<Gate>) -> Hook {
    let (gate, calls) = (Arc::clone(gate), Counter::default());
    Arc::new(move |at| {
        if at == At::Release && calls.add() == 1 {
            gate.pass();
        }
        true
    })
}

/// The release that exit called has ended, and the release that `unregister` called still runs.
/// Exit waits for the latter.
#[test]
fn s_48_exit_waits_for_a_release_that_only_unregister_runs() {
    let (mm, log, gate) = (MmWithUser::new(), Log::default(), Gate::new());
    let hook = stays_in_first_release(&gate);
    let registration = Registration::new(&mm, Probe::new("a", &log, hook)).unwrap();
    let unregister = spawn(move || drop(registration.unregister().unwrap()));
    gate.wait_for(1);
    let exit = spawn(move || drop(mm));
    exit.assert_blocked();
    assert_eq!(log.count("a", At::Released), 1, "its own call is over");
    gate.open();
    exit.join();
    unregister.join();
}

#[test]
fn s_49_unregister_waits_for_a_release_that_exit_runs() {
    let (mm, log, gate) = (MmWithUser::new(), Log::default(), Gate::new());
    let hook = stays_in_first_release(&gate);
    let registration = Registration::new(&mm, Probe::new("a", &log, hook)).unwrap();
    let exit = spawn(move || drop(mm));
    gate.wait_for(1);
    let unregister = spawn(move || drop(registration.unregister().unwrap()));
    unregister.assert_blocked();
    gate.open();
    unregister.join();
    exit.join();
    assert_eq!(log.all().last(), Some(&("a", At::Free)));
}

#[test]
fn s_50_an_object_is_listed_until_its_release_has_returned() {
    // S-44 checks this for the `release` that exit calls, and this test for the one that
    // `unregister` calls.
    let (mm, log, gate) = (MmWithUser::new(), Log::default(), Gate::new());
    let registration =
        Registration::new(&mm, Probe::new("a", &log, stop(At::Release, &gate))).unwrap();
    let unregister = spawn(move || drop(registration.unregister().unwrap()));
    gate.wait_for(1);
    assert!(mm.has_notifiers());
    drop(mm.invalidate(page(1), Event::Clear));
    assert_eq!(
        (log.count("a", At::Start), log.count("a", At::Released)),
        (1, 0),
        "told, as its entries may still exist"
    );
    gate.open();
    unregister.join();
    drop(mm.invalidate(page(1), Event::Clear));
    assert_eq!(log.count("a", At::Start), 1);
}

#[test]
fn s_51_after_exit_unregister_waits_but_does_not_release_again() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let registration = Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap();
    let handle = (*mm).clone();
    drop(mm);
    assert_eq!((log.count("a", At::Released), handle.mm_count()), (1, 2));
    let bracket = handle.invalidate(page(1), Event::Clear);
    let unregister = spawn(move || registration.unregister().unwrap());
    unregister.assert_blocked();
    drop(bracket);
    let probe = unregister.join();
    assert_eq!(
        (
            log.count("a", At::Release),
            log.count("a", At::Free),
            handle.mm_count()
        ),
        (1, 0, 1)
    );
    drop(probe);
}

#[test]
fn s_52_a_listed_subscriber_keeps_the_address_spaces_memory() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    let held = subsystem.get(&mm).unwrap();
    drop(mm);
    assert_eq!(
        held.mm().mm_count(),
        1,
        "its own handle is the last, and it is still good"
    );
    assert_eq!(held.mm().mm_users(), 0);
}

#[test]
fn s_53_exit_touches_no_other_address_space_and_waits_for_none() {
    let (one, two, log) = (MmWithUser::new(), MmWithUser::new(), Log::default());
    let subsystems = [
        probes("one", &log, nothing()),
        probes("two", &log, nothing()),
    ];
    let _one = subsystems[0].get(&one).unwrap();
    let held = subsystems[1].get(&two).unwrap();
    let bracket = two.invalidate(page(1), Event::Clear);
    drop(one);
    assert_eq!((log.names(At::Release), held.users()), (vec!["one"], 1));
    drop(bracket);
    assert_eq!(
        (log.names(At::Start), log.names(At::End)),
        (vec!["two"], vec!["two"])
    );
}

/// The thread that drops the last user has a bracket open, as it has in a callback. A wait for
/// brackets would wait for this thread itself.
#[test]
fn exit_inside_a_callback_releases_and_does_not_wait() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    let _held = subsystem.get(&mm).unwrap();
    let handle = (*mm).clone();
    let bracket = handle.invalidate(page(1), Event::Clear);
    drop(mm);
    assert_eq!(log.count("a", At::Released), 1);
    drop(bracket);
    assert_eq!(log.count("a", At::End), 0, "delisted by then");
}

#[test]
fn an_interval_whose_insert_waits_gets_no_call_at_exit() {
    let mm = MmWithUser::new();
    let handle = (*mm).clone();
    let shadow = || crate::interval::Shadow::with(|_| Ok(None));
    let in_tree = mmu_notifier::IntervalNotifier::insert(&mm, page(1), shadow()).unwrap();
    let bracket = handle.invalidate(page(1), Event::Clear);
    let deferred = mmu_notifier::IntervalNotifier::insert(&mm, page(2), shadow()).unwrap();
    drop(mm);
    drop(bracket);
    assert_eq!(
        in_tree.remove().unwrap().events.len(),
        2,
        "the bracket, and the end of the address space"
    );
    assert_eq!(
        deferred.remove().unwrap().events.len(),
        0,
        "it was not in the tree at the end"
    );
}
