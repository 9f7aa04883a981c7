//! Get, put, register and exit, which race with walkers, waits and each other.

use crate::model;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;
use mmu_notifier::{
    Event, InvalidateRange, Mm, MmWithUser, Notifier, Registration, Subsystem, VaRange,
};

/// The counts of a model's notifiers. If an assertion in a callback fails, the core counts the
/// panic, and most models check the core's count.
#[derive(Default)]
struct Seen {
    allocs: AtomicUsize,
    frees: AtomicUsize,
    starts: AtomicUsize,
    ends: AtomicUsize,
    releases: AtomicUsize,
}

struct Canary {
    freed: AtomicBool,
    seen: Arc<Seen>,
}

impl Canary {
    fn new(seen: &Arc<Seen>) -> Self {
        seen.allocs.fetch_add(1, Ordering::Relaxed);
        Self {
            freed: AtomicBool::new(false),
            seen: Arc::clone(seen),
        }
    }

    fn alive(&self) {
        assert!(
            !self.freed.load(Ordering::Relaxed),
            "used after it was freed"
        );
    }
}

impl Notifier for Canary {
    fn invalidate_range_start(&self, _range: &InvalidateRange<'_>) {
        self.alive();
        self.seen.starts.fetch_add(1, Ordering::Relaxed);
    }

    fn invalidate_range_end(&self, _range: &InvalidateRange<'_>) {
        self.alive();
        self.seen.ends.fetch_add(1, Ordering::Relaxed);
    }

    fn release(&self, _mm: &Mm) {
        self.alive();
        self.seen.releases.fetch_add(1, Ordering::Relaxed);
        thread::yield_now();
        self.alive();
    }
}

impl Drop for Canary {
    fn drop(&mut self) {
        assert!(!self.freed.swap(true, Ordering::Relaxed), "freed twice");
        self.seen.frees.fetch_add(1, Ordering::Relaxed);
    }
}

type Canaries = Subsystem<
    Canary,
    std::convert::Infallible,
    Box<dyn Fn(&MmWithUser) -> Result<Canary, std::convert::Infallible> + Send + Sync>,
>;

fn canaries(seen: &Arc<Seen>) -> Canaries {
    let seen = Arc::clone(seen);
    Subsystem::new(Box::new(move |_| Ok(Canary::new(&seen))))
}

fn count(counter: &AtomicUsize) -> usize {
    counter.load(Ordering::Relaxed)
}

#[test]
fn s_22_a_put_racing_a_walker() {
    model(|| {
        let (mm, seen) = (Arc::new(MmWithUser::new()), Arc::new(Seen::default()));
        let subsystem = canaries(&seen);
        let held = subsystem.get(&mm).unwrap();
        let walker = thread::spawn({
            let mm = Arc::clone(&mm);
            move || drop(mm.invalidate(VaRange::ALL, Event::Clear))
        });
        held.put();
        mm.run_deferred();
        walker.join().unwrap();
        assert_eq!((count(&seen.frees), mm.callback_panics()), (1, 0));
        assert!(count(&seen.ends) <= count(&seen.starts));
    });
}

/// A walker may stand on the node that is put, and has not read the node's successor yet.
#[test]
fn s_30_a_put_racing_a_walker_that_must_reach_the_rest() {
    model(|| {
        let (mm, seen, behind) = (
            Arc::new(MmWithUser::new()),
            Arc::new(Seen::default()),
            Arc::new(Seen::default()),
        );
        let (rest, subsystem) = (canaries(&behind), canaries(&seen));
        let stays = rest.get(&mm).unwrap();
        let held = subsystem.get(&mm).unwrap();
        let walker = thread::spawn({
            let mm = Arc::clone(&mm);
            move || drop(mm.invalidate(VaRange::ALL, Event::Clear))
        });
        held.put();
        walker.join().unwrap();
        assert_eq!(
            (count(&behind.starts), count(&behind.ends)),
            (1, 1),
            "the walk lost its way"
        );
        stays.put();
        mm.run_deferred();
        assert_eq!(
            (
                count(&seen.frees),
                count(&behind.frees),
                mm.callback_panics()
            ),
            (1, 1, 0)
        );
    });
}

/// One thread calls `synchronize`. Another thread puts a notifier of the same subsystem, and then
/// calls `synchronize`. It must not rely on the wait of the first thread, which may have begun
/// before the put.
#[test]
fn s_80_a_put_racing_a_synchronize_of_another_subsystem() {
    model(|| {
        let (mm, seen) = (Arc::new(MmWithUser::new()), Arc::new(Seen::default()));
        let subsystem = Arc::new(canaries(&seen));
        let held = subsystem.get(&mm).unwrap();
        let other = thread::spawn({
            let subsystem = Arc::clone(&subsystem);
            move || subsystem.synchronize().unwrap()
        });
        held.put();
        let reclaimer = thread::spawn({
            let mm = Arc::clone(&mm);
            move || mm.run_deferred()
        });
        subsystem.synchronize().unwrap();
        assert_eq!(
            count(&seen.frees),
            1,
            "returned before the free of what was put before"
        );
        reclaimer.join().unwrap();
        other.join().unwrap();
    });
}

