//! 7.5: synchronize.

use crate::support::{At, Gate, Hook, Log, Probes, nothing, page, probes, spawn, stop};
use mmu_notifier::{Event, MmWithUser};
use std::sync::{Arc, Mutex};

#[test]
fn s_80_synchronize_waits_for_the_puts_of_all_threads() {
    for _ in 0..50 {
        let log = Log::default();
        let subsystem = probes("a", &log, nothing());
        let mms: Vec<_> = (0..8).map(|_| MmWithUser::new()).collect();
        let held: Vec<_> = mms.iter().map(|mm| subsystem.get(mm).unwrap()).collect();
        std::thread::scope(|scope| {
            for one in held {
                scope.spawn(move || one.put());
            }
        });
        subsystem.synchronize().unwrap();
        assert_eq!(log.count("a", At::Free), 8);
        assert!(mms.iter().all(|mm| mm.mm_count() == 1), "and every handle was dropped");
    }
}

#[test]
fn s_81_synchronize_waits_for_a_slow_free() {
    let (mm, log, gate) = (MmWithUser::new(), Log::default(), Gate::new());
    let subsystem = Arc::new(probes("a", &log, stop(At::Free, &gate)));
    subsystem.get(&mm).unwrap().put();
    gate.wait_for(1);
    let waiter = spawn({
        let subsystem = Arc::clone(&subsystem);
        move || subsystem.synchronize().unwrap()
    });
    waiter.assert_blocked();
    gate.open();
    waiter.join();
}

/// In a bracket, in a callback, in a free: each says so, and none hangs.
#[test]
fn s_87_synchronize_where_it_would_wait_for_itself_is_an_error() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let other: Arc<Probes> = Arc::new(probes("other", &log, nothing()));
    let refused: Arc<Mutex<Vec<At>>> = Arc::default();
    let hook: Hook = {
        let (other, refused) = (Arc::clone(&other), Arc::clone(&refused));
        Arc::new(move |at| {
            if other.synchronize().is_err() {
                refused.lock().unwrap().push(at);
            }
            true
        })
    };
    let subsystem = probes("a", &log, hook);
    let held = subsystem.get(&mm).unwrap();
    let bracket = mm.invalidate(page(1), Event::Clear);
    assert!(subsystem.synchronize().is_err());
    drop(bracket);
    held.put();
    subsystem.synchronize().unwrap();
    assert_eq!(*refused.lock().unwrap(), [At::Start, At::End, At::Free]);
}

#[test]
fn b_45_a_stuck_callback_delays_nobody_elsewhere() {
    let (stuck_mm, mm, log, gate) = (Arc::new(MmWithUser::new()), MmWithUser::new(), Log::default(), Gate::new());
    let stuck = probes("stuck", &log, stop(At::Start, &gate));
    let _stuck = stuck.get(&stuck_mm).unwrap();
    let walker = spawn({
        let mm = Arc::clone(&stuck_mm);
        move || drop(mm.invalidate(page(1), Event::Clear))
    });
    gate.wait_for(1);
    let subsystem = probes("free", &log, nothing());
    subsystem.get(&mm).unwrap().put();
    subsystem.synchronize().unwrap();
    let registration = mmu_notifier::Registration::new(&mm, crate::support::Probe::new("r", &log, nothing())).unwrap();
    drop(registration.unregister().unwrap());
    drop(mm);
    assert_eq!((log.count("free", At::Free), log.count("r", At::Released)), (1, 1));
    gate.open();
    walker.join();
}
