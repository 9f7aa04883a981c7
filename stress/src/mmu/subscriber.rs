//! The notifiers, and the shadows of the frame behind an address space.

use super::{World, add, lock};
use mmu_notifier::{
    Finish, IntervalOps, InvalidateRange, Mm, MmWithUser, Notifier, SecondaryTlb, ShadowOps,
    Subsystem, Va, VaRange, WouldBlock,
};
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};

const ALIVE: u64 = 0x600d_600d_600d_600d;
const FREED: u64 = 0xdead_dead_dead_dead;

pub(crate) type Probes = Subsystem<
    Probe,
    Infallible,
    Box<dyn Fn(&MmWithUser) -> Result<Probe, Infallible> + Send + Sync>,
>;

/// The world, for the closures that make the notifiers of its subsystems.
pub(crate) static WORLD: std::sync::OnceLock<&'static World> = std::sync::OnceLock::new();

/// The maximum number of users of a notifier. It is so small that some gets are refused.
const USERS_MAX: u32 = 3;

pub(crate) fn subsystem() -> Probes {
    let alloc = |_: &MmWithUser| Ok(Probe::new(WORLD.get().expect("the actors have set it")));
    Subsystem::with_users_max(Box::new(alloc), USERS_MAX)
}

/// A subsystem whose `alloc` always fails.
pub(crate) static FAILING: Subsystem<Probe, ()> = Subsystem::new(|_mm| Err(()));

#[derive(Debug)]
pub(crate) struct Probe {
    state: AtomicU64,
    starts: AtomicU64,
    ends: AtomicU64,
    world: &'static World,
}

impl Probe {
    pub(crate) fn new(world: &'static World) -> Self {
        add(&world.counts.allocs);
        Self {
            state: AtomicU64::new(ALIVE),
            starts: AtomicU64::new(0),
            ends: AtomicU64::new(0),
            world,
        }
    }

    pub(crate) fn alive(&self) {
        self.world.check(
            self.state.load(Ordering::Relaxed) == ALIVE,
            "a freed notifier was used",
        );
    }

    /// Calls functions from a callback: puts a subscription of another thread, or calls
    /// `synchronize`, which must be refused.
    fn misbehave(&self, range: &InvalidateRange<'_>) {
        match (self.starts.load(Ordering::Relaxed) + range.range().start().get() / 4096) % 16 {
            0 => {
                let orphan = lock(&self.world.orphans).pop();
                drop(orphan);
            }
            1 => {
                let refused = self.world.subsystems[0].synchronize().is_err();
                self.world
                    .check(refused, "a synchronize in a callback was not refused");
            }
            2 => std::thread::yield_now(),
            _ => {}
        }
    }
}

impl Notifier for Probe {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        self.alive();
        self.starts.fetch_add(1, Ordering::Relaxed);
        self.misbehave(range);
    }

    fn try_invalidate_range_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        self.alive();
        if range.range().start().get() / 4096 % 4 == 3 {
            add(&self.world.counts.refused);
            return Err(WouldBlock);
        }
        self.starts.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        self.alive();
        let ends = self.ends.fetch_add(1, Ordering::AcqRel) + 1;
        self.world.check(
            ends <= self.starts.load(Ordering::Relaxed),
            "an end without its start",
        );
        self.misbehave(range);
    }

    fn release(&self, _mm: &Mm) {
        self.alive();
    }

    fn test_young(&self, _mm: &Mm, _address: Va) -> bool {
        self.alive();
        false
    }
}

impl SecondaryTlb for Probe {
    fn invalidate_secondary_tlbs(&self, _mm: &Mm, _range: VaRange) {
        self.alive();
        add(&self.world.counts.flushes);
    }

    fn release(&self, _mm: &Mm) {
        self.alive();
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let before = self.state.swap(FREED, Ordering::Relaxed);
        self.world.check(before == ALIVE, "freed twice");
        add(&self.world.counts.frees);
    }
}

/// A shadow's entry for the frame of its address space.
#[derive(Debug)]
pub(crate) struct Shadow {
    pub(crate) entry: Option<u64>,
    world: &'static World,
}

impl Shadow {
    pub(crate) fn new(world: &'static World) -> Self {
        add(&world.counts.allocs);
        Self { entry: None, world }
    }
}

/// The page that shadows watch.
pub(crate) fn page() -> VaRange {
    VaRange::covering(Va::new(0x8000), 1).expect("a page is a range")
}

impl ShadowOps for Shadow {
    fn zap(&mut self, range: &InvalidateRange<'_>) {
        if range.range().overlaps(page()) {
            self.entry = None;
        }
    }
}

impl IntervalOps for Shadow {
    fn invalidate(&mut self, range: &InvalidateRange<'_>) -> Option<Finish> {
        self.zap(range);
        let world = self.world;
        (range.range().pages() == 3).then(|| Finish::new(move || add(&world.counts.finishes)))
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        add(&self.world.counts.frees);
    }
}
