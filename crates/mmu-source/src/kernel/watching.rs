//! Watches of the `kernel` source. The BPF program counts a change; the thread that takes in the
//! record of the change marks the watch.

use super::ring::glimpse;
use super::sys::Glance;
use super::{Armed, Kernel};
use crate::Error;
use crate::watch_table::{Id, Word, enter};
use mmu_notifier::VaRange;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// An armed range, its entry in the table of watches, and the word that an event marks.
#[derive(Debug)]
pub(crate) struct Watching {
    glance: Glance,
    word: Arc<Word>,
    /// Events up to this generation began before the watch was made or renewed.
    base: u64,
    id: Id,
    armed: Armed,
}

impl Kernel {
    fn enter(&self, range: VaRange, base: u64, word: &Arc<Word>) -> Option<Id> {
        // `with_intake` gives no table to the child of a fork, or to a signal handler that has
        // interrupted the source.
        enter(
            |f| self.inner.with_intake(|intake, _| f(&mut intake.watches)),
            range,
            base,
            word,
        )
    }
}

impl Watching {
    /// See [`Kernel::watch`].
    pub(crate) fn new(kernel: &Arc<Kernel>, range: VaRange) -> Result<Self, Error> {
        let watching = Self::enter(kernel, range)?;
        // A change that begins from here on marks the watch. Changes that began before are over
        // when this wait returns.
        kernel.wait()?;
        Ok(watching)
    }

    /// See [`Kernel::watch_at_once`].
    pub(crate) fn enter(kernel: &Arc<Kernel>, range: VaRange) -> Result<Self, Error> {
        let inner = &kernel.inner;
        if inner.is_inherited() {
            return Err(Error::AfterFork { source: "kernel" });
        }
        let word = Arc::new(Word::default());
        let inside = || Error::InCallback { source: "kernel" };
        let glance =
            inner.with_intake(|intake, _| intake.ring.glance(&inner.header, &inner.progress));
        let glance = glance.ok_or_else(inside)?;
        // In this order, each change that the filter lets pass from here on has a number above
        // `base`, and its record is taken in when the table has the watch.
        let base = kernel.generation();
        let id = kernel.enter(range, base, &word).ok_or_else(inside)?;
        let armed = Armed::enter(kernel, range)?;
        Ok(Watching {
            glance,
            word,
            base,
            id,
            armed,
        })
    }

    #[inline]
    pub(crate) fn is_valid(&self) -> bool {
        // ORDER(source-generation): Acquire: the caller's reads through its translation come
        // before the load of the generation.
        fence(Ordering::Acquire);
        if !self.glance.is_current() {
            rarely();
            if !self.nothing_else_touched() {
                return false;
            }
        }
        !self.word.is_touched()
    }

    /// Returns true if every event that has not been taken in is outside of the range. If reading
    /// the ring cannot decide that, takes these events in, which marks the word if one of them is
    /// inside, and tells whether that succeeded.
    #[inline(never)]
    fn nothing_else_touched(&self) -> bool {
        let seen = glimpse(&self.glance, self.armed.range(), self.base);
        seen.unwrap_or_else(|| self.armed.kernel.inner.catch_up())
    }

    pub(crate) fn renew(&mut self) -> Result<(), Error> {
        self.clear().inspect_err(|_| self.word.touch())?;
        // A change that began before may still be under way, so wait for it.
        self.armed.kernel.wait().inspect_err(|_| self.word.touch())
    }

    /// Clears the word: events so far no longer count.
    fn clear(&mut self) -> Result<(), Error> {
        let kernel = &self.armed.kernel;
        if kernel.inner.is_inherited() {
            return Err(Error::AfterFork { source: "kernel" });
        }
        let base = kernel.generation();
        let renewed = kernel
            .inner
            .with_intake(|intake, _| intake.watches.renew(&self.id, base));
        renewed.ok_or(Error::InCallback { source: "kernel" })?;
        self.base = base;
        Ok(())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // Free the word outside of the lock. In the child of a fork the table belongs to the parent
        // and is left unchanged.
        let word = self
            .armed
            .kernel
            .inner
            .with_intake(|intake, _| intake.watches.remove(&self.id));
        drop(word);
    }
}

/// Marks the calling branch as unlikely. The likely branch then has no jump, which saves half a
/// nanosecond for each call of `is_valid`.
#[cold]
fn rarely() {}
