//! The reference model of the core. It uses plain vectors and one thread, and every rule is written
//! out, so the model is slow and obviously right.
//!
//! For each operation, the model computes the result and the callbacks, in order. A test runs the
//! real core on the same operations, and the core must agree. Threads are numbered. Each bracket
//! belongs to a thread, and an operation that would wait for a bracket of its own thread fails. If
//! an operation would wait for brackets of other threads, [`Model::blockers`] lists these brackets.
//! Then the test starts the operation, ends the brackets, and expects the operation to return.
//! Frees are asynchronous. So the model knows which notifiers have been freed only when
//! `synchronize` succeeds.

mod intervals;
mod shadows;

use intervals::Interval;
use shadows::Shadow;

/// A callback, with the index of its notifier or interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Callback {
    /// `invalidate_range_start` of a subscriber.
    Start(usize),
    /// `try_invalidate_range_start` of a subscriber.
    TryStart(usize),
    /// `invalidate_range_end` of a subscriber.
    End(usize),
    /// `release` of a subscriber.
    Release(usize),
    /// One of the three callbacks for accessed bits.
    Young(usize),
    /// The flush of a secondary TLB.
    Flush(usize),
    /// The callback of a shadow with a sequence, from a start or a release.
    Zap(usize),
    /// The callback of an interval.
    Interval(usize),
    /// The second pass of an interval's callback.
    Finish(usize),
}

/// The result of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done, without a value.
    Done,
    /// The index of the notifier or interval that the caller got, and its number of users.
    Got(usize, u32),
    /// The operation would wait for its own thread.
    WouldDeadlock,
    /// A subscriber refused.
    WouldBlock,
    /// The address space has ended.
    Dead,
    /// The range was invalidated since the sequence was read.
    Retry,
    /// The range is outside the pages that a shadow watches.
    NotWatched,
    /// The notifier has the maximum number of users.
    Overflow,
    /// `alloc` failed.
    Alloc,
}

/// The maximum number of users of one notifier.
pub const USERS_MAX: u32 = 3;

/// The kind of a subscriber.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A plain subscriber.
    Plain {
        /// Whether the subscriber refuses every non-blockable start.
        refuses: bool,
    },
    /// A secondary TLB.
    Tlb,
    /// A shadow with a sequence, which watches these pages.
    Shadow {
        /// The first and the last page.
        watched: (u64, u64),
    },
}

/// The behaviour of `alloc`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alloc {
    /// Makes a plain subscriber.
    Makes {
        /// Whether the subscriber refuses every non-blockable start.
        refuses: bool,
    },
    /// Fails.
    Fails,
}

/// One notifier that was ever made.
#[derive(Debug)]
struct Notifier {
    mm: usize,
    /// The index of the subsystem; `None` for a registration.
    key: Option<usize>,
    users: u32,
    kind: Kind,
    shadow: Shadow,
}

/// One address space.
#[derive(Debug)]
struct Mm {
    users: u32,
    /// The subscribers, newest first.
    listed: Vec<usize>,
    intervals: Vec<usize>,
    deferred: Vec<usize>,
    seq: u64,
    /// The number of open brackets that count as windows: those that began after the first insert.
    active: u32,
    has_intervals: bool,
}

/// One open bracket.
#[derive(Debug)]
struct Bracket {
    thread: usize,
    mm: usize,
    pages: (u64, u64),
    callees: Vec<usize>,
    window: bool,
}

/// The state of the model. Every index that a function takes must come from a function of the
/// model.
#[derive(Debug, Default)]
pub struct Model {
    mms: Vec<Mm>,
    notifiers: Vec<Notifier>,
    intervals: Vec<Interval>,
    brackets: Vec<Option<Bracket>>,
    /// The callbacks since the test last took them.
    pub calls: Vec<Callback>,
}

fn meet(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 <= b.1 && b.0 <= a.1
}

impl Model {
    /// Makes an address space with one user.
    pub fn mm_new(&mut self) -> usize {
        self.mms.push(Mm {
            users: 1,
            listed: Vec::new(),
            intervals: Vec::new(),
            deferred: Vec::new(),
            seq: 2,
            active: 0,
            has_intervals: false,
        });
        self.mms.len() - 1
    }

