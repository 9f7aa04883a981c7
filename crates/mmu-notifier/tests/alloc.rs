//! Counts the calls of the allocator in functions that must not allocate or free.
#![cfg(not(mmun_loom))]

use mmu_notifier::{
    Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, InvalidateSeq, MmWithUser,
    Notifier, Registration, ShadowOps, Subsystem, Va, VaRange, WouldBlock,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use testkit::Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

struct Silent;

impl Notifier for Silent {}

impl IntervalOps for Silent {
    fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
        None
    }
}

impl ShadowOps for Silent {
    fn zap(&mut self, _range: &InvalidateRange<'_>) {}
}

fn page(number: u64) -> VaRange {
    VaRange::covering(Va::new(number << 12), 1).unwrap()
}

/// Opens a bracket with each function that opens one, flushes secondary TLBs, and asks whether
/// pages are young.
fn dispatch(mm: &MmWithUser) {
    drop(mm.invalidate(VaRange::ALL, Event::Unmap));
    drop(mm.try_invalidate(page(1), Event::Clear));
    drop(mm.invalidate_owned(page(1), Event::Clear));
    mm.with_invalidation(page(1), Event::Clear, |_| ());
    mm.invalidate_secondary_tlbs(page(1));
    let _ = (
        mm.clear_flush_young(page(1)),
        mm.clear_young(page(1)),
        mm.test_young(Va::new(0x1000)),
    );
}

#[test]
fn dispatch_allocates_and_frees_nothing() {
    for subscribers in [0, 1, 10, 100] {
        let mm = MmWithUser::new();
        let held: Vec<_> = (0..subscribers)
            .map(|_| Registration::new(&mm, Silent).unwrap())
            .collect();
        assert_eq!(
            Counting::calls(|| dispatch(&mm)),
            0,
            "with {subscribers} subscribers"
        );
        let nodes: Vec<_> = (0..subscribers)
            .map(|n| IntervalNotifier::insert(&mm, page(n), Silent).unwrap())
            .collect();
        let shadow = Registration::new(&mm, InvalidateSeq::new([page(1)], Silent)).unwrap();
        assert_eq!(
            Counting::calls(|| dispatch(&mm)),
            0,
            "with {subscribers} subscribers and as many intervals"
        );
        let found = Counting::calls(|| {
            shadow
                .try_install(shadow.snapshot(page(1)), |_| ())
                .unwrap();
            for node in &nodes {
                node.try_install(node.read_begin(), |_| ()).unwrap();
            }
        });
        assert_eq!(found, 0, "a fault");
        drop((held, nodes));
    }
}

/// After a refusal the core must call the end of each subscriber that accepted, however many there
/// are. It records them without an allocation.
#[test]
fn a_refused_start_allocates_and_frees_nothing() {
    struct Refuses;
    impl Notifier for Refuses {
        fn try_invalidate_range_start(&self, _: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
            Err(WouldBlock)
        }
    }
    let mm = MmWithUser::new();
    let refuses = Registration::new(&mm, Refuses).unwrap();
    let held: Vec<_> = (0..100)
        .map(|_| Registration::new(&mm, Silent).unwrap())
        .collect();
    let node = IntervalNotifier::insert(&mm, page(1), Silent).unwrap();
    assert_eq!(
        Counting::calls(|| assert!(mm.try_invalidate(page(1), Event::Clear).is_err())),
        0
    );
    drop((refuses, held, node));
}

/// The reclaimer drops the closures of the second passes after the bracket.
#[test]
fn second_passes_that_were_made_beforehand_allocate_and_free_nothing() {
    struct Ready(Option<Finish>);
    impl IntervalOps for Ready {
        fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
            self.0.take()
        }
    }
    let (mm, kept, ran) = (
        MmWithUser::new(),
        Arc::new(()),
        Arc::new(AtomicUsize::new(0)),
    );
    let make = |number| {
        let (kept, ran) = (Arc::clone(&kept), Arc::clone(&ran));
        let finish = Finish::new(move || {
            assert!(Arc::strong_count(&kept) > 0);
            ran.fetch_add(1, Ordering::Relaxed);
        });
        IntervalNotifier::insert(&mm, page(number), Ready(Some(finish))).unwrap()
    };
    let nodes = [1, 2, 3].map(make);
    let calls = Counting::calls(|| {
        let bracket = mm.invalidate(VaRange::ALL, Event::Clear);
        assert_eq!(
            Arc::strong_count(&kept),
            4,
            "as long as the bracket is open"
        );
        drop(bracket);
    });
    assert_eq!((calls, ran.load(Ordering::Relaxed)), (0, 3));
    // Frees of one address space run in the order in which they were queued.
    static LATER: Subsystem<Silent> = Subsystem::new(|_| Ok(Silent));
    drop(LATER.get(&mm).unwrap());
    LATER.synchronize().unwrap();
    assert_eq!(Arc::strong_count(&kept), 1);
    drop(nodes);
}

