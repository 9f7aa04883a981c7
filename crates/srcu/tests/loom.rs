//! Models, which check every interleaving and every allowed reordering of small programs, within
//! the bound on preemptions.
//!
//! `RUSTFLAGS="--cfg mmun_loom" cargo test -p srcu --release --test loom --target-dir target/loom`
//!
//! A model that cannot fail proves nothing. So each model has mutants, in which one fence, scan or
//! check is left out (`MMUN_MUTANT=no_fence_in_lock`). `mutants_are_caught` runs each model with
//! its mutants, and each run must fail. A full fence models the membarrier system call.
//! `docs/ordering.md` argues why this is correct.
#![cfg(mmun_loom)]
#![allow(missing_docs, reason = "tests")]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;
use srcu::Srcu;

fn model(preemptions: usize, f: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    // `LOOM_MAX_PREEMPTIONS` may allow more preemptions.
    builder.preemption_bound = Some(
        builder
            .preemption_bound
            .unwrap_or(preemptions)
            .max(preemptions),
    );
    builder.max_branches = 20_000;
    builder.check(f);
}

/// An object that readers find until it is unlinked. Its free is a write: `loom` reports a read
/// that is not ordered before the write.
struct Object {
    linked: AtomicBool,
    memory: UnsafeCell<bool>,
}

// SAFETY: Threads share `memory` on purpose, and `loom` checks that no two accesses race.
unsafe impl Sync for Object {}
// SAFETY: The same argument as for `Sync`.
unsafe impl Send for Object {}

impl Object {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            linked: AtomicBool::new(true),
            memory: UnsafeCell::new(true),
        })
    }

    /// Finds and uses the object, as a reader does in its section.
    fn read(&self) {
        if self.is_found() {
            self.use_found();
        }
    }

    fn is_found(&self) -> bool {
        self.linked.load(Ordering::Relaxed)
    }

    fn use_found(&self) {
        // SAFETY: This section found the object, so no thread may free it yet. The model checks
        // exactly this.
        let alive = self.memory.with(|memory| unsafe { *memory });
        assert!(alive, "a reader used a freed object");
    }

    fn unlink(&self) {
        self.linked.store(false, Ordering::Relaxed);
    }

    fn free(&self) {
        // SAFETY: No reader may use the object any more. The model checks exactly this.
        self.memory.with_mut(|memory| unsafe { *memory = false });
    }
}

#[test]
fn free_waits_for_reader() {
    model(3, || {
        let (srcu, object) = (Arc::new(Srcu::new()), Object::new());
        let reader = thread::spawn({
            let (srcu, object) = (srcu.clone(), object.clone());
            move || {
                let section = srcu.read_lock();
                object.read();
                section.unlock();
            }
        });
        object.unlink();
        srcu.synchronize().unwrap();
        object.free();
        reader.join().unwrap();
    });
}

#[test]
fn free_waits_for_both_nested_sections() {
    model(2, || {
        let (srcu, object) = (Arc::new(Srcu::new()), Object::new());
        let reader = thread::spawn({
            let (srcu, object) = (srcu.clone(), object.clone());
            move || {
                let outer = srcu.read_lock();
                let inner = srcu.read_lock();
                drop(outer);
                object.read();
                drop(inner);
            }
        });
        object.unlink();
        srcu.synchronize().unwrap();
        object.free();
        reader.join().unwrap();
    });
}

/// X = 1; synchronize; Y = 1. A section that sees Y must see X, in whichever order it reads them.
#[test]
fn s_85_a_section_sees_all_of_before_or_nothing_of_after() {
    for x_first in [false, true] {
        model(3, move || {
            let srcu = Arc::new(Srcu::new());
            let (x, y) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
            let reader = thread::spawn({
                let (srcu, x, y) = (srcu.clone(), x.clone(), y.clone());
                move || {
                    let section = srcu.read_lock();
                    let (seen_x, seen_y);
                    if x_first {
                        seen_x = x.load(Ordering::Relaxed);
                        seen_y = y.load(Ordering::Relaxed);
                    } else {
                        seen_y = y.load(Ordering::Relaxed);
                        seen_x = x.load(Ordering::Relaxed);
                    }
                    drop(section);
                    (seen_x, seen_y)
                }
            });
            x.store(1, Ordering::Relaxed);
            srcu.synchronize().unwrap();
            y.store(1, Ordering::Relaxed);
            assert_ne!(reader.join().unwrap(), (0, 1), "after without before");
        });
    }
}