    /// `mmget_not_zero`.
    pub fn mm_get(&mut self, mm: usize) -> Answer {
        if self.mms[mm].users == 0 {
            return Answer::Dead;
        }
        self.mms[mm].users += 1;
        Answer::Done
    }

    /// Drops one user. The drop of the last user is exit.
    pub fn mm_put(&mut self, mm: usize) {
        self.mms[mm].users -= 1;
        if self.mms[mm].users > 0 {
            return;
        }
        if self.mms[mm].has_intervals {
            self.window_start(mm, (0, u64::MAX));
            self.window_end(mm);
        }
        for notifier in std::mem::take(&mut self.mms[mm].listed) {
            self.release(notifier);
        }
    }

    fn release(&mut self, notifier: usize) {
        self.notifiers[notifier].shadow.released = true;
        self.calls.push(match self.notifiers[notifier].kind {
            Kind::Shadow { .. } => Callback::Zap(notifier),
            _ => Callback::Release(notifier),
        });
    }

    /// Tells whether a thread is inside a bracket of an address space.
    #[must_use]
    pub fn is_inside(&self, thread: usize, mm: usize) -> bool {
        self.brackets
            .iter()
            .flatten()
            .any(|bracket| bracket.thread == thread && bracket.mm == mm)
    }

    fn is_inside_any(&self, thread: usize) -> bool {
        self.brackets
            .iter()
            .flatten()
            .any(|bracket| bracket.thread == thread)
    }

    /// Returns the open brackets of other threads on `mm`, each with its thread. An operation that
    /// waits for brackets of `mm` waits for these.
    #[must_use]
    pub fn blockers(&self, thread: usize, mm: usize) -> Vec<(usize, usize)> {
        let open = self
            .brackets
            .iter()
            .enumerate()
            .filter_map(|(number, bracket)| Some((number, bracket.as_ref()?)));
        open.filter(|(_, bracket)| bracket.mm == mm && bracket.thread != thread)
            .map(|(number, bracket)| (number, bracket.thread))
            .collect()
    }

    /// Returns the address spaces on which a notifier of a subsystem was put and may not have been
    /// freed yet.
    #[must_use]
    pub fn retired(&self, key: usize) -> Vec<usize> {
        let mut mms: Vec<_> = self
            .notifiers
            .iter()
            .filter(|one| one.key == Some(key) && one.users == 0)
            .map(|one| one.mm)
            .collect();
        mms.sort_unstable();
        mms.dedup();
        mms
    }

    /// Tells whether `Subsystem::get` finds an existing notifier.
    #[must_use]
    pub fn finds(&self, key: usize, mm: usize) -> bool {
        self.find(key, mm).is_some()
    }

    fn find(&self, key: usize, mm: usize) -> Option<usize> {
        self.mms[mm]
            .listed
            .iter()
            .copied()
            .find(|n| self.notifiers[*n].key == Some(key))
    }

    /// `Subsystem::get`.
    pub fn get(&mut self, thread: usize, key: usize, mm: usize, alloc: Alloc) -> Answer {
        if let Some(notifier) = self.find(key, mm) {
            return self.clone(notifier);
        }
        match alloc {
            Alloc::Fails if !self.is_inside(thread, mm) => Answer::Alloc,
            Alloc::Fails => Answer::WouldDeadlock,
            Alloc::Makes { refuses } => {
                self.register(thread, Some(key), mm, Kind::Plain { refuses })
            }
        }
    }

    /// `MmWithUser::mmap_write_lock`, and `Subsystem::get_locked` under it.
    pub fn get_locked(&mut self, thread: usize, key: usize, mm: usize, alloc: Alloc) -> Answer {
        if self.is_inside(thread, mm) {
            Answer::WouldDeadlock
        } else {
            self.get(thread, key, mm, alloc)
        }
    }

