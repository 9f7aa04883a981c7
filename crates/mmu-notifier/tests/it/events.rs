//! Starts, ends, events, the callbacks about young pages, and secondary TLBs. `refusals.rs` has the
//! tests of starts that refuse.

use crate::support::{At, Counter, Log, Probe, Probes, Slot, nothing, page, probes};
use mmu_notifier::{
    Blocking, Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, Mm, MmWithUser,
    Notifier, Owner, Registration, Secondary, SecondaryTlb, Va, VaRange, WouldBlock,
};
use std::sync::{Arc, Mutex};

fn three(log: &Log) -> [Probes; 3] {
    ["a", "b", "c"].map(|name| probes(name, log, nothing()))
}

#[test]
fn s_100_start_and_end_call_every_subscriber_newest_first() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let subsystems = three(&log);
    let _held = subsystems
        .each_ref()
        .map(|subsystem| subsystem.get(&mm).unwrap());
    let bracket = mm.invalidate(page(1), Event::Unmap);
    assert_eq!(log.names(At::Start), ["c", "b", "a"]);
    drop(bracket);
    assert_eq!(log.names(At::End), ["c", "b", "a"]);
}

#[test]
fn s_101_without_subscribers_nothing_happens() {
    let mm = MmWithUser::new();
    let count = mm.mm_count();
    for _ in 0..1000 {
        drop(mm.invalidate(page(1), Event::Unmap));
        drop(mm.try_invalidate(page(1), Event::Unmap).unwrap());
        mm.invalidate_secondary_tlbs(page(1));
    }
    assert_eq!(
        (mm.mm_count(), mm.has_notifiers(), mm.clear_young(page(1))),
        (count, false, false)
    );
}

/// A blockable start cannot return an error. The nearest case is a start that panics.
#[test]
fn s_102_a_start_that_panics_is_counted_and_the_others_are_called() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let first = Registration::new(&mm, Probe::new("first", &log, nothing())).unwrap();
    let bad = Arc::new(|at| at != At::Start || panic!("a start panics, as this test wants"));
    let panics = Registration::new(&mm, Probe::new("bad", &log, bad)).unwrap();
    let last = Registration::new(&mm, Probe::new("last", &log, nothing())).unwrap();
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(log.names(At::Start), ["last", "bad", "first"]);
    assert_eq!(
        log.names(At::End),
        ["last", "bad", "first"],
        "starts and ends stay paired"
    );
    assert_eq!(mm.callback_panics(), 1);
    for registration in [first, panics, last] {
        drop(registration.unregister().unwrap());
    }
}

/// The calls that a subscriber got: the name of the callback, and the range, event, blocking and
/// address space of the bracket.
type Told = Arc<Mutex<Vec<(&'static str, VaRange, Event, Blocking, u64)>>>;

struct Listens(Told);

impl Listens {
    fn hear(&self, what: &'static str, range: &InvalidateRange<'_>) {
        let all = (
            what,
            range.range(),
            range.event(),
            range.blocking(),
            range.mm().id(),
        );
        self.0.lock().unwrap().push(all);
    }
}

impl Notifier for Listens {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        self.hear("start", range);
    }
    fn try_invalidate_range_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        self.hear("try", range);
        Ok(())
    }
    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        self.hear("end", range);
    }
}

#[test]
fn s_100_start_and_end_of_one_bracket_hear_the_same() {
    let (mm, told) = (MmWithUser::new(), Told::default());
    let _held = Registration::new(&mm, Listens(Arc::clone(&told))).unwrap();
    let migrate = Event::Migrate {
        owner: Some(Owner::new()),
    };
    let heard = || std::mem::take(&mut *told.lock().unwrap());
    let both = |start, event, blocking| {
        ["end", start].map(|what| (what, page(7), event, blocking, mm.id()))
    };
    let expected = |start, event, blocking| {
        both(start, event, blocking)
            .into_iter()
            .rev()
            .collect::<Vec<_>>()
    };
    drop(mm.invalidate(page(7), migrate));
    assert_eq!(heard(), expected("start", migrate, Blocking::Allowed));
    drop(mm.invalidate_owned(page(7), Event::SoftDirty));
    assert_eq!(
        heard(),
        expected("start", Event::SoftDirty, Blocking::Allowed)
    );
    drop(mm.try_invalidate(page(7), migrate).unwrap());
    assert_eq!(heard(), expected("try", migrate, Blocking::Forbidden));
    let (log, no) = (Log::default(), Arc::new(|at| at != At::TryStart));
    let _refuses = Registration::new(&mm, Probe::new("no", &log, no)).unwrap();
    assert!(mm.try_invalidate(page(7), Event::Unmap).is_err());
    assert_eq!(
        heard(),
        expected("try", Event::Unmap, Blocking::Forbidden),
        "the end of one that was refused as well"
    );
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
        mm.with_invalidation(page(1), Event::Clear, |_| {
            panic!("the change panics, as this test wants")
        });
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
    assert_eq!(
        (bracket.range().range(), bracket.range().event()),
        (page(1), Event::Clear)
    );
    drop(bracket);
    assert_eq!(log.all(), [("a", At::Start), ("a", At::End)]);
}

