//! 7.6: start, end and events.

use crate::support::{At, Log, Probe, Probes, nothing, page, probes};
use mmu_notifier::{Event, MmWithUser, Registration, Va, VaRange, WouldBlock};
use std::sync::Arc;

fn three(log: &Log) -> [Probes; 3] {
    ["a", "b", "c"].map(|name| probes(name, log, nothing()))
}

#[test]
fn s_100_start_and_end_call_everybody_newest_first() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystems = three(&log);
    let _held = subsystems.each_ref().map(|subsystem| subsystem.get(&mm).unwrap());
    let bracket = mm.invalidate(page(1), Event::Unmap);
    assert_eq!(log.names(At::Start), ["c", "b", "a"]);
    drop(bracket);
    assert_eq!(log.names(At::End), ["c", "b", "a"]);
}

#[test]
fn s_101_with_nobody_subscribed_nothing_happens() {
    let mm = MmWithUser::new();
    let count = mm.mm_count();
    for _ in 0..1000 {
        drop(mm.invalidate(page(1), Event::Unmap));
        drop(mm.try_invalidate(page(1), Event::Unmap).unwrap());
        mm.invalidate_secondary_tlbs(page(1));
    }
    assert_eq!((mm.mm_count(), mm.has_notifiers(), mm.clear_young(page(1))), (count, false, false));
}

/// A blockable start cannot return an error; the nearest to it is one that panics.
#[test]
fn s_102_a_start_that_panics_is_counted_and_the_others_are_called() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let first = Registration::new(&mm, Probe::new("first", &log, nothing())).unwrap();
    let bad = Arc::new(|at| at != At::Start || panic!("a start panics, as this test wants"));
    let panics = Registration::new(&mm, Probe::new("bad", &log, bad)).unwrap();
    let last = Registration::new(&mm, Probe::new("last", &log, nothing())).unwrap();
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(log.names(At::Start), ["last", "bad", "first"]);
    assert_eq!(log.names(At::End), ["last", "bad", "first"], "starts and ends stay paired");
    assert_eq!(mm.callback_panics(), 1);
    for registration in [first, panics, last] {
        drop(registration.unregister().unwrap());
    }
}

#[test]
fn s_103_a_refusal_reaches_the_caller_and_everybody_was_asked() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let _a = Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap();
    let _b = Registration::new(&mm, Probe::new("b", &log, Arc::new(|at| at != At::TryStart))).unwrap();
    let _c = Registration::new(&mm, Probe::new("c", &log, nothing())).unwrap();
    assert_eq!(mm.try_invalidate(page(1), Event::Unmap).err(), Some(WouldBlock));
    assert_eq!(log.names(At::TryStart), ["c", "b", "a"]);
    assert_eq!(log.names(At::End), ["c", "a"], "who accepted gets its end, who refused gets none");
    assert!(mm.mmap_write_lock().is_ok(), "no bracket was left open");
}

#[test]
fn a_refusal_by_the_last_of_many_ends_all_the_others() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let _refuses = Registration::new(&mm, Probe::new("no", &log, Arc::new(|at| at != At::TryStart))).unwrap();
    let accept: Vec<_> =
        (0..100).map(|_| Registration::new(&mm, Probe::new("yes", &log, nothing())).unwrap()).collect();
    assert!(mm.try_invalidate(page(1), Event::Unmap).is_err());
    assert_eq!((log.count("yes", At::TryStart), log.count("yes", At::End)), (accept.len(), accept.len()));
    assert_eq!(log.count("no", At::End), 0);
}

#[test]
fn s_106_a_range_is_half_open_and_never_empty() {
    let at = |address| Va::new(address);
    assert!(VaRange::new(at(0), at(0)).is_err());
    assert!(VaRange::new(at(0x2000), at(0x1000)).is_err());
    assert!(VaRange::new(at(0x1000), at(0x1800)).is_err());
    let range = VaRange::new(at(0x1000), at(0x2000)).unwrap();
    assert!(range.contains(at(0x1fff)) && !range.contains(at(0x2000)));
    assert_eq!(range.end(), Some(at(0x2000)));
}

#[test]
fn with_invalidation_ends_also_when_the_change_panics() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let _a = Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap();
    let change = std::panic::AssertUnwindSafe(|| {
        mm.with_invalidation(page(1), Event::Clear, |_| panic!("the change panics, as this test wants"));
    });
    assert!(std::panic::catch_unwind(change).is_err());
    assert_eq!(log.all(), [("a", At::Start), ("a", At::End)]);
}

#[test]
fn an_owned_bracket_keeps_its_address_space() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let _a = Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap();
    let handle = (*mm).clone();
    let bracket = handle.invalidate_owned(page(1), Event::Clear);
    drop(handle);
    assert_eq!((bracket.range().range(), bracket.range().event()), (page(1), Event::Clear));
    drop(bracket);
    assert_eq!(log.all(), [("a", At::Start), ("a", At::End)]);
}
