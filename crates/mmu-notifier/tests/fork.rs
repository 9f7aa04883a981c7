//! What the child of a real `fork` has of its parent's address space: nothing.
//!
//! A program of its own, one test at a time: a child has no other threads, but it has what they had locked.
#![cfg(not(mmun_loom))]

use mmu_notifier::{
    Event, Finish, GetError, IntervalNotifier, IntervalOps, InvalidateRange, Mm, MmWithUser, Notifier, Registration,
    Subsystem, VaRange,
};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use testkit::in_child;

static CALLS: AtomicUsize = AtomicUsize::new(0);

struct Counts;

impl Counts {
    fn call() {
        CALLS.fetch_add(1, Ordering::SeqCst);
    }
}

impl Notifier for Counts {
    fn release(&self, _: &Mm) {
        Self::call();
    }
    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
        Self::call();
    }
    fn invalidate_range_end(&self, _: &InvalidateRange<'_>) {
        Self::call();
    }
}

impl IntervalOps for Counts {
    fn invalidate(&mut self, _: &InvalidateRange<'_>) -> Option<Finish> {
        Self::call();
        None
    }
}

impl Drop for Counts {
    fn drop(&mut self) {
        Self::call();
    }
}

struct Silent;

impl Notifier for Silent {}

impl IntervalOps for Silent {
    fn invalidate(&mut self, _: &InvalidateRange<'_>) -> Option<Finish> {
        None
    }
}

static SUBSYSTEM: Subsystem<Counts> = Subsystem::new(|_| Ok(Counts));

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // What the test before has put is freed first.
    SUBSYSTEM.synchronize().unwrap();
    CALLS.store(0, Ordering::SeqCst);
    alone
}

#[test]
fn s_17_brackets_of_an_inherited_address_space_call_nobody() {
    let _alone = alone();
    let mm = MmWithUser::new();
    let _subscribed = SUBSYSTEM.get(&mm).unwrap();
    let _interval = IntervalNotifier::insert(&mm, VaRange::ALL, Counts).unwrap();
    assert!(!mm.is_inherited());
    let open = mm.invalidate(VaRange::ALL, Event::Unmap);
    let before = CALLS.load(Ordering::SeqCst);
    let mut open = Some(open);
    assert!(in_child(|| {
        drop(open.take());
        drop(mm.invalidate(VaRange::ALL, Event::Clear));
        drop(mm.invalidate_owned(VaRange::ALL, Event::Clear));
        drop(mm.try_invalidate(VaRange::ALL, Event::Clear).unwrap());
        mm.is_inherited() && !mm.clear_young(VaRange::ALL) && CALLS.load(Ordering::SeqCst) == before
    }));
    drop(open);
    assert!(CALLS.load(Ordering::SeqCst) > before, "in the parent they are still called");
}

#[test]
fn s_17_nobody_subscribes_to_an_inherited_address_space() {
    let _alone = alone();
    let mm = MmWithUser::new();
    let _subscribed = SUBSYSTEM.get(&mm).unwrap();
    assert!(in_child(|| {
        let own = MmWithUser::new();
        SUBSYSTEM.get(&mm).is_err_and(|error| error == GetError::WouldDeadlock)
            && Registration::new(&mm, Counts).is_err()
            && IntervalNotifier::insert(&mm, VaRange::ALL, Counts).is_err()
            && mm.mmget_not_zero().is_none()
            && own.id() != mm.id()
            && SUBSYSTEM.get(&own).is_ok()
    }));
    assert!(SUBSYSTEM.get(&mm).is_ok());
}

#[test]
fn s_17_what_the_child_drops_stays_the_parents() {
    let _alone = alone();
    let mm = MmWithUser::new();
    let subscribed = SUBSYSTEM.get(&mm).unwrap();
    let interval = IntervalNotifier::insert(&mm, VaRange::ALL, Counts).unwrap();
    let registered = Registration::new(&mm, Counts).map_err(|refused| refused.error).unwrap();
    let mut all = Some((subscribed, interval, registered, mm));
    assert!(in_child(|| {
        drop(all.take());
        SUBSYSTEM.synchronize().unwrap();
        CALLS.load(Ordering::SeqCst) == 0
    }));
    drop(all);
    SUBSYSTEM.synchronize().unwrap();
    assert!(CALLS.load(Ordering::SeqCst) > 0, "in the parent they were released and freed");
}

/// The locks of the parent's address space are held by a thread that the child does not have.
#[test]
fn s_17_a_child_of_a_busy_process_is_not_stuck() {
    let _alone = alone();
    let mm = MmWithUser::new();
    let stop = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while stop.load(Ordering::SeqCst) == 0 {
                    drop(Registration::new(&mm, Silent));
                    drop(IntervalNotifier::insert(&mm, VaRange::ALL, Silent));
                    drop(mm.invalidate(VaRange::ALL, Event::Clear));
                }
            });
        }
        for round in 0..30 {
            let good = in_child(|| {
                drop(mm.invalidate(VaRange::ALL, Event::Clear));
                let refused = Registration::new(&mm, Silent).is_err();
                let own = MmWithUser::new();
                let subscribed = Registration::new(&own, Silent);
                drop(own.invalidate(VaRange::ALL, Event::Clear));
                refused && subscribed.is_ok_and(|one| one.unregister().is_ok())
            });
            assert!(good, "round {round}");
        }
        stop.store(1, Ordering::SeqCst);
    });
}
