//! Starts that must not sleep, some of which refuse.

use crate::support::{At, Counter, Hook, Log, Probe, nothing, page};
use mmu_notifier::{
    Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, MmWithUser, Notifier,
    Registration, WouldBlock,
};
use std::sync::{Arc, Mutex};

#[test]
fn s_103_a_refusal_reaches_the_caller_and_every_subscriber_was_asked() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let _a = Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap();
    let _b = Registration::new(
        &mm,
        Probe::new("b", &log, Arc::new(|at| at != At::TryStart)),
    )
    .unwrap();
    let _c = Registration::new(&mm, Probe::new("c", &log, nothing())).unwrap();
    assert_eq!(
        mm.try_invalidate(page(1), Event::Unmap).err(),
        Some(WouldBlock)
    );
    assert_eq!(log.names(At::TryStart), ["c", "b", "a"]);
    assert_eq!(
        log.names(At::End),
        ["c", "a"],
        "who accepted gets its end, who refused gets none"
    );
    assert!(mm.mmap_write_lock().is_ok(), "no bracket was left open");
}

/// Any subscriber of many may refuse: the first that is called, one in the middle, the last, or
/// several.
#[test]
fn b_01_a_refusal_by_any_of_many_ends_all_the_others() {
    const ALL: usize = 100;
    for refusing in [
        vec![0],
        vec![31],
        vec![32],
        vec![63],
        vec![64],
        vec![ALL - 1],
        vec![0, 50],
        vec![10, 33, ALL - 1],
    ] {
        let (mm, log) = (MmWithUser::new(), Log::default());
        let register = |number| {
            let refuses = refusing.contains(&number);
            let hook = Arc::new(move |at| at != At::TryStart || !refuses);
            Registration::new(
                &mm,
                Probe::new(if refuses { "no" } else { "yes" }, &log, hook),
            )
            .unwrap()
        };
        let held: Vec<_> = (0..ALL).rev().map(register).collect();
        assert!(mm.try_invalidate(page(1), Event::Unmap).is_err());
        let accepted = held.len() - refusing.len();
        let counts = [
            ("no", At::TryStart),
            ("no", At::End),
            ("yes", At::TryStart),
            ("yes", At::End),
        ];
        let counts = counts.map(|(name, at)| log.count(name, at));
        assert_eq!(
            counts,
            [refusing.len(), 0, accepted, accepted],
            "{refusing:?} refuse"
        );
        assert_eq!(
            log.all().iter().position(|entry| entry.1 == At::End),
            Some(ALL),
            "all starts, and then the ends"
        );
    }
}

struct Quiet;

impl IntervalOps for Quiet {
    fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
        None
    }
}

/// At each end, records its number and whether the window of the intervals is open. Number 0
/// refuses each start that must not sleep.
struct Ends(usize, Arc<Mutex<Vec<(usize, bool)>>>);

impl Notifier for Ends {
    fn try_invalidate_range_start(&self, _range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        if self.0 == 0 { Err(WouldBlock) } else { Ok(()) }
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        let (seq, active) = range.mm().interval_snapshot();
        self.1
            .lock()
            .unwrap()
            .push((self.0, seq % 2 == 1 || active != 0));
    }
}

/// The ends come newest first, after the window of the intervals has closed. This holds for any
/// number of subscribers, after a refused start and after a bracket.
#[test]
fn b_01_ends_come_in_one_order_for_any_number_of_subscribers() {
    for all in [1, 2, 31, 32, 33, 40, 64, 65, 100, 1000] {
        let (mm, ends) = (MmWithUser::new(), Arc::<Mutex<Vec<_>>>::default());
        let _interval = IntervalNotifier::insert(&mm, page(1), Quiet).unwrap();
        let _held: Vec<_> = (0..all)
            .map(|number| Registration::new(&mm, Ends(number, Arc::clone(&ends))).unwrap())
            .collect();
        let heard = || std::mem::take(&mut *ends.lock().unwrap());
        assert!(mm.try_invalidate(page(1), Event::Unmap).is_err());
        let newest_first = |last: usize| {
            (last..all)
                .rev()
                .map(|number| (number, false))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            heard(),
            newest_first(1),
            "of {all}; the one that refused gets none"
        );
        drop(mm.invalidate(page(1), Event::Unmap));
        assert_eq!(heard(), newest_first(0), "of {all}");
        drop(mm.invalidate_owned(page(1), Event::Unmap));
        assert_eq!(heard(), newest_first(0), "of {all}");
    }
}

