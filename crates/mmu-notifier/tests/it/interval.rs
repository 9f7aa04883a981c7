//! Interval notifiers: their readers and windows.

mod life;

use crate::support::{At, Log, Probe, nothing, page, spawn};
use mmu_notifier::{
    Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, Mm, MmWithUser, Registration,
    Retry, VaRange, WouldBlock,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) type Hook =
    Box<dyn FnMut(&InvalidateRange<'_>) -> Result<Option<Finish>, WouldBlock> + Send>;

/// A state that records the events of its callbacks, and holds the entry that a reader installed.
#[derive(Default)]
pub(crate) struct Shadow {
    pub(crate) events: Vec<Event>,
    entry: Option<u64>,
    hook: Option<Hook>,
}

impl Shadow {
    pub(crate) fn with(
        hook: impl FnMut(&InvalidateRange<'_>) -> Result<Option<Finish>, WouldBlock> + Send + 'static,
    ) -> Self {
        Self {
            hook: Some(Box::new(hook)),
            ..Self::default()
        }
    }
}

impl IntervalOps for Shadow {
    fn invalidate(&mut self, range: &InvalidateRange<'_>) -> Option<Finish> {
        self.try_invalidate(range).ok().flatten()
    }

    fn try_invalidate(
        &mut self,
        range: &InvalidateRange<'_>,
    ) -> Result<Option<Finish>, WouldBlock> {
        self.events.push(range.event());
        self.entry = None;
        self.hook.as_mut().map_or(Ok(None), |hook| hook(range))
    }
}

fn insert(mm: &MmWithUser, range: VaRange) -> IntervalNotifier<Shadow> {
    IntervalNotifier::insert(mm, range, Shadow::default()).unwrap()
}

fn told(node: &IntervalNotifier<Shadow>) -> usize {
    node.with_state(|state| state.events.len())
}

#[test]
fn b_13_an_idle_insert_lets_readers_through() {
    let mm = MmWithUser::new();
    let node = insert(&mm, page(1));
    assert_eq!(mm.interval_snapshot(), (2, 0));
    let seq = node.read_begin();
    assert!(!node.check_retry(seq));
    assert_eq!(node.try_install(seq, |state| state.entry = Some(7)), Ok(()));
}

#[test]
fn b_14_only_an_event_that_hits_makes_a_reader_retry() {
    let mm = MmWithUser::new();
    let node = insert(&mm, page(1));
    let seq = node.read_begin();
    drop(mm.invalidate(page(2), Event::Unmap));
    assert_eq!(
        (mm.interval_snapshot(), node.check_retry(seq)),
        ((2, 0), false)
    );
    let bracket = mm.invalidate(page(1), Event::Unmap);
    assert_eq!(mm.interval_snapshot(), (3, 1));
    assert!(node.check_retry(seq));
    drop(bracket);
    assert_eq!(
        (mm.interval_snapshot(), node.try_install(seq, |_| ())),
        ((4, 0), Err(Retry))
    );
}

/// In the kernel, a subscriber that refuses leaves the window of the intervals open for ever.
#[test]
fn b_18_a_refusing_subscriber_closes_the_intervals_window() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let refuses = Arc::new(|at| at != At::TryStart);
    let _refuses = Registration::new(&mm, Probe::new("no", &log, refuses)).unwrap();
    let hit = insert(&mm, page(1));
    for range in [page(1), page(2)] {
        assert!(mm.try_invalidate(range, Event::Unmap).is_err());
        let (seq, active) = mm.interval_snapshot();
        assert_eq!((seq % 2, active), (0, 0));
    }
    let node = insert(&mm, page(1));
    let seq = node.read_begin();
    assert!(node.try_install(seq, |_| ()).is_ok());
    assert!(node.remove().is_ok() && hit.remove().is_ok());
}

#[test]
fn b_19_a_refusing_interval_keeps_subscribers_out() {
    let (mm, log) = (MmWithUser::new(), Log::default());
    let _subscriber = Registration::new(&mm, Probe::new("a", &log, nothing())).unwrap();
    let node = IntervalNotifier::insert(&mm, page(1), Shadow::with(|_| Err(WouldBlock))).unwrap();
    assert_eq!(
        mm.try_invalidate(page(1), Event::Unmap).err(),
        Some(WouldBlock)
    );
    assert_eq!((log.all(), mm.interval_snapshot()), (vec![], (4, 0)));
    drop(node);
}

/// A start that must not sleep is refused if the state's lock is held, as `with_state` holds it.
#[test]
fn a_locked_state_refuses_where_sleeping_is_forbidden() {
    let mm = MmWithUser::new();
    let node = insert(&mm, page(1));
    node.with_state(|_| assert!(mm.try_invalidate(page(1), Event::Unmap).is_err()));
    assert!(mm.try_invalidate(page(1), Event::Unmap).is_ok());
}

#[test]
fn b_20_only_the_last_end_thaws() {
    let mm = Arc::new(MmWithUser::new());
    let _hit = insert(&mm, page(1));
    let outer = mm.invalidate(page(1), Event::Unmap);
    let inner = mm.invalidate(page(7), Event::Unmap);
    let node = insert(&mm, page(1));
    drop(outer);
    assert_eq!(mm.interval_snapshot(), (3, 1));
    let reader = spawn(move || {
        let _ = node.read_begin();
        node
    });
    reader.assert_blocked();
    drop(inner);
    let node = reader.join();
    assert_eq!(mm.interval_snapshot(), (4, 0));
    drop(mm.invalidate(page(1), Event::Unmap));
    assert_eq!(
        told(&node),
        1,
        "the deferred insert was made before the reader woke"
    );
}

#[test]
fn b_24_read_begin_may_return_a_sequence_that_is_out_of_date() {
    let mm = MmWithUser::new();
    let node = insert(&mm, page(1));
    for _ in 0..3 {
        let seq = node.read_begin();
        drop(mm.invalidate(page(1), Event::Clear));
        assert_eq!(
            node.try_install(seq, |_| ()),
            Err(Retry),
            "and nothing loops inside"
        );
    }
}

/// `read_begin` waits only for the window that it found, so a stream of invalidations does not
/// delay a reader for ever.
#[test]
fn b_24_read_begin_waits_for_one_window_only() {
    let mm = Arc::new(MmWithUser::new());
    let node = Arc::new(insert(&mm, page(1)));
    let first = mm.invalidate(page(1), Event::Clear);
    let reader = spawn({
        let node = Arc::clone(&node);
        move || node.read_begin()
    });
    reader.assert_blocked();
    drop(first);
    let second = mm.invalidate(page(1), Event::Clear);
    let seq = reader.join();
    assert!(node.check_retry(seq));
    assert_eq!(
        node.try_install(seq, |_| ()),
        Err(Retry),
        "and says so, as the second one is running"
    );
    drop(second);
}

/// Inside a bracket of the same thread, a wait would never end. So `read_begin` returns a sequence
/// that never matches, and `remove` is refused.
#[test]
fn read_begin_inside_ones_own_bracket_does_not_hang() {
    let mm = MmWithUser::new();
    let node = insert(&mm, page(1));
    let bracket = mm.invalidate(page(1), Event::Clear);
    let seq = node.read_begin();
    assert_eq!(node.try_install(seq, |_| ()), Err(Retry));
    let refused = node.remove().err().expect("it would wait for itself");
    drop(bracket);
    assert_eq!(refused.interval.remove().unwrap().events.len(), 1);
}

/// Moves page 1 from frame to frame.
fn move_page(mm: &Mm, frame: &AtomicU64) {
    for next in 1..20_000 {
        let bracket = mm.invalidate(page(1), Event::Unmap);
        frame.store(next, Ordering::SeqCst);
        drop(bracket);
    }
}

#[test]
fn b_25_no_stale_entry_survives_an_invalidation() {
    let (mm, frame) = (MmWithUser::new(), AtomicU64::new(0));
    let node = insert(&mm, page(1));
    std::thread::scope(|scope| {
        scope.spawn(|| move_page(&mm, &frame));
        for _ in 0..20_000 {
            let seq = node.read_begin();
            let found = frame.load(Ordering::SeqCst);
            let _ = node.try_install(seq, |state| state.entry = Some(found));
            node.with_state(|state| {
                // The frame moves on only after a start has taken this lock and cleared the entry.
                assert!(
                    state
                        .entry
                        .is_none_or(|entry| entry == frame.load(Ordering::SeqCst)),
                    "a stale entry"
                );
            });
        }
    });
    let last = frame.load(Ordering::SeqCst);
    node.with_state(|state| assert!(state.entry.is_none_or(|entry| entry == last)));
}

/// A callback cannot prevent the retry, because the core advances the sequence before it calls the
/// callback.
#[test]
fn b_26_a_callback_that_does_nothing_still_makes_readers_retry() {
    struct Lazy;
    impl IntervalOps for Lazy {
        fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
            None
        }
    }
    let mm = MmWithUser::new();
    let node = IntervalNotifier::insert(&mm, page(1), Lazy).unwrap();
    let seq = node.read_begin();
    drop(mm.invalidate(page(1), Event::Clear));
    assert!(node.check_retry(seq));
}