#[test]
fn a_threads_first_bracket_allocates_nothing() {
    let mm = MmWithUser::new();
    let _held = Registration::new(&mm, Silent).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(Counting::calls(|| dispatch(&mm)), 0));
    });
}

#[test]
fn get_of_an_existing_notifier_and_put_allocate_and_free_nothing() {
    static SILENT: Subsystem<Silent> = Subsystem::new(|_| Ok(Silent));
    let mm = MmWithUser::new();
    let held = SILENT.get(&mm).unwrap();
    let again = Counting::calls(|| {
        let second = SILENT.get(&mm).unwrap();
        second.try_clone().unwrap().put();
        second.put();
    });
    assert_eq!(again, 0, "get, clone, and puts that are not the last");
    let bracket = mm.invalidate(page(1), Event::Clear);
    assert_eq!(Counting::calls(|| held.put()), 0, "the last put");
    drop(bracket);
    SILENT.synchronize().unwrap();
}

#[test]
fn a_put_in_the_middle_of_a_walk_allocates_and_frees_nothing() {
    let mm = MmWithUser::new();
    let held: Vec<_> = (0..100)
        .map(|_| Registration::new(&mm, Silent).unwrap())
        .collect();
    let mut held = held.into_iter();
    let bracket = mm.invalidate(page(1), Event::Clear);
    assert_eq!(
        Counting::calls(|| held.by_ref().for_each(Registration::put)),
        0
    );
    drop(bracket);
}

#[test]
fn an_end_that_makes_deferred_inserts_allocates_and_frees_nothing() {
    let up = |late| (0..late).map(|number| 2 * number + 1).collect();
    // The bracket's end inserts in reverse order: first pages 1000 to 1299 upwards, which fills
    // nodes, and then pages 103,099 to 100,000 downwards, behind these nodes.
    let down_behind = (0..3100)
        .map(|number| 100_000 + number)
        .chain((1000..1300).rev())
        .collect();
    for late in [up(1), up(2), up(1000), down_behind] {
        let (mm, count): (_, usize) = (MmWithUser::new(), Vec::len(&late));
        let insert = |number| IntervalNotifier::insert(&mm, page(number), Silent).unwrap();
        // Insert in ascending order, so that every node of the tree is full.
        let mut nodes: Vec<_> = (0..15 * 15).map(|number| insert(2 * number)).collect();
        let bracket = mm.invalidate(VaRange::ALL, Event::Unmap);
        nodes.extend(late.into_iter().map(insert));
        assert_eq!(Counting::calls(|| drop(bracket)), 0, "with {count} inserts");
        assert_eq!(mm.callback_panics(), 0);
        // The first removal frees the spare nodes that were kept for the worst case.
        drop(nodes.pop());
        let second = Counting::calls(|| drop(nodes.pop()));
        assert!(
            second <= 4,
            "{second} calls: more than the interval and a node of each level"
        );
    }
}