    /// `Registration::new` if `key` is `None`, otherwise `Subsystem::register`.
    pub fn register(&mut self, thread: usize, key: Option<usize>, mm: usize, kind: Kind) -> Answer {
        if self.is_inside(thread, mm) {
            return Answer::WouldDeadlock;
        }
        self.notifiers.push(Notifier {
            mm,
            key,
            users: 1,
            kind,
            shadow: Shadow::default(),
        });
        let notifier = self.notifiers.len() - 1;
        self.mms[mm].listed.insert(0, notifier);
        Answer::Got(notifier, 1)
    }

    /// `Subscription::try_clone`.
    pub fn clone(&mut self, notifier: usize) -> Answer {
        if self.notifiers[notifier].users == USERS_MAX {
            return Answer::Overflow;
        }
        self.notifiers[notifier].users += 1;
        Answer::Got(notifier, self.notifiers[notifier].users)
    }

    /// Drops one subscription or a registration. Also models `unregister_no_release`.
    pub fn put(&mut self, notifier: usize) {
        self.notifiers[notifier].users -= 1;
        if self.notifiers[notifier].users == 0 {
            self.delist(notifier);
        }
    }

    fn delist(&mut self, notifier: usize) {
        let mm = self.notifiers[notifier].mm;
        self.mms[mm].listed.retain(|one| *one != notifier);
    }

    /// `Registration::unregister`.
    pub fn unregister(&mut self, thread: usize, notifier: usize) -> Answer {
        let mm = self.notifiers[notifier].mm;
        if self.is_inside(thread, mm) {
            return Answer::WouldDeadlock;
        }
        if self.mms[mm].listed.contains(&notifier) {
            self.release(notifier);
        }
        self.delist(notifier);
        self.notifiers[notifier].users = 0;
        Answer::Done
    }

    /// Returns the address space of a notifier.
    #[must_use]
    pub fn mm_of(&self, notifier: usize) -> usize {
        self.notifiers[notifier].mm
    }

    /// Returns the listed subscribers of an address space, newest first.
    #[must_use]
    pub fn listed(&self, mm: usize) -> &[usize] {
        &self.mms[mm].listed
    }

    /// `Subsystem::synchronize`. Returns the notifiers of the subsystem that have been freed when
    /// it succeeds.
    ///
    /// # Errors
    /// `WouldDeadlock` inside a bracket.
    pub fn synchronize(&self, thread: usize, key: usize) -> Result<Vec<usize>, Answer> {
        if self.is_inside_any(thread) {
            return Err(Answer::WouldDeadlock);
        }
        let freed =
            |n: &usize| self.notifiers[*n].key == Some(key) && self.notifiers[*n].users == 0;
        Ok((0..self.notifiers.len()).filter(freed).collect())
    }

    /// `Mm::invalidate`. Returns the index of the bracket.
    pub fn invalidate(&mut self, thread: usize, mm: usize, pages: (u64, u64)) -> usize {
        let window = self.mms[mm].has_intervals;
        if window {
            self.window_start(mm, pages);
        }
        for notifier in self.mms[mm].listed.clone() {
            match self.notifiers[notifier].kind {
                Kind::Plain { .. } => self.calls.push(Callback::Start(notifier)),
                Kind::Tlb => {}
                Kind::Shadow { watched } => self.shadow_start(notifier, watched, pages),
            }
        }
        self.open(thread, mm, pages, window)
    }

    /// `Mm::try_invalidate`.
    ///
    /// # Errors
    /// `WouldBlock` if an interval or a subscriber refuses.
    pub fn try_invalidate(
        &mut self,
        thread: usize,
        mm: usize,
        pages: (u64, u64),
    ) -> Result<usize, Answer> {
        let window = self.mms[mm].has_intervals;
        if window && !self.window_try_start(mm, pages) {
            return Err(Answer::WouldBlock);
        }
        let callees = self.mms[mm].listed.clone();
        for notifier in &callees {
            match self.notifiers[*notifier].kind {
                Kind::Plain { .. } => self.calls.push(Callback::TryStart(*notifier)),
                Kind::Tlb => {}
                Kind::Shadow { watched } => self.shadow_start(*notifier, watched, pages),
            }
        }
        if callees
            .iter()
            .any(|n| self.notifiers[*n].kind == Kind::Plain { refuses: true })
        {
            callees.iter().for_each(|n| self.tell_end(*n, pages));
            if window {
                self.window_end(mm);
            }
            return Err(Answer::WouldBlock);
        }
        Ok(self.open(thread, mm, pages, window))
    }

