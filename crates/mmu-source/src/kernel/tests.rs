//! Runs the program on request, which needs no virtual machine.

use super::*;
use crate::kernel::layout::dirty::{MANY, WAITING};
use crate::testkit::{Cap, require};
use mmu_notifier::{InvalidateRange, Notifier, Registration, Va};
use std::sync::{PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

fn range(start: u64, len: u64) -> VaRange {
    VaRange::covering(Va::new(start), len).expect("a range")
}

/// Tells whether an event counts as a hit.
fn hits(kernel: &Kernel, range: VaRange) -> bool {
    let before = kernel.generation();
    kernel
        .inject(range.start().get(), range.end().map_or(0, Va::get))
        .expect("the program runs");
    kernel.generation() != before
}

#[test]
fn the_filter_finds_overlapping_ranges_and_few_others() {
    if !require(Cap::Bpf) {
        return;
    }
    let kernel = Kernel::rehearse(1 << 18).expect("BPF works here");
    const AT: u64 = 0x7f12_3456_7000;
    assert!(!hits(&kernel, range(AT, 4096)), "nothing is armed");
    let sizes = (0..32)
        .map(|power| 4096 << power)
        .chain([5 << 12, 17 << 12, (1 << 30) + 4096]);
    for size in sizes {
        let armed = kernel.arm(range(AT, size)).expect("it can be armed");
        for event in (0..36).map(|power| 4096_u64 << power) {
            for start in [AT, AT + size - 4096, AT.saturating_sub(event) + 4096] {
                assert!(
                    hits(&kernel, range(start & !4095, event)),
                    "event of {event:#x} at {start:#x}, armed {size:#x}"
                );
            }
        }
        assert!(hits(&kernel, VaRange::ALL));
        assert!(
            !hits(&kernel, range(AT + size + (1 << 44), 4096)),
            "far away from {size:#x}"
        );
        assert!(
            size > 16 << 12 || !hits(&kernel, range(AT - 4096, 4096)),
            "the page before {size:#x}"
        );
        drop(armed);
        assert!(!hits(&kernel, range(AT, size)), "disarmed");
    }
    let everything = kernel.arm(VaRange::ALL).expect("it can be armed");
    assert!(hits(&kernel, range(0x1000, 1)));
    drop(everything);
    _ = kernel.settle().expect("no fork");
    assert!(kernel.is_settled() && kernel.lost() == 0);
}

/// While a thread waits, a change that is older than the wait may be under way. An event of another
/// thread must not say that only that thread has made changes. In a child, because events of other
/// threads leave no mark.
#[test]
fn an_event_during_a_wait_belongs_to_no_thread() {
    if !(require(Cap::Bpf) && require(Cap::Kvm)) {
        return;
    }
    assert!(crate::testkit::in_child(|| {
        let kernel = Kernel::start().expect("it starts");
        let page = sys::Scratch::map().expect("memory");
        let dirty = kernel.inner.header.u64(header::DIRTY);
        let mut marks = (0..1_000).filter_map(|_| {
            drop(kernel.arm(range(page.address(), 4096)).expect("armed"));
            sys::ask(&page);
            let mark = dirty.load(Ordering::Relaxed);
            (mark > WAITING as u64 && mark != MANY as u64).then_some(mark)
        });
        if marks.next().is_none() {
            let (waits, machines) = kernel.waits();
            println!("SKIP: {waits} waits made {machines} machines: the count cannot be read");
            return waits == machines;
        }
        dirty.store(WAITING as u64, Ordering::Relaxed);
        sys::ask(&page);
        dirty.load(Ordering::Relaxed) == MANY as u64
    }));
}

/// The listener must wake although another thread has taken the records in.
#[test]
fn records_that_a_watch_takes_in_are_told_without_further_records() {
    if !require(Cap::Bpf) {
        return;
    }
    const AT: u64 = 0x5900_0000_0000;
    const OTHER: u64 = AT + (1 << 30);
    let kernel = Kernel::rehearse(1 << 18).expect("BPF works here");
    let watch = kernel.watch(range(AT, 4096)).expect("it can be armed");
    let _armed = kernel.arm(range(OTHER, 4096)).expect("it can be armed");
    let inner = Arc::clone(&kernel.inner);
    let rounds = kernel.rehearsal(move |inject| {
        let end = Instant::now() + Duration::from_secs(60);
        let is_told = |_: &u32| {
            // The listener sleeps, or is about to.
            let asleep = || inner.header.u64(header::AWAKE).load(Ordering::Relaxed) == 0;
            crate::wait::until(|| asleep() || Instant::now() > end);
            // More records than a check examines in the ring.
            (0..6).for_each(|_| inject(OTHER, OTHER + 4096).expect("it runs"));
            inner.catch_up();
            crate::wait::until(|| inner.is_caught_up() || Instant::now() > end);
            inner.is_caught_up()
        };
        (0..200).take_while(is_told).count()
    });
    assert_eq!(rounds, 200);
    assert!(watch.is_valid());
}

/// On this kernel no run may be skipped, as far as its release says. But it may have the change of
/// Linux 7.0 nevertheless.
#[test]
fn an_idle_source_asks_for_skipped_runs_whatever_the_release_of_the_kernel() {
    if !require(Cap::Bpf) {
        return;
    }
    let kernel = Kernel::rehearse(1 << 18).expect("BPF works here");
    let watch = kernel.watch(range(0x5a00_0000_0000, 4096)).expect("armed");
    // As if one run had been skipped and the count were read for the first time.
    kernel.inner.missed.store(1, Ordering::Relaxed);
    let end = Instant::now() + Duration::from_secs(60);
    crate::wait::until(|| !watch.is_valid() || Instant::now() > end);
    assert!(!watch.is_valid());
    assert_eq!(kernel.inner.missed.load(Ordering::Relaxed), 0);
}

/// Without address space randomisation, another process may have a page at the same address.
#[test]
fn a_question_at_the_same_address_in_another_process_changes_no_mark() {
    if !(require(Cap::Bpf) && require(Cap::Kvm)) {
        return;
    }
    assert!(crate::testkit::in_child(|| {
        let kernel = Kernel::start().expect("it starts");
        kernel.wait_for_threads();
        let waits = &kernel.inner.waits;
        let page = sys::Scratch::map().expect("memory");
        let arm = || drop(kernel.arm(range(page.address(), 4096)).expect("armed"));
        // The wait that makes B asks no question, so the child's is the first.
        let is_first = (0..5).any(|_| {
            crate::wait::until(|| !waits.has_b());
            arm();
            let has_asked = || {
                let own = Kernel::start().expect("it starts");
                sys::ask(&waits.scratch);
                !own.is_inherited()
            };
            crate::testkit::in_child(has_asked) && waits.has_b()
        });
        if !is_first {
            println!("SKIP: no machine stayed for so long, or the count cannot be read");
            return true;
        }
        (0..20_000).any(|_| {
            sys::ask(&page);
            let before = kernel.waits().0;
            arm();
            kernel.waits().0 == before
        })
    }));
}

/// Another thread may take in the loss between the two counts of `note_loss`.
#[test]
fn a_loss_that_is_noted_while_another_thread_takes_in_is_handled() {
    if !require(Cap::Bpf) {
        return;
    }
    let kernel = Kernel::rehearse(1 << 18).expect("BPF works here");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let target = kernel.generation();
                let inner = &kernel.inner;
                inner.with_intake(|intake, words| intake.run(words, target));
            }
        });
        let end = Instant::now() + Duration::from_secs(60);
        let is_handled = |_| {
            kernel.inner.note_loss();
            let target = kernel.generation();
            while kernel.inner.handled() < target && Instant::now() < end {
                kernel.inner.hand_on(target);
            }
            kernel.inner.handled() >= target
        };
        let are_handled = (0..50_000).all(is_handled);
        stop.store(true, Ordering::Relaxed);
        assert!(are_handled);
    });
}

