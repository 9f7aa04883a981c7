//! 7.5: synchronize.

use crate::support::{
    At, Counter, Gate, Hook, Log, Probe, Probes, Slot, nothing, page, probes, put_at, spawn, stop, wait_until,
};
use mmu_notifier::{Event, MmWithUser, Subsystem};
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

/// With nothing queued there is nothing to wait for, so unlike the kernel's this is no grace period.
#[test]
fn s_82_with_nothing_pending_synchronize_does_not_wait_for_a_bracket_elsewhere() {
    let (mm, log) = (Arc::new(MmWithUser::new()), Log::default());
    let subsystem = Arc::new(probes("a", &log, nothing()));
    let held = subsystem.get(&mm).unwrap();
    let bracket = mm.invalidate(page(1), Event::Clear);
    let waiter = |subsystem: &Arc<Probes>| {
        let subsystem = Arc::clone(subsystem);
        spawn(move || subsystem.synchronize().unwrap())
    };
    waiter(&subsystem).join();
    held.put();
    let waiter = waiter(&subsystem);
    waiter.assert_blocked();
    drop(bracket);
    waiter.join();
    assert_eq!(log.count("a", At::Free), 1);
}

#[test]
fn s_88_one_drain_covers_what_a_free_puts() {
    const CHAIN: usize = 20;
    let log = Log::default();
    let slots: Vec<Slot<Probe>> = (0..CHAIN).map(|_| Slot::default()).collect();
    let made = Counter::default();
    let subsystem: Probes = Subsystem::new({
        let (log, slots) = (log.clone(), slots.clone());
        // The n-th one made puts the next when it is freed.
        Box::new(move |_| {
            let next = slots.get(made.add()).cloned().unwrap_or_default();
            Ok(Probe::new("a", &log, put_at(At::Free, &next)))
        })
    });
    let mms: Vec<_> = (0..CHAIN).map(|_| MmWithUser::new()).collect();
    for (slot, mm) in slots.iter().zip(&mms) {
        *slot.lock().unwrap() = Some(subsystem.get(mm).unwrap());
    }
    let first = slots[0].lock().unwrap().take();
    drop(first);
    subsystem.drain_until_idle().unwrap();
    assert_eq!(log.count("a", At::Free), CHAIN);
    let bracket = mms[0].invalidate(page(1), Event::Clear);
    assert!(subsystem.drain_until_idle().is_err(), "it could wait for this bracket");
    drop(bracket);
}

/// Memory grows by one node for each put, and nothing else: put neither waits nor fails.
#[test]
fn s_90_a_hundred_thousand_puts_wait_for_a_stuck_reader() {
    const PUTS: usize = 100_000;
    struct Counted(Counter);
    impl mmu_notifier::Notifier for Counted {}
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.add();
        }
    }
    let (mm, frees) = (MmWithUser::new(), Counter::default());
    let registered: Vec<_> =
        (0..PUTS).map(|_| mmu_notifier::Registration::new(&mm, Counted(frees.clone())).unwrap()).collect();
    let bracket = mm.invalidate(page(1), Event::Clear);
    drop(registered);
    assert_eq!((frees.get(), mm.mm_count()), (0, PUTS + 1));
    drop(bracket);
    wait_until(|| mm.mm_count() == 1);
    assert_eq!(frees.get(), PUTS);
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
