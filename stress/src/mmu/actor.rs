//! One thread of the soak, and the objects that it holds.

use super::subscriber::{self, Probe, Shadow, page};
use super::{SPACES, SUBSYSTEMS, Space, World, add, lock};
use crate::random::Random;
use mmu_notifier::{
    Event, GetError, InstallError, IntervalNotifier, InvalidateSeq, Mm, Registration, Secondary,
    Subscription, Va, VaRange,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The maximum number of objects of one kind that a thread holds.
const HELD: usize = 6;

pub(crate) struct Actor {
    world: &'static World,
    random: Random,
    subscriptions: Vec<Subscription<Probe>>,
    registrations: Vec<Registration<Probe>>,
    tlbs: Vec<Registration<Secondary<Probe>>>,
    intervals: Vec<(IntervalNotifier<Shadow>, Arc<AtomicU64>)>,
    shadows: Vec<(Registration<InvalidateSeq<Shadow>>, Arc<AtomicU64>)>,
}

impl Actor {
    pub(crate) fn new(world: &'static World, random: Random) -> Self {
        let _ = subscriber::WORLD.set(world);
        Self {
            world,
            random,
            subscriptions: Vec::new(),
            registrations: Vec::new(),
            tlbs: Vec::new(),
            intervals: Vec::new(),
            shadows: Vec::new(),
        }
    }

    pub(crate) fn run(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            self.act();
        }
    }

    fn act(&mut self) {
        let space = self.world.space(self.random.below(SPACES));
        match self.random.below(100) {
            0..12 => self.get(&space),
            12..22 => self.put(),
            22..28 => self.register(&space),
            28..34 => self.unregister(),
            34..40 => self.insert(&space),
            40..45 => self.remove(),
            45..48 => self.watch(&space),
            48..80 => {
                let depth = self.random.below(3);
                self.invalidate(&space, depth);
            }
            80..96 => self.fault(None),
            96..98 => {
                let number = self.random.below(SPACES);
                // Drop the user first, so that `replace` can drop the last user.
                drop(space);
                self.world.replace(number);
            }
            _ => {
                let subsystem = &self.world.subsystems[self.random.below(SUBSYSTEMS)];
                self.world.check(
                    subsystem.synchronize().is_ok(),
                    "a synchronize outside of brackets was refused",
                );
                add(&self.world.counts.synchronized);
            }
        }
    }

    fn get(&mut self, space: &Space) {
        let subsystem = &self.world.subsystems[self.random.below(SUBSYSTEMS)];
        let got = match self.random.below(8) {
            0 => match space.mm.mmap_write_lock() {
                Ok(mut locked) => subsystem.get_locked(&mut locked),
                Err(_) => Err(GetError::WouldDeadlock),
            },
            1 => {
                let failed = subscriber::FAILING.get(&space.mm).err();
                return self.world.check(
                    failed == Some(GetError::Alloc(())),
                    "a failing alloc was not passed on",
                );
            }
            _ => subsystem.get(&space.mm),
        };
        match got {
            Ok(held) => {
                held.alive();
                add(&self.world.counts.gets);
                if self.random.one_in(8) {
                    lock(&self.world.orphans).push(held);
                } else {
                    self.subscriptions.push(held);
                }
            }
            Err(GetError::Overflow) => add(&self.world.counts.overflows),
            Err(_) => self
                .world
                .check(false, "a get outside of brackets was refused"),
        }
        if self.subscriptions.len() > HELD {
            self.put();
        }
    }

    fn put(&mut self) {
        let Some(held) = take(&mut self.subscriptions, &mut self.random) else {
            return;
        };
        if self.random.one_in(4) {
            let again = held.try_clone();
            held.put();
            match again {
                Ok(again) => again.alive(),
                Err(_overflow) => add(&self.world.counts.overflows),
            }
        } else {
            held.put();
        }
    }

    fn register(&mut self, space: &Space) {
        if self.random.one_in(4) {
            return self.register_tlb(space);
        }
        match Registration::new(&space.mm, Probe::new(self.world)) {
            Ok(registration) => self.registrations.push(registration),
            Err(_) => self
                .world
                .check(false, "a registration outside of brackets was refused"),
        }
        add(&self.world.counts.registrations);
        if self.registrations.len() > HELD {
            self.unregister();
        }
    }

    fn register_tlb(&mut self, space: &Space) {
        match Registration::new(&space.mm, Secondary(Probe::new(self.world))) {
            Ok(tlb) => self.tlbs.push(tlb),
            Err(_) => self
                .world
                .check(false, "a registration outside of brackets was refused"),
        }
        if self.tlbs.len() > 1
            && let Some(tlb) = take(&mut self.tlbs, &mut self.random)
        {
            match self.random.below(3) {
                0 => tlb.put(),
                1 => tlb.unregister_no_release(|tlb| tlb.alive()),
                _ => self.world.check(
                    tlb.unregister().is_ok(),
                    "an unregister outside of brackets was refused",
                ),
            }
        }
    }

    fn unregister(&mut self) {
        let Some(registration) = take(&mut self.registrations, &mut self.random) else {
            return;
        };
        match self.random.below(3) {
            0 => registration.put(),
            1 => registration.unregister_no_release(|probe| probe.alive()),
            _ => match registration.unregister() {
                Ok(probe) => probe.alive(),
                Err(_) => self
                    .world
                    .check(false, "an unregister outside of brackets was refused"),
            },
        }
    }

    fn insert(&mut self, space: &Space) {
        match IntervalNotifier::insert(&space.mm, page(), Shadow::new(self.world)) {
            Ok(interval) => self.intervals.push((interval, Arc::clone(&space.frame))),
            Err(_) => self
                .world
                .check(false, "an insert outside of brackets was refused"),
        }
        add(&self.world.counts.intervals);
        if self.intervals.len() > HELD {
            self.remove();
        }
    }

    fn remove(&mut self) {
        let Some((interval, frame)) = take(&mut self.intervals, &mut self.random) else {
            return;
        };
        // The returned state is not checked against the frame: brackets do not call the interval
        // any more, so the state may be stale.
        drop(frame);
        if self.random.one_in(2) {
            self.world.check(
                interval.remove().is_ok(),
                "a remove outside of brackets was refused",
            );
        } else {
            drop(interval);
        }
    }

    /// Makes or ends a shadow, or changes what it watches.
    fn watch(&mut self, space: &Space) {
        if self.shadows.len() < HELD {
            let shadow = InvalidateSeq::new([page()], Shadow::new(self.world));
            match Registration::new(&space.mm, shadow) {
                Ok(shadow) => self.shadows.push((shadow, Arc::clone(&space.frame))),
                Err(_) => self
                    .world
                    .check(false, "a registration outside of brackets was refused"),
            }
            return;
        }
        let Some((shadow, frame)) = take(&mut self.shadows, &mut self.random) else {
            return;
        };
        let again = shadow.watch([page(), VaRange::ALL], |shadow| shadow.entry = None);
        self.world
            .check(again.is_ok(), "a watch outside of brackets was refused");
        if self.random.one_in(2) {
            shadow.put();
        } else if let Ok(mut shadow) = shadow.unregister() {
            shadow.reset();
            self.world.check(
                shadow.in_progress().is_none(),
                "a reset shadow is in the middle of something",
            );
        }
        drop(frame);
    }

    /// Opens a bracket, changes the frame, and then calls functions that a source may call inside a
    /// bracket.
    fn invalidate(&mut self, space: &Space, depth: usize) {
        add(&self.world.counts.brackets);
        let first = self.random.below(16) as u64;
        let pages = 1 + self.random.below(4) as u64;
        let range = VaRange::covering(Va::new(first << 12), pages << 12).expect("it is not empty");
        let event = if self.random.one_in(4) {
            Event::Unmap
        } else {
            Event::Clear
        };
        match self.random.below(6) {
            0 => {
                let Ok(bracket) = space.mm.try_invalidate(range, event) else {
                    return;
                };
                change(space, range);
                space.mm.invalidate_secondary_tlbs(range);
                self.inside(space, depth);
                drop(bracket);
            }
            1 => {
                let bracket = space.mm.invalidate_owned(range, event);
                change(space, range);
                self.inside(space, depth);
                drop(bracket);
            }
            2 => {
                let _ = (
                    space.mm.test_young(range.start()),
                    space.mm.clear_young(range),
                );
            }
            _ => {
                let bracket = space.mm.invalidate(range, event);
                change(space, range);
                self.inside(space, depth);
                drop(bracket);
            }
        }
    }

    fn inside(&mut self, space: &Space, depth: usize) {
        match self.random.below(8) {
            0 => drop(take(&mut self.subscriptions, &mut self.random)),
            // Drop only an interval of this address space. The drop of an interval of another
            // address space could wait for a bracket whose thread waits for this bracket.
            1 => {
                if let Some(at) = self
                    .intervals
                    .iter()
                    .position(|(interval, _)| interval.mm() == &*space.mm)
                {
                    drop(self.intervals.swap_remove(at));
                }
            }
            2 => {
                if let Some(registration) = take(&mut self.registrations, &mut self.random) {
                    self.unregister_inside(registration, &space.mm);
                }
            }
            3 => match self.world.subsystems[0].get(&space.mm) {
                Ok(held) => held.put(),
                Err(GetError::WouldDeadlock | GetError::Overflow) => {}
                Err(_) => self
                    .world
                    .check(false, "a get in a bracket failed otherwise"),
            },
            4 => self.fault(Some(&space.mm)),
            5 => std::thread::yield_now(),
            _ => {}
        }
        if depth > 0 {
            self.invalidate(space, depth - 1);
        }
    }

    fn unregister_inside(&mut self, registration: Registration<Probe>, mm: &Mm) {
        if registration.mm() != mm {
            // To unregister would wait for brackets of another address space, and their threads may
            // wait for this bracket.
            return self.registrations.push(registration);
        }
        match registration.unregister() {
            Ok(_) => self
                .world
                .check(false, "an unregister in a bracket was not refused"),
            Err(refused) => self.registrations.push(refused.registration),
        }
    }

    /// Installs the frame in a shadow, unless the frame has changed, and checks the shadow's entry.
    /// Inside a bracket of `here`, this function skips intervals of other address spaces, because
    /// `read_begin` on them may wait.
    fn fault(&mut self, here: Option<&Mm>) {
        if let Some((shadow, frame)) = pick(&self.shadows, &mut self.random) {
            let snapshot = shadow.snapshot(page());
            let found = frame.load(Ordering::Relaxed);
            if self.world.broken {
                std::thread::yield_now();
                shadow.with_shadow(|shadow| shadow.entry = Some(found));
            } else {
                match shadow.try_install(snapshot, |shadow| shadow.entry = Some(found)) {
                    Ok(()) => add(&self.world.counts.faults),
                    Err(InstallError::Retry) => add(&self.world.counts.retries),
                    // Another actor has ended the address space.
                    Err(InstallError::Exited) => {}
                    Err(_) => self.world.check(false, "the page is watched"),
                }
            }
            shadow.with_shadow(|shadow| self.look(shadow, frame));
        }
        let picked = pick(&self.intervals, &mut self.random);
        if let Some((interval, frame)) =
            picked.filter(|(interval, _)| here.is_none_or(|mm| mm == interval.mm()))
        {
            let seq = interval.read_begin();
            let found = frame.load(Ordering::Relaxed);
            if interval
                .try_install(seq, |shadow| shadow.entry = Some(found))
                .is_err()
            {
                add(&self.world.counts.retries);
            }
            interval.with_state(|shadow| self.look(shadow, frame));
        }
    }

    /// Checks a shadow's entry, under the shadow's lock. The frame changes only while no shadow has
    /// an entry. So an entry must equal the frame.
    fn look(&self, shadow: &Shadow, frame: &AtomicU64) {
        let good = shadow
            .entry
            .is_none_or(|entry| entry == frame.load(Ordering::Relaxed));
        self.world.check(good, "a stale entry");
    }
}

/// Changes the frame, inside a bracket of `range`.
fn change(space: &Space, range: VaRange) {
    if range.overlaps(page()) {
        space.frame.fetch_add(1, Ordering::Relaxed);
    }
}

fn take<T>(held: &mut Vec<T>, random: &mut Random) -> Option<T> {
    (!held.is_empty()).then(|| held.swap_remove(random.below(held.len())))
}

fn pick<'a, T>(held: &'a [T], random: &mut Random) -> Option<&'a T> {
    (!held.is_empty()).then(|| &held[random.below(held.len())])
}
