//! `Subsystem::synchronize` and `drain_until_idle`.

use crate::support::{
    At, Counter, Gate, Hook, Log, Probe, Probes, Slot, nothing, page, probes, put_at, spawn, stop,
    wait_until,
};
use mmu_notifier::{
    Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, Mm, MmWithUser, Notifier,
    Registration, Secondary, SecondaryTlb, Subsystem, Va, VaRange,
};
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
        assert!(
            mms.iter().all(|mm| mm.mm_count() == 1),
            "and every handle was dropped"
        );
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

/// `synchronize` does not wait for notifiers that are put while it waits, so a stream of puts
/// cannot delay it.
#[test]
fn s_81_synchronize_does_not_wait_for_later_puts() {
    let (mms, log) = ([MmWithUser::new(), MmWithUser::new()], Log::default());
    let (gates, frees) = ([Gate::new(), Gate::new()], Counter::default());
    let hook: Hook = {
        let gates = gates.clone();
        Arc::new(move |at| {
            if at == At::Free {
                gates[frees.add() - 1].pass();
            }
            true
        })
    };
    let subsystem = Arc::new(probes("a", &log, hook));
    let [first, second] = mms.each_ref().map(|mm| subsystem.get(mm).unwrap());
    first.put();
    gates[0].wait_for(1);
    let waiter = spawn({
        let subsystem = Arc::clone(&subsystem);
        move || subsystem.synchronize().unwrap()
    });
    waiter.assert_blocked();
    second.put();
    gates[0].open();
    gates[1].wait_for(1);
    waiter.join();
    gates[1].open();
    subsystem.synchronize().unwrap();
    assert!(mms.iter().all(|mm| mm.mm_count() == 1));
}

/// In a bracket, in the callbacks of a subscriber and in a free, `synchronize` and
/// `drain_until_idle` return an error and do not hang.
#[test]
fn s_87_synchronize_where_it_would_wait_for_itself_is_an_error() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let other: Arc<Probes> = Arc::new(probes("other", &log, nothing()));
    let refused: Arc<Mutex<Vec<At>>> = Arc::default();
    let hook: Hook = {
        let (other, refused) = (Arc::clone(&other), Arc::clone(&refused));
        Arc::new(move |at| {
            if other.synchronize().is_err() && other.drain_until_idle().is_err() {
                refused.lock().unwrap().push(at);
            }
            true
        })
    };
    let registration = Registration::new(&mm, Probe::new("b", &log, Arc::clone(&hook))).unwrap();
    drop(registration.unregister().unwrap());
    assert_eq!(
        std::mem::take(&mut *refused.lock().unwrap()),
        [At::Release],
        "and the drop was this thread's"
    );
    let subsystem = probes("a", &log, hook);
    let held = subsystem.get(&mm).unwrap();
    let bracket = mm.invalidate(page(1), Event::Clear);
    assert!(subsystem.synchronize().is_err());
    drop(bracket);
    drop(mm.try_invalidate(page(1), Event::Clear).unwrap());
    assert!(!mm.test_young(Va::new(0x1000)));
    drop(mm);
    held.put();
    subsystem.synchronize().unwrap();
    let all = [
        At::Start,
        At::End,
        At::TryStart,
        At::End,
        At::Young,
        At::Release,
        At::Free,
    ];
    assert_eq!(*refused.lock().unwrap(), all);
}

/// A callback that another domain has queued runs on the reclaimer. It must not wait for frees,
/// because they run after it on the same thread.
#[test]
fn s_87_synchronize_in_other_work_of_the_reclaimer_is_an_error() {
    let (mm, log, domain) = (MmWithUser::new(), Log::default(), srcu::Srcu::new());
    let subsystem = Arc::new(probes("a", &log, nothing()));
    let bracket = mm.invalidate(page(1), Event::Clear);
    let (tell, told) = std::sync::mpsc::channel();
    let inner = Arc::clone(&subsystem);
    domain.call(move || {
        tell.send((
            inner.synchronize().is_err(),
            inner.drain_until_idle().is_err(),
        ))
        .unwrap()
    });
    assert_eq!(told.recv().unwrap(), (true, true));
    drop(bracket);
}

