//! The subscribers on the core's side, which record their calls.

use mmu_notifier::{
    Finish, IntervalOps, InvalidateRange, Mm, Notifier, Secondary, SecondaryTlb, ShadowOps, Va,
    VaRange, WouldBlock,
};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use testkit::model::{Alloc, Callback};

#[derive(Clone)]
pub(super) struct Shared {
    pub(super) calls: Arc<Mutex<Vec<Callback>>>,
    pub(super) freed: Arc<Mutex<BTreeSet<usize>>>,
    /// The number of the next notifier that an `alloc` makes, and how this `alloc` behaves.
    pub(super) next: Arc<Mutex<(usize, Alloc)>>,
    /// Whether a child of a fork has freed a notifier of its parent.
    pub(super) freed_elsewhere: Arc<AtomicBool>,
    process: u32,
}

impl Shared {
    pub(super) fn new() -> Self {
        Self {
            calls: Arc::default(),
            freed: Arc::default(),
            next: Arc::new(Mutex::new((0, Alloc::Fails))),
            freed_elsewhere: Arc::default(),
            process: std::process::id(),
        }
    }

    fn call(&self, callback: Callback) {
        self.calls.lock().unwrap().push(callback);
    }

    pub(super) fn mark(&self, number: usize) -> Mark {
        Mark {
            number,
            shared: self.clone(),
        }
    }
}

/// The number of a notifier. The drop of the mark records that the notifier was freed, in this
/// process or in a child of a fork.
pub(super) struct Mark {
    pub(super) number: usize,
    shared: Shared,
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.shared.process != std::process::id() {
            // A thread of the parent may have held the lock at the fork.
            return self.shared.freed_elsewhere.store(true, Ordering::SeqCst);
        }
        assert!(
            self.shared.freed.lock().unwrap().insert(self.number),
            "freed twice"
        );
    }
}

pub(super) struct Probe {
    pub(super) mark: Mark,
    pub(super) refuses: bool,
}

impl Probe {
    fn call(&self, callback: fn(usize) -> Callback) {
        self.mark.shared.call(callback(self.mark.number));
    }

    fn young(&self) -> bool {
        self.call(Callback::Young);
        self.mark.number % 2 == 1
    }
}

impl Notifier for Probe {
    fn release(&self, _mm: &Mm) {
        self.call(Callback::Release);
    }
    fn invalidate_range_start(&self, _range: &InvalidateRange<'_>) {
        self.call(Callback::Start);
    }
    fn try_invalidate_range_start(&self, _range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        self.call(Callback::TryStart);
        if self.refuses {
            Err(WouldBlock)
        } else {
            Ok(())
        }
    }
    fn invalidate_range_end(&self, _range: &InvalidateRange<'_>) {
        self.call(Callback::End);
    }
    fn clear_flush_young(&self, _mm: &Mm, _range: VaRange) -> bool {
        self.young()
    }
    fn clear_young(&self, _mm: &Mm, _range: VaRange) -> bool {
        self.young()
    }
    fn test_young(&self, _mm: &Mm, _address: Va) -> bool {
        self.young()
    }
}

pub(super) struct Tlb(pub(super) Probe);

impl SecondaryTlb for Tlb {
    fn invalidate_secondary_tlbs(&self, _mm: &Mm, _range: VaRange) {
        self.0.call(Callback::Flush);
    }
    fn release(&self, mm: &Mm) {
        self.0.release(mm);
    }
    fn clear_flush_young(&self, _mm: &Mm, _range: VaRange) -> bool {
        self.0.young()
    }
    fn clear_young(&self, _mm: &Mm, _range: VaRange) -> bool {
        self.0.young()
    }
    fn test_young(&self, _mm: &Mm, _address: Va) -> bool {
        self.0.young()
    }
}

pub(super) type SecondaryProbe = Secondary<Tlb>;

pub(super) struct Shadow(pub(super) Mark);

impl ShadowOps for Shadow {
    fn zap(&mut self, _range: &InvalidateRange<'_>) {
        self.0.shared.call(Callback::Zap(self.0.number));
    }
}

pub(super) struct Entry {
    pub(super) number: usize,
    pub(super) refuses: bool,
    pub(super) shared: Shared,
}

impl IntervalOps for Entry {
    fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
        self.shared.call(Callback::Interval(self.number));
        let (number, shared) = (self.number, self.shared.clone());
        (number % 2 == 1).then(|| Finish::new(move || shared.call(Callback::Finish(number))))
    }

    fn try_invalidate(
        &mut self,
        range: &InvalidateRange<'_>,
    ) -> Result<Option<Finish>, WouldBlock> {
        if self.refuses {
            self.shared.call(Callback::Interval(self.number));
            return Err(WouldBlock);
        }
        Ok(self.invalidate(range))
    }
}