#[test]
fn a_wait_before_the_first_range_does_not_replace_the_wait_of_that_range() {
    if !require(Cap::Bpf) {
        return;
    }
    let kernel = Kernel::rehearse(1 << 18).expect("BPF works here");
    let _ = kernel.read_begin().expect("no fork");
    let (before, _) = kernel.waits();
    let armed = kernel.arm(range(0x1000, 4096)).expect("it can be armed");
    assert_eq!(kernel.waits().0, before + 1, "arming waited");
    let _ = armed.read_begin().expect("no fork");
    drop(kernel.arm(range(0x2000, 4096)).expect("it can be armed"));
    assert_eq!(kernel.waits().0, before + 1, "no event came in between");
}

#[test]
fn a_wait_that_has_interrupted_one_of_its_own_thread_is_refused() {
    if !require(Cap::Bpf) {
        return;
    }
    let kernel = Kernel::rehearse(1 << 18).expect("BPF works here");
    let interrupted = kernel.inner.waits.lock();
    assert!(interrupted.is_some());
    let at = range(0x5500_0000_0000, 4096);
    assert!(matches!(kernel.arm(at), Err(Error::InCallback { .. })));
    assert!(matches!(kernel.watch(at), Err(Error::InCallback { .. })));
    thread::scope(|scope| {
        let other = scope.spawn(|| kernel.arm(at).is_ok());
        drop(interrupted);
        assert!(other.join().expect("no panic"), "another thread waits");
    });
    assert!(kernel.arm(at).is_ok());
}