/// `synchronize` returns the error also in the callback of an interval, in its second pass, in the
/// drop of its state on the reclaimer, and in the flush of a secondary TLB.
#[test]
fn s_87_synchronize_in_an_interval_or_a_flush_is_an_error() {
    static REFUSED: Mutex<Vec<&str>> = Mutex::new(Vec::new());
    static EMPTY: Subsystem<Empty> = Subsystem::new(|_| Ok(Empty));
    fn tried(place: &'static str) {
        if EMPTY.synchronize().is_err() && EMPTY.drain_until_idle().is_err() {
            REFUSED.lock().unwrap().push(place);
        }
    }
    struct Empty;
    impl Notifier for Empty {}
    impl SecondaryTlb for Empty {
        fn invalidate_secondary_tlbs(&self, _mm: &Mm, _range: VaRange) {
            tried("flush");
        }
    }
    impl IntervalOps for Empty {
        fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
            tried("interval");
            Some(Finish::new(|| tried("finish")))
        }
    }
    impl Drop for Empty {
        fn drop(&mut self) {
            tried("drop");
        }
    }
    let mm = MmWithUser::new();
    let handle = (*mm).clone();
    let _tlb = Registration::new(&mm, Secondary(Empty)).unwrap();
    let interval = IntervalNotifier::insert(&mm, page(1), Empty).unwrap();
    let bracket = mm.invalidate(page(1), Event::Clear);
    mm.invalidate_secondary_tlbs(page(1));
    drop(bracket);
    drop(mm);
    assert_eq!(
        *REFUSED.lock().unwrap(),
        ["interval", "finish", "flush", "interval", "finish"],
        "twice: once for exit"
    );
    let bracket = handle.invalidate(page(1), Event::Clear);
    drop(interval);
    drop(bracket);
    // The handle of the registration and `handle` are left.
    wait_until(|| handle.mm_count() == 2);
    assert_eq!(REFUSED.lock().unwrap()[5..], ["interval", "finish", "drop"]);
}

/// `Subsystem::synchronize` promises that every notifier that was put before the call is freed. The
/// kernel's function is a grace period, so it waits for readers even if no free is pending. In this
/// workspace that is the promise of `Srcu::synchronize`, whose tests check it.
/// `Subsystem::synchronize` waits only if a free is pending. Then it waits for every bracket of
/// that address space that was open at the put, on whichever thread, and for no bracket of another
/// address space.
#[test]
fn s_82_synchronize_waits_for_the_brackets_that_hold_up_a_free_and_for_no_others() {
    let (mm, log) = (Arc::new(MmWithUser::new()), Log::default());
    let other = MmWithUser::new();
    let elsewhere = other.invalidate(page(1), Event::Clear);
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
    assert_eq!(log.count("a", At::Free), 0);
    drop(bracket);
    waiter.join();
    assert_eq!((log.count("a", At::Free), mm.mm_count()), (1, 1));
    drop(elsewhere);
}

/// A driver registers notifiers of its own and puts them. `synchronize` waits for their frees, as
/// the kernel's `mmu_notifier_synchronize` does.
#[test]
fn s_80_synchronize_waits_for_registrations_that_were_put() {
    let (mms, log, gate) = (
        [MmWithUser::new(), MmWithUser::new()],
        Log::default(),
        Gate::new(),
    );
    static OWNED: Subsystem<Probe, std::convert::Infallible, ()> = Subsystem::without_alloc();
    let [put, dropped] = mms.each_ref().map(|mm| {
        OWNED
            .register(mm, Probe::new("put", &log, nothing()))
            .unwrap()
    });
    let mut locked = mms[0].mmap_write_lock().unwrap();
    let stopped = Probe::new("handed over", &log, stop(At::Free, &gate));
    let handed_over = OWNED.register_locked(&mut locked, stopped).unwrap();
    drop(locked);
    drop(mms[0].invalidate(page(1), Event::Clear));
    assert_eq!(
        log.names(At::Start),
        ["handed over", "put"],
        "they are called as all others are"
    );
    put.put();
    drop(dropped);
    OWNED.synchronize().unwrap();
    assert_eq!(
        (
            log.count("put", At::Free),
            mms.each_ref().map(|mm| mm.mm_count())
        ),
        (2, [2, 1])
    );
    let freed = log.clone();
    handed_over.unregister_no_release(move |probe| {
        drop(probe);
        freed.add("by the caller", At::Free);
    });
    gate.wait_for(1);
    let waiter = spawn(|| OWNED.synchronize().unwrap());
    waiter.assert_blocked();
    gate.open();
    waiter.join();
    assert_eq!(
        (log.count("by the caller", At::Free), mms[0].mm_count()),
        (1, 1)
    );
    let kept = OWNED
        .register(&mms[0], Probe::new("taken back", &log, nothing()))
        .unwrap();
    assert_eq!(kept.unregister().unwrap().name, "taken back");
    OWNED.synchronize().unwrap();
}

/// `get` finds only the notifiers that it has made: a registration has an owner, who may unregister
/// it.
#[test]
fn s_15_get_does_not_find_a_notifier_that_its_subsystem_registered() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("got", &log, nothing());
    let registered = subsystem
        .register(&mm, Probe::new("registered", &log, nothing()))
        .unwrap();
    let got = subsystem.get(&mm).unwrap();
    assert_eq!(
        (got.name, got.users(), registered.name),
        ("got", 1, "registered")
    );
    let bracket = mm.invalidate(page(1), Event::Clear);
    assert_eq!(
        subsystem
            .register(&mm, Probe::new("no", &log, nothing()))
            .err()
            .unwrap()
            .notifier
            .name,
        "no"
    );
    drop(bracket);
    assert_eq!(registered.unregister().unwrap().name, "registered");
    assert!(mm.has_notifiers());
}

