//! Faults and removals of intervals that race with brackets.

use crate::{model, model_with};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;
use mmu_notifier::{
    Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, MmWithUser, VaRange,
};

/// A shadow entry, and whether its interval was removed.
#[derive(Default)]
struct Entry(Option<usize>, Arc<AtomicBool>);

impl IntervalOps for Entry {
    fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
        assert!(
            !self.1.load(Ordering::Relaxed),
            "called after it was removed"
        );
        self.0 = None;
        None
    }
}

#[test]
fn b_25_an_interval_fault_racing_an_invalidation() {
    model(|| {
        let mm = Arc::new(MmWithUser::new());
        let node = IntervalNotifier::insert(&mm, VaRange::ALL, Entry::default()).unwrap();
        let frame = Arc::new(AtomicUsize::new(0));
        let source = thread::spawn({
            let (mm, frame) = (Arc::clone(&mm), Arc::clone(&frame));
            move || {
                let bracket = mm.invalidate(VaRange::ALL, Event::Unmap);
                frame.store(1, Ordering::Relaxed);
                drop(bracket);
            }
        });
        let seq = node.read_begin();
        let found = frame.load(Ordering::Relaxed);
        let _ = node.try_install(seq, |entry| entry.0 = Some(found));
        source.join().unwrap();
        assert_ne!(
            node.with_state(|entry| entry.0),
            Some(0),
            "an old frame is still mapped"
        );
    });
}

#[test]
fn b_21_a_remove_racing_the_last_end() {
    model_with(3, || {
        let mm = Arc::new(MmWithUser::new());
        let removed = Arc::new(AtomicBool::new(false));
        let entry = Entry(None, Arc::clone(&removed));
        let node = IntervalNotifier::insert(&mm, VaRange::ALL, entry).unwrap();
        let bracket = mm.invalidate(VaRange::ALL, Event::Unmap);
        let remover = thread::spawn(move || {
            assert!(node.remove().is_ok());
            removed.store(true, Ordering::Relaxed);
        });
        drop(bracket);
        // After the removal, neither a later bracket nor the end of the first bracket, which does
        // the deferred changes, may use the node.
        drop(mm.invalidate(VaRange::ALL, Event::Unmap));
        remover.join().unwrap();
        assert_eq!((mm.interval_snapshot().1, mm.callback_panics()), (0, 0));
    });
}