    /// Calls the end of a subscriber that has accepted its start.
    fn tell_end(&mut self, notifier: usize, pages: (u64, u64)) {
        match self.notifiers[notifier].kind {
            Kind::Plain { refuses: false } => self.calls.push(Callback::End(notifier)),
            Kind::Plain { refuses: true } | Kind::Tlb => {}
            Kind::Shadow { watched } => self.shadow_end(notifier, watched, pages),
        }
    }

    fn open(&mut self, thread: usize, mm: usize, pages: (u64, u64), window: bool) -> usize {
        let callees = self.mms[mm].listed.clone();
        self.brackets.push(Some(Bracket {
            thread,
            mm,
            pages,
            callees,
            window,
        }));
        self.brackets.len() - 1
    }

    /// Drops a bracket.
    ///
    /// # Panics
    /// If the bracket was dropped before.
    pub fn end(&mut self, bracket: usize) {
        let Bracket {
            mm,
            pages,
            callees,
            window,
            ..
        } = self.brackets[bracket].take().expect("a bracket ends once");
        if window {
            self.window_end(mm);
        }
        for notifier in self.mms[mm].listed.clone() {
            if !callees.contains(&notifier) {
                continue;
            }
            match self.notifiers[notifier].kind {
                // A subscriber with `refuses` gets an end as well. If the start had not been
                // blockable, the subscriber would have refused it, and the bracket would not exist.
                Kind::Plain { .. } => self.calls.push(Callback::End(notifier)),
                Kind::Tlb => {}
                Kind::Shadow { watched } => self.shadow_end(notifier, watched, pages),
            }
        }
    }

    /// `clear_flush_young` and `clear_young`. Every subscriber with an odd index returns true.
    pub fn clear_young(&mut self, mm: usize) -> bool {
        let asked: Vec<_> = self.with_marks(mm);
        self.calls.extend(asked.iter().map(|n| Callback::Young(*n)));
        asked.iter().any(|n| n % 2 == 1)
    }

    /// `test_young`. Stops at the first subscriber that returns true.
    pub fn test_young(&mut self, mm: usize) -> bool {
        for notifier in self.with_marks(mm) {
            self.calls.push(Callback::Young(notifier));
            if notifier % 2 == 1 {
                return true;
            }
        }
        false
    }

    fn with_marks(&self, mm: usize) -> Vec<usize> {
        let has = |n: &usize| !matches!(self.notifiers[*n].kind, Kind::Shadow { .. });
        self.mms[mm].listed.iter().copied().filter(has).collect()
    }

    /// `Mm::invalidate_secondary_tlbs`.
    pub fn flush(&mut self, mm: usize) {
        let tlbs = self.mms[mm]
            .listed
            .iter()
            .filter(|n| self.notifiers[**n].kind == Kind::Tlb);
        self.calls.extend(tlbs.map(|n| Callback::Flush(*n)));
    }

    /// Returns how many notifiers were ever registered.
    #[must_use]
    pub fn notifiers_made(&self) -> usize {
        self.notifiers.len()
    }

    /// Tells whether a bracket of an address space might call a subscriber or an interval, as
    /// `Mm::has_notifiers` does.
    #[must_use]
    pub fn has_notifiers(&self, mm: usize) -> bool {
        !self.mms[mm].listed.is_empty() || self.mms[mm].has_intervals
    }

    /// Checks the model's own invariant: every listed subscriber has users, and is listed only
    /// once.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let listed = || self.mms.iter().flat_map(|mm| &mm.listed);
        listed()
            .all(|n| self.notifiers[*n].users > 0 && listed().filter(|one| *one == n).count() == 1)
    }
}