#[test]
fn s_104_young_asks_every_subscriber_and_test_young_stops_at_the_first() {
    struct Young(bool, Counter);
    impl Notifier for Young {
        fn clear_flush_young(&self, _mm: &Mm, _range: VaRange) -> bool {
            self.1.add();
            self.0
        }
        fn clear_young(&self, _mm: &Mm, _range: VaRange) -> bool {
            self.1.add();
            self.0
        }
        fn test_young(&self, _mm: &Mm, _address: Va) -> bool {
            self.1.add();
            self.0
        }
    }
    let (mm, calls) = (MmWithUser::new(), Counter::default());
    let _held = [false, true, false]
        .map(|young| Registration::new(&mm, Young(young, calls.clone())).unwrap());
    let (idle, none) = (MmWithUser::new(), Counter::default());
    let _no = [false; 2].map(|young| Registration::new(&idle, Young(young, none.clone())).unwrap());
    assert!(
        !idle.clear_flush_young(page(1))
            && !idle.clear_young(page(1))
            && !idle.test_young(Va::new(0))
    );
    assert_eq!(none.get(), 6, "all were asked, and all said no");
    assert!(mm.clear_flush_young(page(1)) && calls.get() == 3);
    assert!(mm.clear_young(page(1)) && calls.get() == 6);
    assert!(
        mm.test_young(Va::new(0x1000)) && calls.get() == 8,
        "the newest said no, the next one yes"
    );
}

/// The default methods: no page is young, and a callback that must not sleep calls the one that
/// may.
#[test]
fn s_104_by_default_nothing_is_young_and_a_start_that_must_not_sleep_is_the_other_one() {
    struct Plain(Counter);
    impl Notifier for Plain {
        fn invalidate_range_start(&self, _range: &InvalidateRange<'_>) {
            self.0.add();
        }
    }
    impl IntervalOps for Plain {
        fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
            self.0.add();
            None
        }
    }
    let (mm, starts, hits) = (MmWithUser::new(), Counter::default(), Counter::default());
    let _plain = Registration::new(&mm, Plain(starts.clone())).unwrap();
    let _tlb = Registration::new(&mm, Secondary(Tlb(Counter::default()))).unwrap();
    let _interval = IntervalNotifier::insert(&mm, page(1), Plain(hits.clone())).unwrap();
    assert!(
        !mm.clear_flush_young(page(1))
            && !mm.clear_young(page(1))
            && !mm.test_young(Va::new(0x1000))
    );
    drop(mm.try_invalidate(page(1), Event::Clear).unwrap());
    assert_eq!((starts.get(), hits.get()), (1, 1));
}

struct Tlb(Counter);

impl SecondaryTlb for Tlb {
    fn invalidate_secondary_tlbs(&self, _mm: &Mm, _range: VaRange) {
        self.0.add();
    }
}

/// Up to Linux 6.5, `end` also flushed secondary TLBs. Here, as since Linux 6.6, only the code that
/// changes the page table flushes them.
#[test]
fn s_105_end_does_not_flush_secondary_tlbs() {
    let (mm, flushes) = (MmWithUser::new(), Counter::default());
    let _tlb = Registration::new(&mm, Secondary(Tlb(flushes.clone()))).unwrap();
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(flushes.get(), 0);
}

#[test]
fn b_05_a_put_between_the_passes_leaves_a_start_alone() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let slot: Slot<Probe> = Slot::default();
    let putter = {
        let slot = Arc::clone(&slot);
        move |at| {
            if at == At::TryStart {
                let held = slot.lock().unwrap().take();
                drop(held);
            }
            at != At::TryStart
        }
    };
    let _refuses = Registration::new(&mm, Probe::new("no", &log, Arc::new(putter))).unwrap();
    let subsystem = probes("a", &log, nothing());
    *slot.lock().unwrap() = Some(subsystem.get(&mm).unwrap());
    assert!(mm.try_invalidate(page(1), Event::Clear).is_err());
    subsystem.synchronize().unwrap();
    assert_eq!(log.names(At::TryStart), ["a", "no"]);
    assert_eq!((log.count("a", At::End), log.count("a", At::Free)), (0, 1));
}

