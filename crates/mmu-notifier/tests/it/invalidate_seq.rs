//! `InvalidateSeq`: KVM's protocol for faults that collide with invalidations.

use crate::support::{Gate, Log, Probe, nothing, page, spawn};
use mmu_notifier::{
    Event, InstallError, InvalidateRange, InvalidateSeq, MmWithUser, Notifier, Registration,
    ShadowOps, Va, VaRange, WouldBlock, WouldDeadlock,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A shadow that maps page numbers to frames.
#[derive(Debug, Default)]
struct Table(BTreeMap<u64, usize>);

impl ShadowOps for Table {
    fn zap(&mut self, range: &InvalidateRange<'_>) {
        self.0
            .retain(|page, _| !range.range().contains(Va::new(page << 12)));
    }
}

type Shadow = Registration<InvalidateSeq<Table>>;

fn pages(first: u64, last: u64) -> VaRange {
    VaRange::covering(Va::new(first << 12), (last + 1 - first) << 12).unwrap()
}

/// A shadow of pages 1 to 99.
fn shadow(mm: &MmWithUser) -> Shadow {
    Registration::new(mm, InvalidateSeq::new([pages(1, 99)], Table::default())).unwrap()
}

/// A fault on a page: takes a snapshot and at once tries to install `frame`, as if the look-up of
/// the frame took no time.
fn fault(shadow: &InvalidateSeq<Table>, number: u64, frame: usize) -> Result<(), InstallError> {
    let snapshot = shadow.snapshot(page(number));
    shadow
        .try_install(snapshot, |table| table.0.insert(number, frame))
        .map(|_| ())
}

fn entry(shadow: &Shadow, number: u64) -> Option<usize> {
    shadow.with_shadow(|table| table.0.get(&number).copied())
}

#[test]
fn b_40_a_fault_that_an_invalidation_overtook_is_refused() {
    let mm = MmWithUser::new();
    let shadow = shadow(&mm);
    fault(&shadow, 7, 1).unwrap();
    let before = shadow.snapshot(page(7));
    let also_before = shadow.snapshot(page(7));
    let bracket = mm.invalidate(page(7), Event::Unmap);
    assert_eq!(entry(&shadow, 7), None);
    let within = shadow.snapshot(page(7));
    assert_eq!(shadow.try_install(before, |_| ()), Err(InstallError::Retry));
    assert_eq!(
        fault(&shadow, 7, 1),
        Err(InstallError::Retry),
        "the change is not over"
    );
    drop(bracket);
    assert_eq!(
        shadow.try_install(also_before, |_| ()),
        Err(InstallError::Retry)
    );
    assert_eq!(shadow.try_install(within, |_| ()), Err(InstallError::Retry));
    fault(&shadow, 7, 2).unwrap();
    assert_eq!(entry(&shadow, 7), Some(2));
}

/// The frame changes inside brackets. Each time a thread reads the entry, the entry is missing or
/// is the current frame.
#[test]
fn b_40_no_stale_entry_under_load() {
    let mm = Arc::new(MmWithUser::new());
    let shadow = Arc::new(shadow(&mm));
    let (frame, stop) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let faulters = [(); 2].map(|()| {
        let (shadow, frame, stop) = (Arc::clone(&shadow), Arc::clone(&frame), Arc::clone(&stop));
        spawn(move || {
            let mut installed = 0;
            while !stop.load(Ordering::Relaxed) || installed == 0 {
                let snapshot = shadow.snapshot(page(7));
                let found = frame.load(Ordering::Relaxed);
                installed += usize::from(
                    shadow
                        .try_install(snapshot, |table| table.0.insert(7, found))
                        .is_ok(),
                );
                shadow.with_shadow(|table| {
                    let now = frame.load(Ordering::Relaxed);
                    assert!(
                        table.0.get(&7).is_none_or(|found| *found == now),
                        "a stale entry"
                    );
                });
            }
            installed
        })
    });
    for round in 1..3_000 {
        let bracket = mm.invalidate(page(7), Event::Unmap);
        frame.store(round, Ordering::Relaxed);
        drop(bracket);
    }
    stop.store(true, Ordering::Relaxed);
    assert!(faulters.into_iter().all(|faulter| faulter.join() > 0));
    assert_eq!((shadow.in_progress(), mm.callback_panics()), (None, 0));
}

#[test]
fn b_41_only_faults_within_the_union_of_open_ranges_retry() {
    let mm = MmWithUser::new();
    let shadow = shadow(&mm);
    let low = mm.invalidate(page(10), Event::Clear);
    fault(&shadow, 20, 1).unwrap();
    assert_eq!(fault(&shadow, 10, 1), Err(InstallError::Retry));
    let high = mm.invalidate(page(30), Event::Clear);
    assert_eq!(
        shadow.in_progress(),
        Some((page(10).start(), page(30).last()))
    );
    assert_eq!(
        fault(&shadow, 20, 1),
        Err(InstallError::Retry),
        "between the two"
    );
    fault(&shadow, 31, 1).unwrap();
    drop(low);
    assert_eq!(
        fault(&shadow, 10, 1),
        Err(InstallError::Retry),
        "the range only grows until the last one ends"
    );
    drop(high);
    assert_eq!(shadow.in_progress(), None);
    fault(&shadow, 10, 1).unwrap();
    let next = mm.invalidate(page(40), Event::Clear);
    assert_eq!(
        shadow.in_progress(),
        Some((page(40).start(), page(40).last())),
        "a new window begins with its own"
    );
    drop(next);
}

#[test]
fn b_41_a_range_that_is_not_watched_disturbs_no_fault() {
    let mm = MmWithUser::new();
    let shadow = shadow(&mm);
    let snapshot = shadow.snapshot(page(7));
    let elsewhere = mm.invalidate(pages(100, 200), Event::Unmap);
    assert_eq!(shadow.in_progress(), None);
    drop(elsewhere);
    shadow
        .try_install(snapshot, |table| table.0.insert(7, 1))
        .unwrap();
    assert_eq!(
        fault(&shadow, 100, 1),
        Err(InstallError::NotWatched),
        "no later bracket would zap it"
    );
    let snapshot = shadow.snapshot(pages(99, 100));
    assert_eq!(
        shadow.try_install(snapshot, |_| ()),
        Err(InstallError::NotWatched)
    );
}

#[test]
fn b_42_an_unregister_between_start_and_end_needs_a_reset() {
    let mm = Arc::new(MmWithUser::new());
    let shadow = shadow(&mm);
    // The subscriber is delisted while this bracket is open, so it gets no end.
    let before = shadow.snapshot(page(8));
    let bracket = mm.invalidate(page(7), Event::Clear);
    let (hand_back, back) = std::sync::mpsc::channel();
    shadow.unregister_no_release(move |shadow| hand_back.send(shadow).unwrap());
    drop(bracket);
    let mut shadow = back.recv().unwrap();
    assert_eq!(
        shadow.in_progress(),
        Some((page(7).start(), page(7).last())),
        "a start without an end"
    );
    shadow.reset();
    assert_eq!(
        shadow.try_install(before, |_| ()),
        Err(InstallError::Retry),
        "no callback covered the earlier look-up"
    );
    let shadow = Registration::new(&mm, shadow).unwrap();
    fault(&shadow, 7, 1).unwrap();
    drop(mm.invalidate(page(7), Event::Clear));
    shadow
        .watch([pages(1, 99)], |_| ())
        .expect("no bracket is open, and none counts as open");
    assert_eq!(
        (
            entry(&shadow, 7),
            shadow.in_progress(),
            mm.callback_panics()
        ),
        (None, None, 0)
    );
    let mut shadow = shadow.unregister().unwrap();
    assert_eq!(
        fault(&shadow, 7, 1),
        Err(InstallError::Exited),
        "it was released"
    );
    shadow.reset();
    let shadow = Registration::new(&mm, shadow).unwrap();
    drop(mm.invalidate(page(7), Event::Clear));
    fault(&shadow, 7, 1).expect("ends count again");
    drop(mm.invalidate(page(7), Event::Clear));
    assert!(shadow.unregister().unwrap().into_shadow().0.is_empty());
}

#[test]
fn b_43_a_wrong_pre_check_does_no_harm() {
    let mm = MmWithUser::new();
    let shadow = shadow(&mm);
    let snapshot = shadow.snapshot(page(7));
    assert!(!shadow.is_stale(&snapshot), "fresh, it says");
    drop(mm.invalidate(page(7), Event::Clear));
    assert_eq!(
        shadow.try_install(snapshot, |_| ()),
        Err(InstallError::Retry),
        "and the check under the lock knows better"
    );
    let snapshot = shadow.snapshot(page(7));
    let other = shadow.snapshot(page(8));
    let bracket = mm.invalidate(page(7), Event::Clear);
    assert!(shadow.is_stale(&snapshot) && !shadow.is_stale(&other));
    drop(bracket);
    assert!(
        shadow.is_stale(&other),
        "out of date although its own page was never touched: one more turn"
    );
    fault(&shadow, 8, 1).unwrap();
}

#[test]
fn b_44_a_change_of_the_watched_ranges_waits_for_open_brackets() {
    let mm = Arc::new(MmWithUser::new());
    let shadow = Arc::new(shadow(&mm));
    fault(&shadow, 7, 1).unwrap();
    // The page of this bracket is not watched, so its start does not count. Its end must not count
    // either, so the watched ranges must not change before the end.
    let bracket = mm.invalidate(page(200), Event::Clear);
    let update = spawn({
        let shadow = Arc::clone(&shadow);
        move || {
            shadow.watch([pages(200, 299)], |table| {
                let old = std::mem::take(&mut table.0);
                old.len()
            })
        }
    });
    update.assert_blocked();
    assert!(
        shadow.watch([], |_| ()).is_err(),
        "this thread would wait for itself"
    );
    fault(&shadow, 7, 2).unwrap();
    let begun_before = shadow.snapshot(page(200));
    drop(bracket);
    assert_eq!(update.join().unwrap(), 1);
    assert_eq!(
        shadow.try_install(begun_before, |_| ()),
        Err(InstallError::Retry)
    );
    assert_eq!(
        (fault(&shadow, 7, 1), fault(&shadow, 200, 1)),
        (Err(InstallError::NotWatched), Ok(()))
    );
    drop(mm.invalidate(page(200), Event::Clear));
    assert_eq!(
        (
            entry(&shadow, 200),
            shadow.in_progress(),
            mm.callback_panics()
        ),
        (None, None, 0)
    );
}

/// The ranges come from an iterator, whose code may leave a bracket open. So `watch` checks for
/// open brackets only after it has collected the ranges.
#[test]
fn b_44_a_change_of_the_watched_ranges_checks_after_the_ranges_were_made() {
    let mm = MmWithUser::new();
    let shadow = shadow(&mm);
    let mut kept = None;
    let ranges = std::iter::once_with(|| {
        kept = Some(mm.invalidate(page(1), Event::Clear));
        page(1)
    });
    assert_eq!(shadow.watch(ranges, |_| ()), Err(WouldDeadlock));
    drop(kept);
    assert!(shadow.watch([page(1)], |_| ()).is_ok());
}

/// Exit delists the shadow while a bracket is open, so the shadow never gets the end. `watch` must
/// not wait for that end.
#[test]
fn b_44_a_change_of_the_watched_ranges_after_exit_does_not_wait_for_an_end_that_never_comes() {
    let mm = MmWithUser::new();
    let shadow = Arc::new(shadow(&mm));
    let (handle, gate) = ((*mm).clone(), Gate::new());
    let source = spawn({
        let gate = Arc::clone(&gate);
        move || handle.with_invalidation(page(7), Event::Clear, |_| gate.pass())
    });
    gate.wait_for(1);
    let watch = |shadow: &Arc<Shadow>| {
        let shadow = Arc::clone(shadow);
        spawn(move || shadow.watch([pages(1, 9)], |_| ()).is_ok())
    };
    let before = watch(&shadow);
    before.assert_blocked();
    let exit = spawn(move || drop(mm));
    assert!(before.join(), "woken, though the bracket is still open");
    exit.assert_blocked();
    gate.open();
    source.join();
    exit.join();
    assert!(watch(&shadow).join());
}

/// The shadow does not watch page 200 at the start of the bracket, so the start is not counted. It
/// watches page 200 at the end, because after a release `watch` does not wait for the bracket. The
/// end must not subtract a start that was not counted.
#[test]
fn b_44_an_end_after_release_takes_nothing_back() {
    let mm = MmWithUser::new();
    let shadow = InvalidateSeq::new([page(7)], Table::default());
    let bracket = mm.invalidate_owned(page(200), Event::Clear);
    shadow.invalidate_range_start(&bracket.range());
    shadow.release(&mm);
    std::thread::scope(|scope| {
        scope.spawn(|| shadow.watch([page(200)], |_| ()).unwrap());
    });
    shadow.invalidate_range_end(&bracket.range());
    assert_eq!(
        fault(&shadow, 200, 1),
        Err(InstallError::Exited),
        "it can never be told of a change again"
    );
}

#[test]
fn nothing_is_installed_after_exit() {
    let mm = MmWithUser::new();
    let shadow = shadow(&mm);
    fault(&shadow, 7, 1).unwrap();
    let snapshot = shadow.snapshot(page(7));
    drop(mm);
    assert_eq!(entry(&shadow, 7), None);
    assert_eq!(
        shadow.try_install(snapshot, |_| ()),
        Err(InstallError::Exited)
    );
    assert_eq!(fault(&shadow, 8, 1), Err(InstallError::Exited));
}

#[test]
fn where_sleeping_is_forbidden_a_held_lock_is_a_refusal_without_a_trace() {
    let (mm, log, gate) = (MmWithUser::new(), Log::default(), Gate::new());
    let shadow = Arc::new(shadow(&mm));
    let other = Registration::new(&mm, Probe::new("other", &log, nothing())).unwrap();
    let holder = spawn({
        let (shadow, gate) = (Arc::clone(&shadow), Arc::clone(&gate));
        move || shadow.with_shadow(|_| gate.pass())
    });
    gate.wait_for(1);
    assert_eq!(
        mm.try_invalidate(page(7), Event::Clear).map(drop),
        Err(WouldBlock)
    );
    gate.open();
    holder.join();
    assert_eq!(shadow.in_progress(), None);
    drop(mm.try_invalidate(page(7), Event::Clear).unwrap());
    fault(&shadow, 7, 1).unwrap();
    drop(other);
    assert_eq!(mm.callback_panics(), 0);
}
