//! In the child of a real `fork`, operations on the parent's address spaces call no callback and
//! free no notifier.
//!
//! This is a test program of its own, and its tests run one at a time: a child has only the thread
//! that forked, but it inherits the locks that the parent's other threads held.
#![cfg(not(mmun_loom))]

use mmu_notifier::{
    Event, Finish, GetError, IntervalNotifier, IntervalOps, InvalidateRange, Mm, MmWithUser,
    Notifier, Registration, Secondary, SecondaryTlb, Subsystem, Va, VaRange,
};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
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
    fn clear_flush_young(&self, _: &Mm, _: VaRange) -> bool {
        Self::call();
        true
    }
    fn clear_young(&self, _: &Mm, _: VaRange) -> bool {
        Self::call();
        true
    }
    fn test_young(&self, _: &Mm, _: Va) -> bool {
        Self::call();
        true
    }
}

impl SecondaryTlb for Counts {
    fn invalidate_secondary_tlbs(&self, _: &Mm, _: VaRange) {
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

/// Runs a function when it is dropped, also if the test fails. The function releases other threads,
/// for which the test would otherwise wait for ever.
struct Finally<F: Fn()>(F);

impl<F: Fn()> Drop for Finally<F> {
    fn drop(&mut self) {
        self.0();
    }
}

static SUBSYSTEM: Subsystem<Counts> = Subsystem::new(|_| Ok(Counts));

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // Wait for the frees of the notifiers of `SUBSYSTEM` that earlier tests put.
    SUBSYSTEM.synchronize().unwrap();
    CALLS.store(0, Ordering::SeqCst);
    alone
}

#[test]
fn s_17_brackets_of_an_inherited_address_space_call_no_subscriber() {
    let _alone = alone();
    let mm = MmWithUser::new();
    let _subscribed = SUBSYSTEM.get(&mm).unwrap();
    let _tlb = Registration::new(&mm, Secondary(Counts))
        .map_err(|refused| refused.error)
        .unwrap();
    let _interval = IntervalNotifier::insert(&mm, VaRange::ALL, Counts).unwrap();
    assert!(!mm.is_inherited());
    let open = (
        mm.invalidate(VaRange::ALL, Event::Unmap),
        mm.invalidate_owned(VaRange::ALL, Event::Unmap),
    );
    let before = CALLS.load(Ordering::SeqCst);
    let mut open = Some(open);
    assert!(in_child(|| {
        drop(open.take());
        mm.invalidate_secondary_tlbs(VaRange::ALL);
        drop(mm.invalidate(VaRange::ALL, Event::Clear));
        drop(mm.invalidate_owned(VaRange::ALL, Event::Clear));
        drop(mm.try_invalidate(VaRange::ALL, Event::Clear).unwrap());
        mm.is_inherited()
            && !mm.has_notifiers()
            && !mm.clear_young(VaRange::ALL)
            && !mm.clear_flush_young(VaRange::ALL)
            && !mm.test_young(Va::new(0))
            && CALLS.load(Ordering::SeqCst) == before
    }));
    drop(open);
    assert_eq!(
        CALLS.load(Ordering::SeqCst),
        before + 2,
        "in the parent both ends come"
    );
    assert!(mm.clear_young(VaRange::ALL) && CALLS.load(Ordering::SeqCst) == before + 3);
}

/// In the child, `try_install`, `remove`, `unregister` and the write lock of an inherited address
/// space are refused at once, whatever locks the parent's threads held at the fork.
#[test]
fn s_17_nothing_waits_or_installs_on_an_inherited_address_space() {
    let _alone = alone();
    let mm = MmWithUser::new();
    let interval = IntervalNotifier::insert(&mm, VaRange::ALL, Silent).unwrap();
    let registered = Registration::new(&mm, Silent)
        .map_err(|refused| refused.error)
        .unwrap();
    let seq = interval.read_begin();
    let (opened, open) = channel();
    let (finish, finished) = channel::<()>();
    let mut held = Some((interval, registered));
    std::thread::scope(|scope| {
        let mm = &mm;
        scope.spawn(move || {
            let bracket = mm.invalidate(VaRange::ALL, Event::Clear);
            opened.send(()).unwrap();
            let _closed = finished.recv();
            drop(bracket);
        });
        open.recv().unwrap();
        // The drop of the sender makes the other thread end the bracket, also if the test fails.
        let _finish = finish;
        assert!(in_child(|| {
            let (interval, registered) = held.take().unwrap();
            interval.try_install(interval.read_begin(), |_| ()).is_err()
                && interval.try_install(seq, |_| ()).is_err()
                && interval.remove().is_err()
                && registered.unregister().is_err()
                && mm.mmap_write_lock().is_err()
                && mm.clone().mm_users() == 2
        }));
    });
    let (interval, registered) = held.unwrap();
    assert!(interval.try_install(interval.read_begin(), |_| ()).is_ok());
    assert!(interval.remove().is_ok() && registered.unregister().is_ok());
}

#[test]
fn s_17_no_caller_subscribes_to_an_inherited_address_space() {
    let _alone = alone();
    let mm = MmWithUser::new();
    let _subscribed = SUBSYSTEM.get(&mm).unwrap();
    let _interval = IntervalNotifier::insert(&mm, VaRange::ALL, Counts).unwrap();
    assert!(in_child(|| {
        let own = MmWithUser::new();
        SUBSYSTEM
            .get(&mm)
            .is_err_and(|error| error == GetError::WouldDeadlock)
            && Registration::new(&mm, Counts).is_err()
            && IntervalNotifier::insert(&mm, VaRange::ALL, Counts).is_err()
            && mm.mmget_not_zero().is_none()
            && own.id() != mm.id()
            && SUBSYSTEM.get(&own).is_ok()
    }));
    assert!(SUBSYSTEM.get(&mm).is_ok());
}

#[test]
fn s_17_a_drop_in_the_child_frees_nothing_of_the_parent() {
    let _alone = alone();
    let mm = MmWithUser::new();
    let subscribed = SUBSYSTEM.get(&mm).unwrap();
    let interval = IntervalNotifier::insert(&mm, VaRange::ALL, Counts).unwrap();
    let registered = Registration::new(&mm, Counts)
        .map_err(|refused| refused.error)
        .unwrap();
    let mut all = Some((subscribed, interval, registered, mm));
    assert!(in_child(|| {
        drop(all.take());
        SUBSYSTEM.synchronize().unwrap();
        CALLS.load(Ordering::SeqCst) == 0
    }));
    drop(all);
    SUBSYSTEM.synchronize().unwrap();
    assert!(
        CALLS.load(Ordering::SeqCst) > 0,
        "in the parent they were released and freed"
    );
}

/// A thread that the child does not have may hold the locks of the parent's address space.
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
        let _finally = Finally(|| stop.store(1, Ordering::SeqCst));
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
    });
}