#[test]
fn s_88_one_drain_covers_the_notifiers_that_a_free_puts() {
    const CHAIN: usize = 20;
    let log = Log::default();
    let slots: Vec<Slot<Probe>> = (0..CHAIN).map(|_| Slot::default()).collect();
    let made = Counter::default();
    let subsystem: Probes = Subsystem::new({
        let (log, slots) = (log.clone(), slots.clone());
        // The free of each notifier puts the next one.
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
    assert!(mms.iter().all(|mm| mm.mm_count() == 1));
    let bracket = mms[0].invalidate(page(1), Event::Clear);
    assert!(
        subsystem.drain_until_idle().is_err(),
        "it could wait for this bracket"
    );
    drop(bracket);
}

/// The first free puts a second notifier, so the drain must check again after its wait. The gate
/// stops the second free until the drain has had time to return too early.
#[test]
fn s_88_a_drain_waits_for_the_free_that_the_awaited_one_has_put() {
    let (mms, log, gate) = (
        [MmWithUser::new(), MmWithUser::new()],
        Log::default(),
        Gate::new(),
    );
    let (second, made) = (Slot::default(), Counter::default());
    let subsystem: Arc<Probes> = Arc::new(Subsystem::new({
        let (log, gate, second) = (log.clone(), Arc::clone(&gate), Arc::clone(&second));
        Box::new(move |_| match made.add() {
            1 => Ok(Probe::new("first", &log, put_at(At::Free, &second))),
            _ => Ok(Probe::new("second", &log, stop(At::Free, &gate))),
        })
    }));
    let first = subsystem.get(&mms[0]).unwrap();
    *second.lock().unwrap() = Some(subsystem.get(&mms[1]).unwrap());
    let bracket = mms[0].invalidate(page(1), Event::Clear);
    first.put();
    let drain = spawn({
        let subsystem = Arc::clone(&subsystem);
        move || subsystem.drain_until_idle().unwrap()
    });
    drain.assert_blocked();
    drop(bracket);
    gate.wait_for(1);
    assert_eq!(
        log.count("first", At::Free),
        1,
        "what it waited for at first is done"
    );
    drain.assert_blocked();
    gate.open();
    drain.join();
    assert!(mms.iter().all(|mm| mm.mm_count() == 1));
}

/// Each put adds one node to the queue. It neither waits nor fails.
#[test]
fn s_90_a_hundred_thousand_puts_wait_for_a_stuck_reader() {
    const PUTS: usize = 100_000;
    struct Counted(Counter);
    impl Notifier for Counted {}
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.add();
        }
    }
    let (mm, frees) = (MmWithUser::new(), Counter::default());
    let registered: Vec<_> = (0..PUTS)
        .map(|_| Registration::new(&mm, Counted(frees.clone())).unwrap())
        .collect();
    let bracket = mm.invalidate(page(1), Event::Clear);
    drop(registered);
    assert_eq!((frees.get(), mm.mm_count()), (0, PUTS + 1));
    drop(bracket);
    wait_until(|| mm.mm_count() == 1);
    assert_eq!(frees.get(), PUTS);
}

struct Quiet;

impl IntervalOps for Quiet {
    fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
        None
    }
}

#[test]
fn b_45_a_stuck_callback_delays_no_other_address_space() {
    let (stuck_mm, mm, log, gate) = (
        Arc::new(MmWithUser::new()),
        MmWithUser::new(),
        Log::default(),
        Gate::new(),
    );
    let stuck = probes("stuck", &log, stop(At::Start, &gate));
    let _stuck = stuck.get(&stuck_mm).unwrap();
    let late_ones = probes("late", &log, nothing());
    let late = late_ones.get(&stuck_mm).unwrap();
    let walker = spawn({
        let mm = Arc::clone(&stuck_mm);
        move || drop(mm.invalidate(page(1), Event::Clear))
    });
    gate.wait_for(1);
    // A free that is queued behind the stuck callback must not delay other address spaces either.
    late.put();
    let subsystem = probes("free", &log, nothing());
    subsystem.get(&mm).unwrap().put();
    subsystem.synchronize().unwrap();
    let registration = Registration::new(&mm, Probe::new("r", &log, nothing())).unwrap();
    drop(registration.unregister().unwrap());
    let interval = IntervalNotifier::insert(&mm, page(1), Quiet).unwrap();
    drop(mm.try_invalidate(page(1), Event::Clear).unwrap());
    assert!(
        interval.try_install(interval.read_begin(), |_| ()).is_ok() && interval.remove().is_ok()
    );
    drop(mm);
    assert_eq!(
        (
            log.count("free", At::Free),
            log.count("r", At::Released),
            log.count("late", At::Free)
        ),
        (1, 1, 0)
    );
    gate.open();
    walker.join();
    late_ones.synchronize().unwrap();
    assert_eq!(log.count("late", At::Free), 1);
}
