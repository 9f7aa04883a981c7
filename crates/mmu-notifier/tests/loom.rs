//! Every interleaving of the races that the contract lists. `RUSTFLAGS="--cfg mmun_loom" cargo test
//! --release --test loom`.
#![cfg(mmun_loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;
use mmu_notifier::{
    Event, Finish, IntervalNotifier, IntervalOps, InvalidateRange, InvalidateSeq, Mm, MmWithUser, Notifier,
    Registration, ShadowOps, Subsystem, Va, VaRange,
};

/// What a model's notifiers have seen. What a callback asserts comes out as a counted panic, which
/// each model checks.
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
        Self { freed: AtomicBool::new(false), seen: Arc::clone(seen) }
    }

    fn alive(&self) {
        assert!(!self.freed.load(Ordering::Relaxed), "used after it was freed");
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

fn model(f: impl Fn() + Sync + Send + 'static) {
    model_with(2, f);
}

/// Checks every run in which threads are preempted up to `preemptions` times. Waiting does not
/// count.
fn model_with(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(builder.preemption_bound.unwrap_or(preemptions));
    builder.max_branches = 20_000;
    builder.check(f);
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
        let (mm, seen, behind) = (Arc::new(MmWithUser::new()), Arc::new(Seen::default()), Arc::new(Seen::default()));
        let (rest, subsystem) = (canaries(&behind), canaries(&seen));
        let stays = rest.get(&mm).unwrap();
        let held = subsystem.get(&mm).unwrap();
        let walker = thread::spawn({
            let mm = Arc::clone(&mm);
            move || drop(mm.invalidate(VaRange::ALL, Event::Clear))
        });
        held.put();
        walker.join().unwrap();
        assert_eq!((count(&behind.starts), count(&behind.ends)), (1, 1), "the walk lost its way");
        stays.put();
        mm.run_deferred();
        assert_eq!((count(&seen.frees), count(&behind.frees), mm.callback_panics()), (1, 1, 0));
    });
}

/// Two threads wait for the frees of one subsystem, and a put comes in between. The second thread
/// must not rely on the first one's wait.
#[test]
fn s_80_a_put_racing_a_synchronize_of_somebody_else() {
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
        assert_eq!(count(&seen.frees), 1, "returned before the free of what was put before");
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
        let Ok(registration) = Registration::new(&mm, Canary::new(&seen)) else { panic!("it was made outside") };
        let exit = thread::spawn({
            let seen = Arc::clone(&seen);
            move || {
                drop(mm);
                assert!(count(&seen.releases) >= 1, "delisted, and nobody has released it");
            }
        });
        let Ok(canary) = registration.unregister() else { panic!("it was unregistered outside") };
        assert!((1..=2).contains(&count(&seen.releases)));
        canary.alive();
        drop(canary);
        exit.join().unwrap();
        assert_eq!((handle.has_notifiers(), handle.callback_panics()), (false, 0));
    });
}

fn registrar_racing(bracket: fn(&Mm, &AtomicUsize)) {
    model(move || {
        let (mm, seen) = (Arc::new(MmWithUser::new()), Arc::new(Seen::default()));
        let subsystem = canaries(&seen);
        // Another subscriber is listed. A bracket that found an empty list would call no end at
        // all, and would hide a surplus end.
        let Ok(other) = Registration::new(&mm, Canary::new(&Arc::new(Seen::default()))) else {
            panic!("it was made outside")
        };
        let moved = Arc::new(AtomicUsize::new(0));
        let source = thread::spawn({
            let (mm, moved) = (Arc::clone(&mm), Arc::clone(&moved));
            move || bracket(&mm, &moved)
        });
        let held = subsystem.get(&mm).unwrap();
        // The value that is looked up now is either new, or the bracket will call the notifier.
        let looked_up = moved.load(Ordering::Relaxed);
        source.join().unwrap();
        let (starts, ends) = (count(&seen.starts), count(&seen.ends));
        assert!(looked_up == 1 || starts == 1, "a stale entry that nobody will invalidate");
        assert_eq!((starts, mm.callback_panics()), (ends, 0), "ends without starts");
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
        let Ok(bracket) = mm.try_invalidate(VaRange::ALL, Event::Unmap) else { panic!("nobody refuses") };
        moved.store(1, Ordering::Relaxed);
        drop(bracket);
    });
}

