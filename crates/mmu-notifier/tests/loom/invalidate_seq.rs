//! A fault under the collision protocol that races with invalidations.

use crate::model;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use mmu_notifier::{
    Event, InvalidateRange, InvalidateSeq, MmWithUser, Registration, ShadowOps, Va, VaRange,
};

/// A shadow of one page.
#[derive(Default)]
struct OnePage(Option<usize>);

impl ShadowOps for OnePage {
    fn zap(&mut self, range: &InvalidateRange<'_>) {
        if range.range().contains(Va::new(0x1000)) {
            self.0 = None;
        }
    }
}

fn page(number: u64) -> VaRange {
    VaRange::covering(Va::new(number << 12), 1).unwrap()
}

/// Whether the fault or the source runs on the main thread. `loom` explores more interleavings of
/// the thread that the main thread spawns.
#[derive(Clone, Copy)]
enum First {
    Fault,
    Source,
}

/// Runs a fault on page 1, while another thread changes page 1 and then invalidates `then`.
fn fault_racing_invalidations(first: First, then: Option<VaRange>) {
    let mm = Arc::new(MmWithUser::new());
    let shadow = InvalidateSeq::new([VaRange::ALL], OnePage::default());
    let Ok(shadow) = Registration::new(&mm, shadow) else {
        panic!("it was made outside")
    };
    let shadow = Arc::new(shadow);
    let frame = Arc::new(AtomicUsize::new(0));
    let source: Box<dyn FnOnce() + Send> = {
        let (mm, frame) = (Arc::clone(&mm), Arc::clone(&frame));
        Box::new(move || {
            let bracket = mm.invalidate(page(1), Event::Unmap);
            frame.store(1, Ordering::Relaxed);
            drop(bracket);
            if let Some(range) = then {
                drop(mm.invalidate(range, Event::Unmap));
            }
        })
    };
    let fault: Box<dyn FnOnce() + Send> = {
        let shadow = Arc::clone(&shadow);
        Box::new(move || {
            let snapshot = shadow.snapshot(page(1));
            let found = frame.load(Ordering::Relaxed);
            let _ = shadow.try_install(snapshot, |page| page.0 = Some(found));
        })
    };
    match first {
        First::Fault => {
            let source = thread::spawn(source);
            fault();
            source.join().unwrap();
        }
        First::Source => {
            let fault = thread::spawn(fault);
            source();
            fault.join().unwrap();
        }
    }
    assert_ne!(
        shadow.with_shadow(|page| page.0),
        Some(0),
        "an old frame is still mapped"
    );
    assert_eq!((shadow.in_progress(), mm.callback_panics()), (None, 0));
    drop(shadow);
    mm.run_deferred();
}

#[test]
fn b_40_a_fault_racing_an_invalidation() {
    model(|| fault_racing_invalidations(First::Fault, None));
    model(|| fault_racing_invalidations(First::Source, None));
}

#[test]
fn b_41_a_fault_racing_an_invalidation_and_one_elsewhere() {
    model(|| fault_racing_invalidations(First::Fault, Some(page(2))));
    model(|| fault_racing_invalidations(First::Source, Some(page(2))));
}
