//! Passes records to subscribers in order, and publishes the generation up to which it has done so.

use super::busy::{self, Flag};
use super::intake::{Intake, Told, Words};
use super::layout::{awake, header};
use super::{Inner, Kernel};
use crate::current_mm::current_ref;
use mmu_notifier::Event;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{MutexGuard, TryLockError};
use std::thread;

/// How often a watch tries to take in the records before it counts as not valid.
const TRIES: usize = 200;

impl Kernel {
    /// Tells whether this thread is passing on this source's records. So a callback can find out
    /// whether this source has called it, or a bracket that another source or the program opened.
    ///
    /// If a callback of this source opens a bracket, the callbacks of that bracket count as called
    /// by this source.
    #[must_use]
    #[inline]
    pub fn is_telling() -> bool {
        busy::is_telling()
    }
}

/// What one call of `hand_on` did.
#[derive(Debug, Default)]
pub(super) struct Turn {
    pub(super) ranges: usize,
    pub(super) lost: bool,
}

/// The counts by which [`Kernel::is_settled`](super::Kernel::is_settled) answers. Asking these is
/// two loads less, in two cache lines and pages less.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Counts<'a> {
    handled: &'a AtomicU64,
    generation: &'a AtomicU64,
}

impl Counts<'_> {
    /// The same as [`Kernel::is_settled`](super::Kernel::is_settled).
    #[must_use]
    #[inline]
    pub fn is_settled(&self) -> bool {
        // ORDER(source-handled): Acquire, as in `Inner::handled`. Partner: the store in `hand_on`.
        let handled = self.handled.load(Ordering::Acquire);
        // ORDER(source-generation): Acquire, as in `Inner::generation`. Partner: the program's
        // addition.
        handled >= self.generation.load(Ordering::Acquire)
    }
}

