//! Watches that the kernel marks.

use super::ring::glimpse;
use super::sys::Glance;
use super::{Armed, Kernel};
use crate::Error;
use crate::watch_table::{Id, Word, enter};
use mmu_notifier::VaRange;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// A range that is armed, a place in the table of watches, and the word that is marked.
#[derive(Debug)]
pub(crate) struct Watching {
    glance: Glance,
    word: Arc<Word>,
    /// Events up to this one began before the watch.
    base: u64,
    id: Id,
    armed: Armed,
}

impl Kernel {
    fn enter(&self, range: VaRange, base: u64, word: &Arc<Word>) -> Option<Id> {
        // A signal handler that has interrupted the source, and a child, get no table.
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
        let armed = Armed::enter(kernel, range)?;
        let word = Arc::new(Word::default());
        let base = kernel.generation();
        let inside = || Error::InCallback { source: "kernel" };
        let id = kernel.enter(range, base, &word).ok_or_else(inside)?;
        let inner = &kernel.inner;
        let glance =
            inner.with_intake(|intake, _| intake.ring.glance(&inner.header, &inner.progress));
        let glance = glance.ok_or_else(inside)?;
        let watching = Watching {
            glance,
            word,
            base,
            id,
            armed,
        };
        // What begins from here on marks the watch; what began before is over after this.
        kernel.wait()?;
        Ok(watching)
    }

    #[inline]
    pub(crate) fn is_valid(&self) -> bool {
        // ORDER(source-generation): Acquire: what the caller has read through its entry comes
        // before the look at the generation.
        fence(Ordering::Acquire);
        if !self.glance.is_current() {
            rarely();
            if !self.nothing_else_touched() {
                return false;
            }
        }
        !self.word.is_touched()
    }

    /// Whether the events that have not been taken in are all elsewhere, or have been taken in now.
    #[inline(never)]
    fn nothing_else_touched(&self) -> bool {
        let seen = glimpse(&self.glance, self.armed.range(), self.base);
        seen.unwrap_or_else(|| self.armed.kernel.inner.catch_up())
    }

    pub(crate) fn renew(&mut self) -> Result<(), Error> {
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
        // Something may be under way that began before.
        kernel.wait().inspect_err(|_| self.word.touch())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // The word is freed outside of the lock. In the child of a fork the table is the parent's,
        // and stays as it is.
        let word = self
            .armed
            .kernel
            .inner
            .with_intake(|intake, _| intake.watches.remove(&self.id));
        drop(word);
    }
}

/// Marks the branch that calls it as the rare one: the usual one is laid out without a jump, which
/// is half a nanosecond of each look.
#[cold]
fn rarely() {}