/// A start that panics may have done part of its work, so its end must come. An end that panics
/// must not prevent the ends of the other subscribers.
#[test]
fn b_03_a_panic_in_a_refused_start_or_its_end_leaves_the_others_paired() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let bad =
        |when| Arc::new(move |at| at != when || panic!("a callback panics, as this test wants"));
    let hooks: [(_, Hook); 4] = [
        ("first", nothing()),
        ("in start", bad(At::TryStart)),
        ("in end", bad(At::End)),
        ("no", Arc::new(|at| at != At::TryStart)),
    ];
    let _held =
        hooks.map(|(name, hook)| Registration::new(&mm, Probe::new(name, &log, hook)).unwrap());
    assert!(mm.try_invalidate(page(1), Event::Unmap).is_err());
    assert_eq!(
        log.names(At::TryStart),
        ["no", "in end", "in start", "first"]
    );
    assert_eq!(
        (log.names(At::End), mm.callback_panics()),
        (vec!["in end", "in start", "first"], 2)
    );
    assert!(mm.mmap_write_lock().is_ok(), "no bracket was left open");
}

#[test]
fn b_01_on_a_refusal_each_one_that_accepted_gets_one_end() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let names = ["a", "b", "c", "d"];
    let _held = names.map(|name| {
        let refuses = name == "b" || name == "d";
        Registration::new(
            &mm,
            Probe::new(
                name,
                &log,
                Arc::new(move |at| !refuses || at != At::TryStart),
            ),
        )
        .unwrap()
    });
    assert!(mm.try_invalidate(page(1), Event::Clear).is_err());
    assert_eq!(log.names(At::TryStart), ["d", "c", "b", "a"]);
    assert_eq!(log.names(At::End), ["c", "a"]);
}

/// The kernel does not record whose start failed, so it warns of a table that can refuse and has an
/// end. The core records which subscribers refused, so they get no end.
#[test]
fn b_02_a_subscriber_that_can_refuse_may_have_an_end() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let times = Counter::default();
    let first_time = times.clone();
    let hook = Arc::new(move |at| at != At::TryStart || first_time.add() > 1);
    let _held = Registration::new(&mm, Probe::new("a", &log, hook)).unwrap();
    assert!(mm.try_invalidate(page(1), Event::Clear).is_err());
    assert_eq!(log.count("a", At::End), 0);
    drop(mm.try_invalidate(page(1), Event::Clear).unwrap());
    assert_eq!(log.count("a", At::End), 1);
}

#[test]
fn b_03_over_any_mix_starts_that_succeeded_equal_ends() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let refusals = [(); 5].map(|()| Counter::default());
    let mut random = 12345_u32;
    let bits = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let names = ["a", "b", "c", "d", "e"];
    let _held: Vec<_> = (0..5)
        .map(|index| {
            let (bits, refusals) = (Arc::clone(&bits), refusals[index].clone());
            let hook = move |at| {
                let refuse = at == At::TryStart
                    && bits.load(std::sync::atomic::Ordering::SeqCst) >> index & 1 == 1;
                if refuse {
                    refusals.add();
                }
                !refuse
            };
            Registration::new(&mm, Probe::new(names[index], &log, Arc::new(hook))).unwrap()
        })
        .collect();
    for _ in 0..200 {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bits.store(random >> 20, std::sync::atomic::Ordering::SeqCst);
        if random & 0x10 == 0 {
            drop(mm.invalidate(page(1), Event::Clear));
        } else {
            drop(mm.try_invalidate(page(1), Event::Clear));
        }
    }
    for (name, refusals) in names.iter().zip(&refusals) {
        let (starts, ends) = (
            log.count(name, At::Start) + log.count(name, At::TryStart),
            log.count(name, At::End),
        );
        assert_eq!(starts - refusals.get(), ends, "of {name}");
        assert!(refusals.get() > 20 && ends > 20, "both happened");
    }
}