/// A shadow entry, and whether it was removed.
#[derive(Default)]
struct Entry(Option<usize>, Arc<AtomicBool>);

impl IntervalOps for Entry {
    fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
        assert!(!self.1.load(Ordering::Relaxed), "called after it was removed");
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
        assert_ne!(node.with_state(|entry| entry.0), Some(0), "an old frame is still mapped");
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
        // After the removal, neither a later window nor a deferred change may use the node.
        drop(mm.invalidate(VaRange::ALL, Event::Unmap));
        remover.join().unwrap();
        assert_eq!((mm.interval_snapshot().1, mm.callback_panics()), (0, 0));
    });
}

#[test]
fn s_66_a_second_getter_racing_a_bracket() {
    model(|| {
        let (mm, seen) = (Arc::new(MmWithUser::new()), Arc::new(Seen::default()));
        let subsystem = Arc::new(canaries(&seen));
        let moved = Arc::new(AtomicUsize::new(0));
        // Makes the subsystem's shared part, whose `OnceLock` is not modelled.
        subsystem.synchronize().unwrap();
        let bracket = mm.invalidate(VaRange::ALL, Event::Unmap);
        let getters = [(); 2].map(|()| {
            let (mm, subsystem, moved) = (Arc::clone(&mm), Arc::clone(&subsystem), Arc::clone(&moved));
            thread::spawn(move || {
                let held = subsystem.get(&mm).unwrap();
                assert_eq!(moved.load(Ordering::Relaxed), 1, "got while a bracket is open that does not know it");
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

/// What every user touches and the drop writes: `loom` reports a free that is not ordered after
/// each use.
struct Touched(loom::cell::UnsafeCell<bool>);

// SAFETY: The cell is used across threads on purpose; `loom` checks that no two uses race.
unsafe impl Sync for Touched {}

impl Touched {
    fn touch(&self) {
        // SAFETY: No thread may write while a user is left: the model checks exactly that.
        assert!(self.0.with(|alive| unsafe { *alive }), "used after it was freed");
    }
}

impl Notifier for Touched {
    fn release(&self, _mm: &Mm) {
        self.touch();
    }
}

impl Drop for Touched {
    fn drop(&mut self) {
        // SAFETY: No user is left: as above.
        self.0.with_mut(|alive| unsafe { *alive = false });
    }
}

#[test]
fn s_28_the_free_comes_after_every_putters_last_use() {
    model(|| {
        let mm = MmWithUser::new();
        let subsystem = Subsystem::<Touched>::new(|_| Ok(Touched(loom::cell::UnsafeCell::new(true))));
        let held = subsystem.get(&mm).unwrap();
        let other = held.try_clone().unwrap();
        let putter = thread::spawn(move || {
            other.touch();
            other.put();
        });
        held.touch();
        held.put();
        mm.run_deferred();
        putter.join().unwrap();
        mm.run_deferred();
        assert_eq!(mm.callback_panics(), 0);
    });
}

#[test]
fn s_40_release_sees_what_every_user_did() {
    model(|| {
        let mm = MmWithUser::new();
        let handle = (*mm).clone();
        let subsystem = Subsystem::<Touched>::new(|_| Ok(Touched(loom::cell::UnsafeCell::new(true))));
        let held = Arc::new(subsystem.get(&mm).unwrap());
        let user = thread::spawn({
            let (mm, held) = (mm.clone(), Arc::clone(&held));
            move || {
                // SAFETY: No other thread uses the cell before exit, and this user delays exit.
                held.0.with_mut(|alive| unsafe { *alive = true });
                drop(mm);
            }
        });
        drop(mm);
        user.join().unwrap();
        drop(held);
        handle.run_deferred();
        assert_eq!(handle.callback_panics(), 0);
    });
}

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

/// Which of the two is the thread that was there first: `loom` tries out more for the other one.
#[derive(Clone, Copy)]
enum First {
    Fault,
    Source,
}

/// A fault on page 1, while another thread changes page 1 and then invalidates `then`.
fn fault_racing_invalidations(first: First, then: Option<VaRange>) {
    let mm = Arc::new(MmWithUser::new());
    let shadow = InvalidateSeq::new([VaRange::ALL], OnePage::default());
    let Ok(shadow) = Registration::new(&mm, shadow) else { panic!("it was made outside") };
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
    assert_ne!(shadow.with_shadow(|page| page.0), Some(0), "an old frame is still mapped");
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

/// Each way to break the core, the model that must fail for it, and what that must say.
const MUTANTS: &[(&str, &str, &str)] = &[
    ("free_at_once", "s_22_a_put_racing_a_walker", "used after it was freed"),
    ("free_at_once", "s_47_a_put_racing_exit", "used after it was freed"),
    ("one_bank", "s_80_a_put_racing_a_synchronize_of_somebody_else", "returned before the free"),
    ("freed_relaxed", "s_80_a_put_racing_a_synchronize_of_somebody_else", "returned before the free"),
    ("get_revives", "s_27_a_get_racing_the_last_put", "retired twice"),
    ("exit_peeks_relaxed", "s_48_s_50_unregister_racing_exit", "delisted, and nobody has released it"),
    ("delist_before_release", "s_48_s_50_unregister_racing_exit", "delisted, and nobody has released it"),
    ("register_waits_not", "s_66_s_69_a_registrar_racing_a_bracket", "a stale entry that nobody will invalidate"),
    ("first_relaxed", "s_66_s_69_a_registrar_racing_a_bracket", "Causality violation"),
    ("ends_whom_it_finds", "s_66_s_69_a_registrar_racing_a_bracket", "ends without starts"),
    (
        "get_trusts_the_unready",
        "s_66_a_second_getter_racing_a_bracket",
        "got while a bracket is open that does not know it",
    ),
    ("callback_without_seq", "b_25_an_interval_fault_racing_an_invalidation", "an old frame is still mapped"),
    (
        "remove_waits_not",
        "b_21_a_remove_racing_the_last_end",
        "the window closed and the interval is still in the tree",
    ),
    (
        "thaw_in_two_steps",
        "b_21_a_remove_racing_the_last_end",
        "the window closed and the interval is still in the tree",
    ),
    ("put_relaxed", "s_28_the_free_comes_after_every_putters_last_use", "Causality violation"),
    ("exit_relaxed", "s_40_release_sees_what_every_user_did", "Causality violation"),
    ("count_before_seq", "b_40_a_fault_racing_an_invalidation", "an old frame is still mapped"),
    ("zap_uncounted", "b_40_a_fault_racing_an_invalidation", "an old frame is still mapped"),
    ("snapshot_relaxed", "b_40_a_fault_racing_an_invalidation", "an old frame is still mapped"),
    ("end_relaxed", "b_40_a_fault_racing_an_invalidation", "an old frame is still mapped"),
    ("range_relaxed", "b_41_a_fault_racing_an_invalidation_and_one_elsewhere", "an old frame is still mapped"),
];

#[test]
fn every_mutant_is_caught() {
    let this = std::env::current_exe().unwrap();
    for (mutant, model, complaint) in MUTANTS {
        let run =
            std::process::Command::new(&this).env("MMUN_MUTANT", mutant).args(["--exact", model]).output().unwrap();
        // A panic while another one unwinds ends the process, and then what it said is on the other
        // stream.
        let says = [run.stdout, run.stderr].map(|stream| String::from_utf8_lossy(&stream).into_owned()).concat();
        assert!(says.contains("running 1 test"), "{model} is no model");
        assert!(!run.status.success(), "{model} passes although {mutant} breaks it");
        assert!(says.contains(complaint), "{model} fails for {mutant}, but not because \"{complaint}\": {says}");
    }
}
