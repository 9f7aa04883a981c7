//! Get and look-up.

use crate::support::{
    At, Counter, Gate, Log, Probe, nothing, page, probes, spawn, stop, wait_until,
};
use mmu_notifier::{Event, GetError, MmWithUser, Notifier, Registration, Subsystem};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

#[test]
fn s_01_the_first_get_makes_the_notifier() {
    let (mm, log, made_for) = (MmWithUser::new(), Log::default(), AtomicU64::new(0));
    let subsystem = Subsystem::<Probe, (), _>::new(|mm: &MmWithUser| {
        log.add("a", At::Alloc);
        made_for.store(mm.id(), Ordering::SeqCst);
        Ok(Probe::new("a", &log, nothing()))
    });
    let before = mm.mm_count();
    let subscription = subsystem.get(&mm).unwrap();
    assert_eq!(
        (log.all(), made_for.load(Ordering::SeqCst)),
        (vec![("a", At::Alloc)], mm.id())
    );
    assert!(mm.has_notifiers());
    assert_eq!((subscription.users(), mm.mm_count()), (1, before + 1));
    assert_eq!(*subscription.mm(), *mm);
}

#[test]
fn s_02_the_second_get_shares_it() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    let first = subsystem.get(&mm).unwrap();
    let count = mm.mm_count();
    let second = subsystem.get(&mm).unwrap();
    assert!(std::ptr::eq(&*first, &*second));
    assert_eq!(
        (first.users(), mm.mm_count(), log.count("a", At::Alloc)),
        (2, count, 1)
    );
}

#[test]
fn s_03_two_subsystems_of_one_type_are_two_keys() {
    struct Empty;
    impl Notifier for Empty {}
    static ONE: Subsystem<Empty> = Subsystem::new(|_| Ok(Empty));
    static TWO: Subsystem<Empty> = Subsystem::new(|_| Ok(Empty));
    let mm = MmWithUser::new();
    let (one, two) = (ONE.get(&mm).unwrap(), TWO.get(&mm).unwrap());
    assert_eq!(
        (one.users(), two.users()),
        (1, 1),
        "equal contents, and still not the same"
    );
}

#[test]
fn s_04_each_address_space_has_its_own() {
    let (log, one, two) = (Log::default(), MmWithUser::new(), MmWithUser::new());
    let subsystem = probes("a", &log, nothing());
    let (first, second) = (subsystem.get(&one).unwrap(), subsystem.get(&two).unwrap());
    assert!(!std::ptr::eq(&*first, &*second));
    assert_eq!(log.count("a", At::Alloc), 2);
}

#[test]
fn s_05_an_alloc_error_comes_back_as_it_is() {
    let mm = MmWithUser::new();
    let count = mm.mm_count();
    let subsystem = Subsystem::<Probe, String, _>::new(|_: &MmWithUser| {
        Err("no memory on the device".to_owned())
    });
    assert_eq!(
        subsystem.get(&mm).err().unwrap(),
        GetError::Alloc("no memory on the device".to_owned())
    );
    assert_eq!((mm.has_notifiers(), mm.mm_count()), (false, count));
}

/// The kernel can fail after `alloc`, if there is no memory for the list head. Here the head is
/// part of the address space. So `get` fails before `alloc` has made a notifier, and a refused
/// `Registration::new` hands the notifier back. There is one exception: `get` also fails if `alloc`
/// has left a bracket open (`s_14`), and then drops the notifier in the caller's thread.
#[test]
fn s_06_a_failed_registration_leaves_nothing_behind() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    let count = mm.mm_count();
    let bracket = mm.invalidate(page(1), Event::Unmap);
    assert_eq!(subsystem.get(&mm).err().unwrap(), GetError::WouldDeadlock);
    assert_eq!(
        log.all(),
        [],
        "alloc was not called, so nothing is to be freed"
    );
    let failed = Registration::new(&mm, Probe::new("b", &log, nothing()))
        .err()
        .unwrap();
    drop(bracket);
    assert_eq!((mm.has_notifiers(), mm.mm_count()), (false, count));
    drop(failed.notifier);
    assert_eq!(
        log.all(),
        [("b", At::Free)],
        "dropped once, in this thread, and never called"
    );
}

