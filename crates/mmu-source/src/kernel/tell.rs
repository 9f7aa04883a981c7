//! Handing records on to subscribers, in order, and knowing up to where that has been done.

use super::busy::{self, Flag};
use super::intake::{Intake, Told, Words};
use super::layout::header;
use super::{Inner, Kernel};
use crate::current_mm::current_ref;
use mmu_notifier::Event;
use std::sync::atomic::{Ordering, fence};
use std::sync::{MutexGuard, TryLockError};
use std::thread;

/// How often a watch tries to have the records taken in before it answers that it does not know.
const TRIES: usize = 200;

impl Kernel {
    /// Tells whether this thread is handing on what the kernel has told: whether a callback that
    /// asks was called by this source, and not by a bracket that another source or the program has
    /// opened.
    ///
    /// A bracket that a callback of this source opens counts as this source's.
    #[must_use]
    #[inline]
    pub fn is_telling() -> bool {
        busy::is_telling()
    }
}

/// What one turn of handing on did.
#[derive(Debug, Default)]
pub(super) struct Turn {
    pub(super) ranges: usize,
    pub(super) lost: bool,
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
        // ORDER(source-handled): Acquire, for what the callbacks did. Partner: the store in
        // `hand_on`.
        self.progress.handled.load(Ordering::Acquire)
    }

    /// Runs `f` on the consumer of the ring; `None` in a signal handler that has interrupted that,
    /// or in the child of a fork.
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

    /// Takes in what there is up to now, without waiting for another thread. False if that could
    /// not be done.
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
            // Another thread has the lock, or another processor is about to write its record.
            std::hint::spin_loop();
        }
        false
    }

    /// Hands on what there is, up to a generation, unless another thread does.
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
                // The callback has forked, and this is the child. What it does from here on would
                // be done to the parent's words.
                break;
            }
            turn.ranges += usize::from(!told.is_loss);
            turn.lost |= told.is_loss;
            // ORDER(source-handled): Release: the callbacks have run. Partner: the load in
            // `handled`. If weaker, a client takes an entry for good that a callback is about to
            // take out.
            self.progress.handled.store(told.upto, Ordering::Release);
        }
        drop(handing);
        drop(telling);
        Some(turn)
    }

    /// Hands on all generations up to this one, or waits until they are. The caller has asked
    /// [`busy::is_inside`].
    pub(super) fn settle(&self, generation: u64) {
        // Once more if the program has counted the generation on another processor and is about to
        // write its record. No thread waits for the lock itself: its holder proceeds, and
        // may have handed on what is asked for here long before.
        crate::wait::until(|| {
            self.hand_on(generation);
            self.handled() >= generation || self.is_inherited()
        });
    }

    pub(super) fn is_caught_up(&self) -> bool {
        self.handled() >= self.generation()
    }

    /// The thread that runs callbacks when no client looks. It ends after the callback in which the
    /// source was stopped.
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

    /// Takes note of how often the program was skipped so far: each time is a loss.
    pub(super) fn note_missed(&self, missed: u64) {
        if self.missed.swap(missed, Ordering::Relaxed) != missed {
            self.note_loss();
        }
    }

    /// Marks all watches and has everything invalidated: changes may have gone by uncounted.
    pub(super) fn note_loss(&self) {
        self.with_intake(|intake, words| intake.everything(words));
        // No generation was counted for the loss, so no thread would look for it.
        self.header
            .u64(header::LOST)
            .fetch_add(1, Ordering::Relaxed);
        self.header
            .u64(header::GENERATION)
            .fetch_add(1, Ordering::Relaxed);
        self.wake_teller();
    }

    /// Asks the program to wake the listener at the next record; false if there are records
    /// already.
    pub(super) fn wants_a_call(&self) -> bool {
        self.header.u64(header::AWAKE).store(0, Ordering::Relaxed);
        // ORDER(source-awake): full fence between the word and the look at the generation. Partner:
        // the program, which counts the generation (a full barrier) and then looks at the word.
        // If weaker, a record wakes no thread and no thread sees it.
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