/// A notifier that calls a function when it is freed.
struct OnFree(Option<Box<dyn FnOnce() + Send + Sync>>);

impl Notifier for OnFree {}

impl Drop for OnFree {
    fn drop(&mut self) {
        self.0.take().into_iter().for_each(|f| f());
    }
}

type OnFrees = Subsystem<OnFree, (), Box<dyn Fn(&MmWithUser) -> Result<OnFree, ()> + Sync>>;

/// Makes a subsystem whose first notifier calls `f` when it is freed.
fn on_first_free(f: impl FnOnce() + Send + Sync + 'static) -> OnFrees {
    let first: Mutex<Option<Box<dyn FnOnce() + Send + Sync>>> = Mutex::new(Some(Box::new(f)));
    // In the child of a fork, the lock may be locked for ever, by a thread that exists only in the
    // parent. Then `f` runs in the parent.
    let take = move || first.try_lock().ok().and_then(|mut first| first.take());
    Subsystem::new(Box::new(move |_: &MmWithUser| Ok(OnFree(take()))))
}

/// Makes and puts a notifier on an address space of this process, and waits for its free. Returns
/// false if a wait is refused or the notifier's handle is left.
fn works(subsystem: &OnFrees) -> bool {
    let own = MmWithUser::new();
    subsystem.get(&own).unwrap().put();
    subsystem.synchronize().is_ok() && subsystem.drain_until_idle().is_ok() && own.mm_count() == 1
}