/// If a signal comes while a registration waits, the kernel returns EINTR. This crate continues to
/// wait.
#[test]
fn s_07_a_signal_does_not_interrupt_get() {
    let (mm, log) = (Arc::new(MmWithUser::new()), Log::default());
    let subsystem = Arc::new(probes("a", &log, nothing()));
    let bracket = mm.invalidate(page(1), Event::Unmap);
    let task = spawn({
        let (mm, subsystem) = (Arc::clone(&mm), Arc::clone(&subsystem));
        move || subsystem.get(&mm).map(|subscription| subscription.users())
    });
    wait_until(|| mm.has_notifiers());
    for _ in 0..3 {
        task.interrupt();
        task.assert_blocked();
    }
    drop(bracket);
    assert_eq!(task.join().unwrap(), 1);
    subsystem.synchronize().unwrap();
    assert_eq!(
        log.all(),
        [("a", At::Alloc), ("a", At::Free)],
        "and the bracket never called it"
    );
}

#[test]
fn s_08_after_a_failure_get_succeeds_with_a_new_alloc() {
    let (mm, calls) = (MmWithUser::new(), Counter::default());
    let log = Log::default();
    let subsystem = Subsystem::<Probe, usize, _>::new(|_: &MmWithUser| match calls.add() {
        1 => Err(1),
        _ => Ok(Probe::new("a", &log, nothing())),
    });
    assert_eq!(subsystem.get(&mm).err().unwrap(), GetError::Alloc(1));
    assert_eq!(subsystem.get(&mm).unwrap().users(), 1);
    assert_eq!(calls.get(), 2);
}

#[test]
fn s_09_a_failed_get_leaves_other_subscribers_untouched() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let other = probes("other", &log, nothing());
    let held = other.get(&mm).unwrap();
    let count = mm.mm_count();
    let failing = Subsystem::<Probe, (), _>::new(|_: &MmWithUser| Err(()));
    assert!(failing.get(&mm).is_err());
    drop(mm.invalidate(page(1), Event::Clear));
    assert_eq!((held.users(), mm.mm_count()), (1, count));
    assert_eq!(
        log.all(),
        [
            ("other", At::Alloc),
            ("other", At::Start),
            ("other", At::End)
        ]
    );
}

#[test]
fn s_10_a_full_count_is_an_error_until_one_is_put() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = Subsystem::<Probe, (), _>::with_users_max(
        |_: &MmWithUser| Ok(Probe::new("a", &log, nothing())),
        3,
    );
    let first = subsystem.get(&mm).unwrap();
    let rest = [subsystem.get(&mm).unwrap(), first.try_clone().unwrap()];
    assert_eq!(subsystem.get(&mm).err().unwrap(), GetError::Overflow);
    assert!(first.try_clone().is_err());
    assert_eq!(first.users(), 3, "and the count still is the maximum");
    let [one, _other] = rest;
    one.put();
    let again = subsystem.get(&mm).expect("one was put");
    assert_eq!(
        (again.users(), subsystem.get(&mm).err().unwrap()),
        (3, GetError::Overflow)
    );
}

#[test]
fn s_11_many_threads_get_one_object() {
    const THREADS: u32 = 8;
    for _ in 0..50 {
        let (mm, log, line) = (
            MmWithUser::new(),
            Log::default(),
            Barrier::new(THREADS as usize),
        );
        let subsystem = probes("a", &log, nothing());
        let got = std::thread::scope(|scope| {
            let get = || {
                line.wait();
                subsystem.get(&mm).unwrap()
            };
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(get)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect::<Vec<_>>()
        });
        assert!(got.iter().all(|one| std::ptr::eq(&**one, &*got[0])));
        assert_eq!((got[0].users(), log.count("a", At::Alloc)), (THREADS, 1));
    }
}

#[test]
fn s_12_a_callback_may_run_before_get_has_returned() {
    let (mm, log) = (Arc::new(MmWithUser::new()), Log::default());
    let subsystem = Arc::new(probes("a", &log, nothing()));
    let old = mm.invalidate(page(1), Event::Unmap);
    let task = spawn({
        let (mm, subsystem) = (Arc::clone(&mm), Arc::clone(&subsystem));
        move || subsystem.get(&mm).unwrap()
    });
    wait_until(|| mm.has_notifiers());
    let newer = spawn({
        let mm = Arc::clone(&mm);
        move || drop(mm.invalidate(page(2), Event::Unmap))
    });
    newer.join();
    task.assert_blocked();
    assert_eq!(
        log.all(),
        [("a", At::Alloc), ("a", At::Start), ("a", At::End)],
        "complete, and already at work"
    );
    drop(old);
    task.join().put();
}