#[test]
fn s_27_a_get_racing_the_last_put() {
    model(|| {
        let (mm, seen) = (Arc::new(MmWithUser::new()), Arc::new(Seen::default()));
        let subsystem = Arc::new(canaries(&seen));
        let held = subsystem.get(&mm).unwrap();
        let getter = thread::spawn({
            let (mm, subsystem) = (Arc::clone(&mm), Arc::clone(&subsystem));
            move || {
                let got = subsystem.get(&mm).unwrap();
                got.alive();
                got.put();
            }
        });
        held.put();
        getter.join().unwrap();
        mm.run_deferred();
        assert_eq!(count(&seen.frees), count(&seen.allocs));
        assert_eq!(mm.callback_panics(), 0);
    });
}

#[test]
fn s_47_a_put_racing_exit() {
    model(|| {
        let (mm, seen) = (MmWithUser::new(), Arc::new(Seen::default()));
        let handle = (*mm).clone();
        let subsystem = canaries(&seen);
        let held = subsystem.get(&mm).unwrap();
        let exit = thread::spawn(move || drop(mm));
        held.put();
        handle.run_deferred();
        exit.join().unwrap();
        assert!(count(&seen.releases) <= 1);
        assert_eq!((count(&seen.frees), handle.callback_panics()), (1, 0));
    });
}

#[test]
fn s_48_s_50_unregister_racing_exit() {
    model(|| {
        let (mm, seen) = (MmWithUser::new(), Arc::new(Seen::default()));
        let handle = (*mm).clone();
        let Ok(registration) = Registration::new(&mm, Canary::new(&seen)) else {
            panic!("it was made outside")
        };
        let exit = thread::spawn({
            let seen = Arc::clone(&seen);
            move || {
                drop(mm);
                assert!(count(&seen.releases) >= 1, "delisted, and not released");
            }
        });
        let Ok(canary) = registration.unregister() else {
            panic!("it was unregistered outside")
        };
        assert!((1..=2).contains(&count(&seen.releases)));
        canary.alive();
        drop(canary);
        exit.join().unwrap();
        assert_eq!(
            (handle.has_notifiers(), handle.callback_panics()),
            (false, 0)
        );
    });
}

fn registrar_racing(bracket: fn(&Mm, &AtomicUsize)) {
    model(move || {
        let (mm, seen) = (Arc::new(MmWithUser::new()), Arc::new(Seen::default()));
        let subsystem = canaries(&seen);
        // List another subscriber. If a bracket found an empty list, it would call no end at all,
        // and a surplus end would not show.
        let Ok(other) = Registration::new(&mm, Canary::new(&Arc::new(Seen::default()))) else {
            panic!("it was made outside")
        };
        let moved = Arc::new(AtomicUsize::new(0));
        let source = thread::spawn({
            let (mm, moved) = (Arc::clone(&mm), Arc::clone(&moved));
            move || bracket(&mm, &moved)
        });
        let held = subsystem.get(&mm).unwrap();
        // Either the value that is looked up now is new, or the bracket calls the notifier, before
        // this look-up or after it.
        let looked_up = moved.load(Ordering::Relaxed);
        source.join().unwrap();
        let (starts, ends) = (count(&seen.starts), count(&seen.ends));
        assert!(
            looked_up == 1 || starts == 1,
            "a stale entry that no bracket will invalidate"
        );
        assert_eq!(
            (starts, mm.callback_panics()),
            (ends, 0),
            "ends without starts"
        );
        held.put();
        other.put();
        mm.run_deferred();
    });
}

#[test]
fn s_66_s_69_a_registrar_racing_a_bracket() {
    registrar_racing(|mm, moved| {
        let bracket = mm.invalidate(VaRange::ALL, Event::Unmap);
        moved.store(1, Ordering::Relaxed);
        drop(bracket);
    });
}

#[test]
fn s_66_s_69_a_registrar_racing_a_bracket_that_must_not_sleep() {
    registrar_racing(|mm, moved| {
        let Ok(bracket) = mm.try_invalidate(VaRange::ALL, Event::Unmap) else {
            panic!("no subscriber refuses")
        };
        moved.store(1, Ordering::Relaxed);
        drop(bracket);
    });
}

#[test]
fn s_66_a_second_getter_racing_a_bracket() {
    model(|| {
        let (mm, seen) = (Arc::new(MmWithUser::new()), Arc::new(Seen::default()));
        let subsystem = Arc::new(canaries(&seen));
        let moved = Arc::new(AtomicUsize::new(0));
        // This makes the subsystem's shared part. Its `OnceBox` is not modelled.
        subsystem.synchronize().unwrap();
        let bracket = mm.invalidate(VaRange::ALL, Event::Unmap);
        let getters = [(); 2].map(|()| {
            let (mm, subsystem, moved) =
                (Arc::clone(&mm), Arc::clone(&subsystem), Arc::clone(&moved));
            thread::spawn(move || {
                let held = subsystem.get(&mm).unwrap();
                assert_eq!(
                    moved.load(Ordering::Relaxed),
                    1,
                    "got while a bracket is open that does not know it"
                );
                held.put();
            })
        });
        moved.store(1, Ordering::Relaxed);
        drop(bracket);
        for getter in getters {
            getter.join().unwrap();
        }
        mm.run_deferred();
        assert_eq!(count(&seen.allocs), count(&seen.frees));
    });
}