/// Another thread changes the range while its watch is made. The change is counted only if the
/// filter lets it pass, so only if it begins after the range was armed.
#[test]
fn a_change_that_begins_while_a_watch_is_made_marks_it() {
    if !require(Cap::Bpf) {
        return;
    }
    const AT: u64 = 0x5900_0000_0000;
    const ROUNDS: u64 = 2_000;
    let kernel = Kernel::rehearse(1 << 18).expect("BPF works here");
    let (begun, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (begin, done) = (Arc::clone(&begun), Arc::clone(&over));
    thread::scope(|scope| {
        scope.spawn(|| {
            kernel.rehearsal(move |inject| {
                for round in 1..=ROUNDS {
                    crate::wait::until(|| begin.load(Ordering::Acquire) >= round);
                    inject(AT, AT + 4096).expect("the program runs");
                    done.store(round, Ordering::Release);
                }
            });
        });
        // The other thread must not wait for ever if this thread panics.
        let _released = Released(&begun, ROUNDS);
        let mut delay = 100_u32;
        for round in 1..=ROUNDS {
            let before = kernel.generation();
            begun.store(round, Ordering::Release);
            (0..delay).for_each(|_| std::hint::spin_loop());
            let watch = kernel.watch_at_once(range(AT, 4096)).expect("a watch");
            crate::wait::until(|| over.load(Ordering::Acquire) == round);
            let is_counted = kernel.generation() != before;
            crate::wait::until(|| kernel.settle().is_ok() && kernel.is_settled());
            let is_valid = watch.is_valid();
            // So the two happen at about the same time in most rounds.
            delay = match is_counted {
                true => delay + 4,
                false => delay.saturating_sub(4),
            };
            assert!(
                !(is_counted && is_valid),
                "round {round}: the change was missed"
            );
        }
    });
}

/// Stores a number when it is dropped.
struct Released<'a>(&'a AtomicU64, u64);

impl Drop for Released<'_> {
    fn drop(&mut self) {
        self.0.store(self.1, Ordering::Release);
    }
}

/// Makes another change of armed memory in each callback, up to `left` times.
struct Feeds {
    kernel: std::sync::Weak<Kernel>,
    at: u64,
    left: AtomicU64,
}

impl Notifier for Feeds {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        if range.range().start().get() == self.at
            && self
                .left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    left.checked_sub(1)
                })
                .is_ok()
            && let Some(kernel) = self.kernel.upgrade()
        {
            kernel
                .inject(self.at, self.at + 4096)
                .expect("the program runs");
        }
    }
}