#[test]
fn s_13_a_dead_address_space_cannot_be_passed() {
    let mm = MmWithUser::new();
    let (handle, log) = ((*mm).clone(), Log::default());
    let in_release = {
        let (handle, log) = (handle.clone(), log.clone());
        move |at| {
            if at == At::Release && handle.mmget_not_zero().is_some() {
                log.add("revived", at);
            }
            true
        }
    };
    let _registered = Registration::new(&mm, Probe::new("a", &log, Arc::new(in_release))).unwrap();
    drop(mm);
    assert!(
        handle.mmget_not_zero().is_none(),
        "get takes a living one, and there is no way to have it"
    );
    assert_eq!(
        log.all(),
        [("a", At::Release), ("a", At::Released)],
        "nor while it ends"
    );
}

#[test]
fn s_14_under_the_write_lock_get_locked_works_and_get_says_so() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    let mut locked = mm.mmap_write_lock().unwrap();
    assert_eq!(subsystem.get(&mm).err().unwrap(), GetError::WouldDeadlock);
    assert!(mm.mmap_write_lock().is_err());
    let subscription = subsystem.get_locked(&mut locked).unwrap();
    let again = subsystem.get(&mm).expect("an existing one needs no lock");
    drop(locked);
    assert_eq!((subscription.users(), again.users()), (2, 2));
    assert!(mm.mmap_write_lock().is_ok());
}

/// `get_locked` and `get` must not wait for a bracket that the calling thread has open: neither for
/// one that the caller opened, nor for one that `alloc` left open.
#[test]
fn s_14_get_locked_inside_a_bracket_is_refused_and_a_bracket_left_by_alloc_too() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystem = probes("a", &log, nothing());
    let mut locked = mm.mmap_write_lock().unwrap();
    let bracket = mm.invalidate(page(1), Event::Clear);
    assert_eq!(
        subsystem.get_locked(&mut locked).err().unwrap(),
        GetError::WouldDeadlock
    );
    assert_eq!(log.all(), [], "alloc was not called");
    drop(bracket);
    let leaves = Subsystem::<Probe, (), _>::new(|mm: &MmWithUser| {
        std::mem::forget(mm.invalidate(page(1), Event::Clear));
        Ok(Probe::new("b", &log, nothing()))
    });
    // Use another address space, because the open bracket blocks every later registrar of its
    // address space.
    let other = MmWithUser::new();
    assert_eq!(leaves.get(&other).err().unwrap(), GetError::WouldDeadlock);
    assert_eq!(
        (log.all(), other.has_notifiers(), other.mm_count()),
        (vec![("b", At::Free)], false, 1)
    );
    assert_eq!(subsystem.get_locked(&mut locked).unwrap().users(), 1);
}

/// A `Registration` belongs to no subsystem, so `get` cannot share a notifier that its owner may
/// unregister.
#[test]
fn s_15_get_does_not_find_a_registered_object() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let registered = Registration::new(&mm, Probe::new("registered", &log, nothing())).unwrap();
    let got = probes("got", &log, nothing()).get(&mm).unwrap();
    assert_eq!(
        (registered.name, got.name, got.users()),
        ("registered", "got", 1)
    );
}

/// On one address space, `get` can find at most one listed notifier of a subsystem, because it
/// finds no registered one (S-15). So the older notifier of this test was put, and waits for its
/// free.
#[test]
fn s_16_get_returns_the_newest_object_of_its_subsystem() {
    let (mm, log, gate) = (Arc::new(MmWithUser::new()), Log::default(), Gate::new());
    let subsystem = probes("a", &log, stop(At::Start, &gate));
    let old = subsystem.get(&mm).unwrap();
    let walker = spawn({
        let mm = Arc::clone(&mm);
        move || drop(mm.invalidate(page(1), Event::Clear))
    });
    gate.wait_for(1);
    old.put();
    let getter = spawn({
        let mm = Arc::clone(&mm);
        move || {
            let new = subsystem.get(&mm).unwrap();
            let newest = subsystem.get(&mm).unwrap();
            assert!(std::ptr::eq(&*new, &*newest));
            newest.users()
        }
    });
    getter.assert_blocked();
    gate.open();
    walker.join();
    assert_eq!(getter.join(), 2);
    assert_eq!(log.count("a", At::Alloc), 2);
}

#[test]
fn s_17_an_address_space_of_its_own_starts_without_subscribers() {
    let (parent, log) = (MmWithUser::new(), Log::default());
    let _held = probes("a", &log, nothing()).get(&parent).unwrap();
    let child = MmWithUser::new();
    log.clear();
    drop(child.invalidate(page(1), Event::Unmap));
    assert!(!child.has_notifiers() && log.all().is_empty());
}

#[test]
fn handles_are_equal_if_they_are_of_one_address_space() {
    let (mm, other) = (MmWithUser::new(), MmWithUser::new());
    assert_eq!((*mm).clone(), *mm);
    assert_ne!(*mm, *other);
}