impl Inner {
    fn words(&self) -> Words<'_> {
        Words {
            generation: self.header.u64(header::GENERATION),
            lost: self.header.u64(header::LOST),
            marked: &self.progress.marked,
            position: &self.progress.position,
        }
    }

    fn marked(&self) -> u64 {
        // ORDER(source-marked): Acquire, for the words of the watches. Partner: the store in
        // `Intake::publish`.
        self.progress.marked.load(Ordering::Acquire)
    }

    #[inline]
    pub(super) fn handled(&self) -> u64 {
        // ORDER(source-handled): Acquire, for the effects of the callbacks. Partner: the store in
        // `hand_on`.
        self.progress.handled.load(Ordering::Acquire)
    }

    /// Runs `f` on the consumer of the ring. Returns `None` in a signal handler that has
    /// interrupted the consumer, and in the child of a fork.
    pub(super) fn with_intake<R>(&self, f: impl FnOnce(&mut Intake, Words<'_>) -> R) -> Option<R> {
        let _taking = Flag::set(Flag::TAKING)?;
        if self.is_inherited() {
            return None;
        }
        let mut intake = self
            .intake
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        Some(f(&mut intake, self.words()))
    }

    /// Takes in the records so far. Returns false if it would have to wait for another thread, in a
    /// signal handler that has interrupted the source, and in the child of a fork.
    #[cold]
    pub(super) fn catch_up(&self) -> bool {
        let Some(_taking) = Flag::set(Flag::TAKING) else {
            return false;
        };
        if self.is_inherited() {
            return false;
        }
        let target = self.generation();
        for _ in 0..TRIES {
            if let Some(mut intake) = try_lock(&self.intake) {
                intake.run(self.words(), target);
            }
            if self.marked() >= target {
                return true;
            }
            // Another thread holds the lock, or another processor has not written its record yet.
            std::hint::spin_loop();
        }
        false
    }

    /// Passes records on, up to a generation. Returns `None` if a thread is already doing so:
    /// another one, or this one if the caller is a callback or a signal handler.
    pub(super) fn hand_on(&self, target: u64) -> Option<Turn> {
        let telling = Flag::set(Flag::TELLING)?;
        let handing = try_lock(&self.handing)?;
        let mut turn = Turn::default();
        while self.handled() < target {
            let told = self
                .with_intake(|intake, words| take(intake, words, target))
                .flatten();
            let Some(told) = told else { break };
            drop(current_ref().invalidate(told.range, Event::Clear));
            if self.is_inherited() {
                // The callback has forked, and this process is the child. A store below would be
                // for the parent's records.
                break;
            }
            turn.ranges += usize::from(!told.is_loss);
            turn.lost |= told.is_loss;
            // ORDER(source-handled): Release: the callbacks have run before this store. Partner:
            // the load in `handled`. If weaker, a client could use an entry that a callback is
            // about to remove.
            self.progress.handled.store(told.upto, Ordering::Release);
        }
        drop(handing);
        drop(telling);
        Some(turn)
    }

    /// Passes on all generations up to `generation`, or waits until another thread has done so. The
    /// caller has checked [`busy::is_inside`].
    pub(super) fn settle(&self, generation: u64) {
        // Retry: the program may have counted the generation on another processor and not yet
        // written its record. Do not wait for the lock: its holder continues with later records,
        // and may have passed on `generation` long ago.
        crate::wait::until(|| {
            self.hand_on(generation);
            self.handled() >= generation || self.is_inherited()
        });
    }

    #[inline]
    pub(super) fn is_caught_up(&self) -> bool {
        self.counts().is_settled()
    }

    pub(super) fn counts(&self) -> Counts<'_> {
        Counts {
            handled: &self.progress.handled,
            generation: self.header.u64(header::GENERATION),
        }
    }

    /// The body of the source's own thread, which runs callbacks when no client drains. If the
    /// source is stopped while callbacks run, the thread ends after the last record that it was
    /// woken for.
    pub(super) fn tell(&self) {
        loop {
            thread::park();
            // ORDER(source-stop): Acquire. Partner: the store in the drop of `Kernel`.
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let target = self.generation();
            self.hand_on(target);
        }
    }

    /// Records how often the kernel has skipped the program so far. Reports one loss if that count
    /// has changed.
    pub(super) fn note_missed(&self, missed: u64) {
        if self.missed.swap(missed, Ordering::Relaxed) != missed {
            self.note_loss();
        }
    }

    /// Marks all watches and invalidates everything, because changes may have happened that were
    /// not counted.
    pub(super) fn note_loss(&self) {
        self.with_intake(|intake, words| intake.everything(words));
        // Count a generation for the loss. Otherwise all generations would count as handled
        // already, and no thread would run the callbacks of the loss.
        self.header
            .u64(header::GENERATION)
            .fetch_add(1, Ordering::Relaxed);
        // ORDER(source-lost): Release, as in the program: the generation is counted before the
        // loss. Otherwise a thread that takes in records could handle the loss without its
        // generation, and nothing would ever handle that generation. Partner:
        // `Intake::look_for_losses`.
        self.header
            .u64(header::LOST)
            .fetch_add(1, Ordering::Release);
        self.wake_teller();
    }

    /// Asks the program to wake the listener at the next record. Returns false if there are records
    /// that have not been passed on.
    pub(super) fn wants_a_call(&self) -> bool {
        // The ring must be released before the program may take the call: see `Ring::release`.
        self.with_intake(|intake, words| intake.ring.release(words.position));
        // ORDER(source-called): Release: the ring has been released before this store. Partner: the
        // program's exchange.
        self.header
            .u64(header::AWAKE)
            .store(awake::NO, Ordering::Release);
        // ORDER(source-awake): full fence between the store of `AWAKE` and the load of the
        // generation. Partner: the program, which counts the generation (a full barrier) and then
        // loads `AWAKE`. If this store comes first, the program sends a wake-up. If the program's
        // count comes first, the load here sees it. Without the fence, both sides could miss the
        // other's store, and the record would have to wait.
        fence(Ordering::SeqCst);
        self.is_caught_up()
    }
}

fn take(intake: &mut Intake, words: Words<'_>, target: u64) -> Option<Told> {
    intake.run(words, target);
    intake.pop()
}

fn try_lock<T>(lock: &std::sync::Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match lock.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}