#[test]
fn b_27_the_sequence_may_wrap_around() {
    for start in [u64::MAX - 5, u64::MAX - 3, u64::MAX - 1] {
        let mm = MmWithUser::with_interval_seq(start);
        let node = insert(&mm, page(1));
        for _ in 0..6 {
            let seq = node.read_begin();
            assert!(node.try_install(seq, |_| ()).is_ok());
            let bracket = mm.invalidate(page(1), Event::Clear);
            let deferred = insert(&mm, page(1));
            drop(bracket);
            assert_eq!(node.try_install(seq, |_| ()), Err(Retry));
            let seq = deferred.read_begin();
            assert!(deferred.try_install(seq, |_| ()).is_ok());
            assert!(deferred.remove().is_ok());
        }
    }
}

/// A driver may have one lock for many intervals, which each callback takes. Under that lock,
/// `check_retry` is exact, although it does not take the lock of the interval's state.
#[test]
fn b_32_the_check_is_exact_under_a_lock_that_the_callback_takes() {
    use std::sync::Mutex;
    struct Buffer(Arc<Mutex<Option<u64>>>);
    impl IntervalOps for Buffer {
        fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
            *self.0.lock().unwrap() = None;
            None
        }
    }
    let (mm, frame, entry) = (
        MmWithUser::new(),
        AtomicU64::new(0),
        Arc::<Mutex<Option<u64>>>::default(),
    );
    let node = IntervalNotifier::insert(&mm, page(1), Buffer(Arc::clone(&entry))).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| move_page(&mm, &frame));
        for _ in 0..20_000 {
            let seq = node.read_begin();
            let found = frame.load(Ordering::SeqCst);
            let mut entry = entry.lock().unwrap();
            if !node.check_retry(seq) {
                *entry = Some(found);
            }
            // The frame moves on only after a start has taken this lock and cleared the entry.
            assert!(
                entry.is_none_or(|entry| entry == frame.load(Ordering::SeqCst)),
                "a stale entry"
            );
        }
    });
    let last = frame.load(Ordering::SeqCst);
    assert!(entry.lock().unwrap().is_none_or(|entry| entry == last));
}

#[test]
fn b_32_the_lockless_check_is_reliable_when_it_says_retry() {
    let mm = MmWithUser::new();
    let node = insert(&mm, page(1));
    let seq = node.read_begin();
    drop(mm.invalidate(page(1), Event::Clear));
    assert!(node.check_retry(seq));
    assert_eq!(node.try_install(seq, |_| ()), Err(Retry));
}