/// A type with callbacks of both kinds does not compile (see the doc test of `Secondary`). Two
/// subscribers of different kinds work side by side.
#[test]
fn b_06_a_table_is_of_one_kind() {
    let (mm, log, flushes) = (MmWithUser::new(), Log::default(), Counter::default());
    let _tlb = Registration::new(&mm, Secondary(Tlb(flushes.clone()))).unwrap();
    let _software = Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap();
    drop(mm.invalidate(page(1), Event::Clear));
    mm.invalidate_secondary_tlbs(page(1));
    assert_eq!((log.all().len(), flushes.get()), (2, 1));
    drop(mm.try_invalidate(page(1), Event::Clear).unwrap());
    assert_eq!(
        (log.all().len(), flushes.get()),
        (4, 1),
        "a start that must not sleep is no flush either"
    );
}

#[test]
fn b_06_release_and_young_reach_a_secondary_tlb() {
    /// Each of the three callbacks about young pages returns true for a different page.
    struct Marked(Log);
    impl SecondaryTlb for Marked {
        fn invalidate_secondary_tlbs(&self, _mm: &Mm, _range: VaRange) {}
        fn release(&self, _mm: &Mm) {
            self.0.add("tlb", At::Release);
        }
        fn clear_flush_young(&self, _mm: &Mm, range: VaRange) -> bool {
            range == page(1)
        }
        fn clear_young(&self, _mm: &Mm, range: VaRange) -> bool {
            range == page(2)
        }
        fn test_young(&self, _mm: &Mm, address: Va) -> bool {
            address == page(3).start()
        }
    }
    let (mm, log) = (MmWithUser::new(), Log::default());
    let _tlb = Registration::new(&mm, Secondary(Marked(log.clone()))).unwrap();
    let young = |number: u64| {
        let (range, address) = (page(number), page(number).start());
        [
            mm.clear_flush_young(range),
            mm.clear_young(range),
            mm.test_young(address),
        ]
    };
    assert_eq!(
        [1, 2, 3].map(young),
        [
            [true, false, false],
            [false, true, false],
            [false, false, true]
        ]
    );
    drop(mm);
    assert_eq!(log.all(), [("tlb", At::Release)]);
}

#[test]
fn b_07_secondary_tlbs_are_flushed_exactly_where_fired() {
    let (mm, flushes) = (MmWithUser::new(), Counter::default());
    let _tlb = Registration::new(&mm, Secondary(Tlb(flushes.clone()))).unwrap();
    mm.with_invalidation(page(1), Event::Clear, |bracket| {
        bracket.mm().invalidate_secondary_tlbs(page(1));
        assert_eq!(flushes.get(), 1);
    });
    assert_eq!(flushes.get(), 1);
}

#[test]
fn b_08_only_migration_and_exclusive_access_carry_an_owner() {
    let (mine, other) = (Owner::new(), Owner::new());
    assert_ne!(mine, other);
    assert_eq!(Event::Migrate { owner: Some(mine) }.owner(), Some(mine));
    assert_eq!(Event::Exclusive { owner: Some(mine) }.owner(), Some(mine));
    assert_eq!(
        (
            Event::Exclusive { owner: None }.owner(),
            Event::Migrate { owner: None }.owner()
        ),
        (None, None)
    );
    let others = [
        Event::Unmap,
        Event::Clear,
        Event::ProtectionVma,
        Event::ProtectionPage,
        Event::SoftDirty,
    ];
    assert!(others.iter().all(|event| event.owner().is_none()));
    struct SkipsOwn(Owner, Counter);
    impl Notifier for SkipsOwn {
        fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
            if range.event().owner() != Some(self.0) {
                self.1.add();
            }
        }
    }
    let (mm, torn_down) = (MmWithUser::new(), Counter::default());
    let _held = Registration::new(&mm, SkipsOwn(mine, torn_down.clone())).unwrap();
    drop(mm.invalidate(page(1), Event::Migrate { owner: Some(mine) }));
    drop(mm.invalidate(page(1), Event::Exclusive { owner: Some(mine) }));
    assert_eq!(torn_down.get(), 0, "its own");
    drop(mm.invalidate(page(1), Event::Migrate { owner: Some(other) }));
    drop(mm.invalidate(page(1), Event::Exclusive { owner: None }));
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(torn_down.get(), 3);
}

/// Only exit can make a release event (see the doc test of `Exit`). At exit a subscriber gets
/// `release`, and no start.
#[test]
fn b_10_release_comes_from_exit_alone() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let _held = Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap();
    drop(mm);
    assert_eq!(log.all(), [("a", At::Release), ("a", At::Released)]);
}
