//! Watches that brackets mark.
//!
//! One subscriber marks all of these watches, at the start of each bracket and again at its end.
//! The second mark is for a watch that was made or renewed in between: that watch may stand for a
//! translation from before the change. So the subscriber must mark it before the system call that
//! makes the change returns.

use crate::Error;
use crate::current_mm::current_ref;
use crate::fork::{marks, running_unlocked, try_marks};
use crate::watch_table::{Id, Table, Word, enter};
use mmu_notifier::{InvalidateRange, Notifier, Registration, VaRange};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Brackets have no numbers, so every bracket counts as later than every watch.
const ANY: u64 = 1;

/// The subscriber. Each address space has one, from its first watch until its end.
pub(crate) struct Brackets {
    id: u64,
    registration: Registration<Marks>,
    /// Whether the subscriber is leaked, so that it stays registered for ever. Otherwise the
    /// subscriber would end with the last watch, and the next watch would register another one and
    /// wait for open brackets.
    stays: AtomicBool,
}

struct Marks(Mutex<Table>);

pub(super) struct Bracketed {
    brackets: Arc<Brackets>,
    id: Id,
    word: Arc<Word>,
}

impl Marks {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notifier for Marks {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        // ORDER(watch-bracket): the mark comes before the change, and before the next step of the
        // thread that makes the change. Partner: the fence in `is_valid`.
        self.table().touch(range.range(), ANY);
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        self.table().touch(range.range(), ANY);
    }
}

impl Brackets {
    fn running() -> Result<Arc<Self>, Error> {
        running_unlocked(&try_marks()?.brackets, |id| {
            let marks = Marks(Mutex::new(Table::with_room(64)));
            let registration = Registration::new(current_ref(), marks)
                .map_err(|_| Error::InCallback { source: "watch" })?;
            Ok(Self {
                id,
                registration,
                stays: AtomicBool::new(false),
            })
        })
        .inspect(|brackets| {
            if !brackets.stays.swap(true, Ordering::Relaxed) {
                std::mem::forget(Arc::clone(brackets));
            }
        })
    }
}

impl Bracketed {
    pub(super) fn new(range: VaRange) -> Result<Self, Error> {
        let brackets = Brackets::running()?;
        let word = Arc::new(Word::default());
        let table = |f: &mut dyn FnMut(&mut Table)| {
            f(&mut brackets.registration.table());
            Some(())
        };
        let id = enter(table, range, 0, &word).expect("the table is given each time");
        Ok(Self { brackets, id, word })
    }

    #[inline]
    fn is_inherited(&self) -> bool {
        marks().alive.load(Ordering::Relaxed) != self.brackets.id
    }

    #[inline]
    pub(super) fn is_valid(&self) -> bool {
        // ORDER(watch-bracket): Acquire. The caller's own order (a lock, a join) puts the end of
        // the bracket before this load. The caller's reads through its entry also come before this
        // load. Partner: the store in `Word::touch`.
        fence(Ordering::Acquire);
        !self.word.is_touched() && !self.is_inherited()
    }

    pub(super) fn renew(&mut self) -> Result<(), Error> {
        if self.is_inherited() {
            return Err(Error::AfterFork { source: "watch" });
        }
        self.brackets.registration.table().renew(&self.id, 0);
        Ok(())
    }
}

impl Drop for Bracketed {
    fn drop(&mut self) {
        // In the child of a fork the lock may be held for ever, by a thread that exists only in the
        // parent.
        if !self.is_inherited() {
            let word = self.brackets.registration.table().remove(&self.id);
            drop(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::in_child;
    use crate::wait::until;
    use mmu_notifier::{Event, Va};
    use std::sync::mpsc;
    use std::thread;

    fn range() -> VaRange {
        VaRange::covering(Va::new(0x7000_0000), 4096).expect("a range")
    }

    #[test]
    fn the_first_watch_of_a_bracket_does_not_wait_for_another_threads_first_watch() {
        let sleeps = |task: &str| {
            std::fs::read_to_string(format!("/proc/{task}/stat"))
                .is_ok_and(|stat| stat.contains(") S "))
        };
        // In a child, because other tests have made the first watch of this process. If the child
        // hangs, it is killed.
        assert!(in_child(|| {
            let bracket = current_ref().invalidate(range(), Event::Unmap);
            let (send, task) = mpsc::channel();
            let other = thread::spawn(move || {
                let task = std::fs::read_link("/proc/thread-self").expect("proc is there");
                let _ = send.send(task.display().to_string());
                Bracketed::new(range()).is_ok()
            });
            let task = task.recv().expect("the thread tells");
            until(|| sleeps(&task));
            let refused = Bracketed::new(range()).err();
            drop(bracket);
            matches!(refused, Some(Error::InCallback { .. })) && other.join().expect("no panic")
        }));
    }
}