/// A reader loads the bank before a grace period switches the banks, and counts in that bank
/// afterwards. The first grace period switches the banks because the model's main thread has a
/// section open at the first scan.
#[test]
fn s_86_a_late_reader_is_not_missed() {
    model(3, || {
        let (srcu, object) = (Arc::new(Srcu::new()), Object::new());
        let reader = thread::spawn({
            let (srcu, object) = (srcu.clone(), object.clone());
            move || {
                let section = srcu.read_lock();
                object.read();
                drop(section);
            }
        });
        let section = srcu.down_read();
        let cookie = srcu.start_poll();
        srcu.take_turn();
        drop(section);
        srcu.take_turn();
        let _ = srcu.poll(cookie);
        object.unlink();
        srcu.synchronize().unwrap();
        object.free();
        reader.join().unwrap();
    });
}

/// If a section begins after the sum of the beginnings, the scan must not take its end for the end
/// of an earlier section.
#[test]
fn a_later_section_does_not_stand_for_an_earlier_one() {
    model(4, || {
        let (srcu, object) = (Arc::new(Srcu::new()), Object::new());
        let reader = thread::spawn({
            let (srcu, object) = (srcu.clone(), object.clone());
            move || {
                let outer = srcu.read_lock();
                let found = object.is_found();
                drop(srcu.read_lock());
                if found {
                    object.use_found();
                }
                drop(outer);
            }
        });
        object.unlink();
        srcu.synchronize().unwrap();
        object.free();
        reader.join().unwrap();
    });
}

#[test]
fn grace_periods_are_shared() {
    model(2, || {
        let srcu = Arc::new(Srcu::new());
        let objects = [Object::new(), Object::new()];
        let updater = thread::spawn({
            let (srcu, object) = (srcu.clone(), objects[0].clone());
            move || {
                object.unlink();
                srcu.synchronize().unwrap();
                object.free();
            }
        });
        let reader = thread::spawn({
            let (srcu, objects) = (srcu.clone(), objects.clone());
            move || {
                let section = srcu.read_lock();
                objects[0].read();
                objects[1].read();
                drop(section);
            }
        });
        objects[1].unlink();
        srcu.synchronize().unwrap();
        objects[1].free();
        updater.join().unwrap();
        reader.join().unwrap();
    });
}

/// If no thread wakes a sleeper, `loom` reports a deadlock.
#[test]
fn a_wake_up_is_not_lost() {
    model(3, || {
        let srcu = Arc::new(Srcu::new());
        // SAFETY: The domain must outlive the guard. The reader drops its handle after the guard.
        let forever: &'static Srcu = unsafe { &*Arc::as_ptr(&srcu) };
        let section = forever.down_read();
        let reader = thread::spawn({
            let srcu = srcu.clone();
            move || {
                drop(section);
                drop(srcu);
            }
        });
        srcu.synchronize().unwrap();
        reader.join().unwrap();
    });
}

#[test]
fn a_handed_over_section_is_waited_for() {
    model(3, || {
        let (srcu, object) = (Arc::new(Srcu::new()), Object::new());
        // SAFETY: The domain must outlive the guard. Every thread drops its handle after the guard.
        let forever: &'static Srcu = unsafe { &*Arc::as_ptr(&srcu) };
        let section = forever.down_read();
        object.read();
        let other = thread::spawn({
            let (srcu, object) = (srcu.clone(), object.clone());
            move || {
                object.read();
                section.up_read();
                drop(srcu);
            }
        });
        object.unlink();
        srcu.synchronize().unwrap();
        object.free();
        other.join().unwrap();
    });
}

#[test]
fn a_barrier_waits_for_the_calls_of_both_threads() {
    model(2, || {
        let srcu = Arc::new(Srcu::new());
        let count = Arc::new(AtomicUsize::new(0));
        let call = |srcu: &Srcu, count: &Arc<AtomicUsize>| {
            let count = count.clone();
            srcu.call(move || {
                count.fetch_add(1, Ordering::Relaxed);
            });
        };
        let other = thread::spawn({
            let (srcu, count) = (srcu.clone(), count.clone());
            move || {
                call(&srcu, &count);
                srcu.barrier().unwrap();
                assert!(
                    count.load(Ordering::Relaxed) >= 1,
                    "the barrier missed its own thread's callback"
                );
            }
        });
        call(&srcu, &count);
        srcu.barrier().unwrap();
        assert!(
            count.load(Ordering::Relaxed) >= 1,
            "the barrier missed its own thread's callback"
        );
        other.join().unwrap();
        srcu.barrier().unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 2);
    });
}

/// The reader that ends its section must put the domain into the inbox again. Otherwise the batch
/// waits for ever.
#[test]
fn a_callback_waits_for_the_reader_and_is_not_forgotten() {
    model(3, || {
        let (srcu, object) = (Arc::new(Srcu::new()), Object::new());
        let reader = thread::spawn({
            let (srcu, object) = (srcu.clone(), object.clone());
            move || {
                let section = srcu.read_lock();
                object.read();
                drop(section);
            }
        });
        object.unlink();
        srcu.call({
            let object = object.clone();
            move || object.free()
        });
        srcu.barrier().unwrap();
        reader.join().unwrap();
    });
}