/// The process forks while a free runs. The free continues in the parent only, and the thread that
/// waits for it exists in the parent only.
#[test]
fn s_17_a_subsystem_works_in_a_child_that_was_forked_during_a_free() {
    let _alone = alone();
    let (mm, go_on) = (MmWithUser::new(), Arc::new(Barrier::new(2)));
    let (freeing, in_free) = channel();
    let subsystem = on_first_free({
        let go_on = Arc::clone(&go_on);
        move || {
            freeing.send(()).unwrap();
            go_on.wait();
        }
    });
    subsystem.get(&mm).unwrap().put();
    in_free.recv().unwrap();
    let (waiting, waiter) = channel();
    std::thread::scope(|scope| {
        let subsystem = &subsystem;
        let _finally = Finally(|| {
            go_on.wait();
        });
        scope.spawn(move || {
            // SAFETY: The call has no preconditions.
            waiting.send(unsafe { libc::gettid() }).unwrap();
            subsystem.synchronize().unwrap();
        });
        let stat = format!("/proc/self/task/{}/stat", waiter.recv().unwrap());
        // The state follows the name, which is in parentheses. While the thread sleeps in
        // `synchronize`, it holds the lock that admits one waiter at a time.
        while !std::fs::read_to_string(&stat)
            .unwrap()
            .rsplit_once(") ")
            .unwrap()
            .1
            .starts_with('S')
        {
            std::thread::yield_now();
        }
        // The child makes a count of frees of its own, and so does a child of the child.
        assert!(in_child(
            || works(subsystem) && in_child(|| works(subsystem))
        ));
    });
    assert!(works(&subsystem));
}

#[test]
fn s_17_frees_that_were_queued_run_in_the_parent_alone() {
    let _alone = alone();
    let mm = MmWithUser::new();
    let (subscribed, registered) = (
        SUBSYSTEM.get(&mm).unwrap(),
        Registration::new(&mm, Counts)
            .map_err(|refused| refused.error)
            .unwrap(),
    );
    let mut open = Some(mm.invalidate(VaRange::ALL, Event::Clear));
    subscribed.put();
    registered.unregister_no_release(drop);
    let before = CALLS.load(Ordering::SeqCst);
    assert!(in_child(|| {
        drop(open.take());
        // `works` starts a reclaimer, which takes the domain with the inherited frees first.
        works(&on_first_free(|| ())) && CALLS.load(Ordering::SeqCst) == before
    }));
    drop(open);
    SUBSYSTEM.synchronize().unwrap();
    // No subsystem counts the free of `registered`, so wait until it has dropped its handle.
    while mm.mm_count() != 1 {
        std::thread::yield_now();
    }
    assert_eq!(CALLS.load(Ordering::SeqCst), before + 2);
}

#[test]
fn s_17_a_subsystem_that_is_used_first_during_a_fork_works_in_the_child() {
    static LATEST: AtomicPtr<OnFrees> = AtomicPtr::new(ptr::null_mut());
    // This list keeps the leaked values reachable, so a leak detector does not report them. The
    // child does not use it.
    static ALL: Mutex<Vec<&OnFrees>> = Mutex::new(Vec::new());
    let _alone = alone();
    let (mm, stop) = (MmWithUser::new(), AtomicBool::new(false));
    let make = || {
        let made: *mut OnFrees = Box::leak(Box::new(on_first_free(|| ())));
        LATEST.store(made, Ordering::SeqCst);
        // SAFETY: The value was leaked.
        let made = unsafe { &*made };
        ALL.lock().unwrap().push(made);
        made.get(&mm).unwrap().put();
    };
    make();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                make();
            }
        });
        let _finally = Finally(|| stop.store(true, Ordering::SeqCst));
        for round in 0..100 {
            assert!(
                // SAFETY: The value was leaked.
                in_child(|| works(unsafe { &*LATEST.load(Ordering::SeqCst) })),
                "round {round}"
            );
        }
    });
}