#[test]
fn changes_that_never_end_hold_no_thread_up() {
    if !require(Cap::Bpf) {
        return;
    }
    const AT: u64 = 0x5600_0000_0000;
    const MANY: u64 = 100_000;
    let kernel = Kernel::rehearse(1 << 18).expect("BPF works here");
    let feeds = Feeds {
        kernel: Arc::downgrade(&kernel),
        at: AT,
        left: AtomicU64::new(MANY),
    };
    let feeds = Registration::new(&crate::current(), feeds).expect("outside of brackets");
    let armed = kernel.arm(range(AT, 4096)).expect("it can be armed");
    kernel.inject(AT, AT + 4096).expect("the program runs");
    let Settled(generation) = kernel.settle().expect("no fork");
    assert!(kernel.inner.handled() >= generation);
    assert!(!kernel.drain().refused);
    assert!(
        feeds.left.swap(0, Ordering::Relaxed) > 0,
        "it has not waited for the last one"
    );
    drop((armed, kernel));
    assert!(feeds.unregister().is_ok());
}

/// A subscriber whose callback for the page at `at` waits for `gate`.
struct Slow {
    at: u64,
    gate: Mutex<()>,
}

impl Notifier for Slow {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        if range.range().start().get() == self.at {
            drop(self.gate.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

#[test]
fn no_thread_waits_for_callbacks_that_came_later() {
    if !require(Cap::Bpf) {
        return;
    }
    const AT: u64 = 0x5700_0000_0000;
    let kernel = Kernel::rehearse(1 << 18).expect("BPF works here");
    let slow = Slow {
        at: AT + 4096,
        gate: Mutex::new(()),
    };
    let slow = Registration::new(&crate::current(), slow).expect("outside of brackets");
    let _armed = kernel.arm(range(AT, 8192)).expect("it can be armed");
    let gate = slow.gate.lock().expect("no panic");
    kernel.inject(AT, AT + 4096).expect("the program runs");
    kernel
        .inject(AT + 4096, AT + 8192)
        .expect("the program runs");
    thread::scope(|scope| {
        scope.spawn(|| kernel.settle().expect("no fork"));
        crate::wait::until(|| kernel.inner.handled() >= 2);
        let (tell, told) = mpsc::channel();
        scope.spawn(|| {
            kernel.inner.settle(2);
            let _ = tell.send(());
            drop(tell);
        });
        let in_time = told.recv_timeout(Duration::from_secs(60));
        assert!(kernel.inner.handled() < 3);
        drop(gate);
        assert_eq!(in_time, Ok(()), "the first change was handed on long ago");
    });
    assert!(slow.unregister().is_ok());
}

/// Counts the callbacks that run on one thread.
struct CountsOn(thread::ThreadId, AtomicU64);

impl Notifier for CountsOn {
    fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
        let is_there = thread::current().id() == self.0;
        self.1.fetch_add(u64::from(is_there), Ordering::Relaxed);
    }
}

/// A signal handler may check a watch, and it may have interrupted any code of its thread.
#[test]
fn a_watch_answers_without_a_callback_whatever_its_thread_has_locked() {
    if !require(Cap::Bpf) {
        return;
    }
    const AT: u64 = 0x5800_0000_0000;
    const OTHER: u64 = AT + (1 << 30);
    let kernel = Kernel::rehearse(1 << 18).expect("BPF works here");
    let counts = CountsOn(thread::current().id(), AtomicU64::new(0));
    let counts = Registration::new(&crate::current(), counts).expect("outside of brackets");
    let watch = kernel.watch(range(AT, 4096)).expect("it can be armed");
    let other = kernel.watch(range(OTHER, 4096)).expect("it can be armed");
    let handing = kernel.inner.handing.lock();
    let waiting = kernel.inner.waits.lock();
    // More changes than the check examines in the ring, so that it takes them in.
    for _ in 0..100 {
        kernel.inject(OTHER, OTHER + 4096).expect("it runs");
    }
    crate::wait::until(|| watch.is_valid());
    assert!(!other.is_valid() && !kernel.is_settled());
    kernel.inject(AT, AT + 4096).expect("it runs");
    kernel.inner.with_intake(|_, _| {
        assert!(!watch.is_valid() && !kernel.is_settled());
        assert!(matches!(kernel.settle(), Err(Error::InCallback { .. })));
    });
    drop((handing, waiting));
    assert!(!watch.is_valid());
    let ran = counts.1.load(Ordering::Relaxed);
    _ = kernel.settle().expect("no fork");
    drop((watch, other, kernel));
    assert!(counts.unregister().is_ok() && ran == 0);
}