/// A `poll` that returns true orders memory accesses as `synchronize` does.
#[test]
fn a_polled_grace_period_waits_for_the_reader() {
    model(2, || {
        let (srcu, object) = (Arc::new(Srcu::new()), Object::new());
        let reader = thread::spawn({
            let (srcu, object) = (srcu.clone(), object.clone());
            move || {
                let section = srcu.read_lock();
                object.read();
                drop(section);
            }
        });
        let other = thread::spawn({
            let srcu = srcu.clone();
            move || srcu.synchronize().unwrap()
        });
        object.unlink();
        let cookie = srcu.start_poll();
        other.join().unwrap();
        if srcu.poll(cookie) {
            object.free();
        }
        reader.join().unwrap();
    });
}

/// The name of a mutant, a model that must fail with it, and a part of the failure's message.
const MUTANTS: &[(&str, &str, &str)] = &[
    (
        "no_fence_in_lock",
        "free_waits_for_reader",
        "Causality violation",
    ),
    (
        "no_heavy_fence",
        "a_polled_grace_period_waits_for_the_reader",
        "Causality violation",
    ),
    (
        "unlock_relaxed",
        "free_waits_for_reader",
        "Causality violation",
    ),
    (
        "unlock_relaxed",
        "a_handed_over_section_is_waited_for",
        "Causality violation",
    ),
    (
        "no_fence_in_lock",
        "a_callback_waits_for_the_reader_and_is_not_forgotten",
        "Causality violation",
    ),
    (
        "no_fence_in_unlock",
        "free_waits_for_both_nested_sections",
        "deadlock; threads",
    ),
    (
        "no_fence_in_lock",
        "s_85_a_section_sees_all_of_before_or_nothing_of_after",
        "after without before",
    ),
    (
        "no_heavy_fence",
        "grace_periods_are_shared",
        "Causality violation",
    ),
    (
        "one_bank",
        "s_86_a_late_reader_is_not_missed",
        "Causality violation",
    ),
    (
        "locks_before_unlocks",
        "a_later_section_does_not_stand_for_an_earlier_one",
        "Causality violation",
    ),
    (
        "joins_running_grace_period",
        "grace_periods_are_shared",
        "Causality violation",
    ),
    (
        "no_fence_in_snapshot",
        "grace_periods_are_shared",
        "Causality violation",
    ),
    (
        "no_fence_in_unlock",
        "a_wake_up_is_not_lost",
        "deadlock; threads",
    ),
    (
        "no_fence_before_sleep",
        "a_wake_up_is_not_lost",
        "deadlock; threads",
    ),
    (
        "no_fence_before_wake",
        "a_wake_up_is_not_lost",
        "deadlock; threads",
    ),
    (
        "no_fence_after_announcement",
        "a_wake_up_is_not_lost",
        "deadlock; threads",
    ),
    (
        "no_look_after_announcement",
        "a_wake_up_is_not_lost",
        "deadlock; threads",
    ),
    (
        "moved_not_counted",
        "a_handed_over_section_is_waited_for",
        "Causality violation",
    ),
    (
        "idle_ignores_busy",
        "a_barrier_waits_for_the_calls_of_both_threads",
        "the barrier missed",
    ),
    (
        "scheduled_cleared_late",
        "a_barrier_waits_for_the_calls_of_both_threads",
        "deadlock; threads",
    ),
    (
        "no_fence_in_unlock",
        "a_callback_waits_for_the_reader_and_is_not_forgotten",
        "deadlock; threads",
    ),
    (
        "joins_running_grace_period",
        "a_polled_grace_period_waits_for_the_reader",
        "Causality violation",
    ),
];

#[test]
fn mutants_are_caught() {
    let me = std::env::current_exe().unwrap();
    for (mutant, model, complaint) in MUTANTS {
        let mut command = std::process::Command::new(&me);
        let run = command
            .args(["--exact", model])
            .env("MMUN_MUTANT", mutant)
            .env("RUST_BACKTRACE", "0")
            .output()
            .unwrap();
        // A second panic during a panic ends the process, and then the message is on stderr instead
        // of stdout.
        let says = [run.stdout, run.stderr]
            .map(|stream| String::from_utf8_lossy(&stream).into_owned())
            .concat();
        assert!(says.contains("running 1 test"), "there is no model {model}");
        assert!(
            !run.status.success(),
            "{model} passes although {mutant} breaks it"
        );
        assert!(
            says.contains(complaint),
            "{model} fails for {mutant}, but not because \"{complaint}\": {says}"
        );
    }
}
