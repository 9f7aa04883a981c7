//! The reference model of the core: plain vectors, one thread, every rule written out. Slow and obviously right.
//!
//! It says what each operation returns and which callbacks it makes, in order. The real core is run on the same
//! operations and must agree. Frees are asynchronous, so the model says which notifiers have been freed only where
//! `synchronize` succeeds.

/// A callback, and which notifier or interval it came to.
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
    /// The callback of an interval.
    Interval(usize),
}

/// What an operation answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done; nothing more to say.
    Done,
    /// A subscription to this notifier, which now has so many users.
    Got(usize, u32),
    /// It would wait for itself.
    WouldDeadlock,
    /// A subscriber refused.
    WouldBlock,
    /// The address space has ended.
    Dead,
    /// The range was invalidated since.
    Retry,
}

/// One notifier that was ever made.
#[derive(Debug)]
struct Notifier {
    mm: usize,
    /// The subsystem, none for a registration.
    key: Option<usize>,
    users: u32,
    refuses: bool,
}

/// One interval that was ever made.
#[derive(Debug)]
struct Interval {
    mm: usize,
    pages: (u64, u64),
    in_tree: bool,
    seq: u64,
}

/// One address space.
#[derive(Debug)]
struct Mm {
    users: u32,
    /// Newest first.
    listed: Vec<usize>,
    intervals: Vec<usize>,
    deferred: Vec<usize>,
    seq: u64,
    /// Brackets that take part in windows; they do from the first insert on.
    active: u32,
    has_intervals: bool,
    brackets: u32,
}

/// One open bracket.
#[derive(Debug)]
struct Bracket {
    mm: usize,
    callees: Vec<usize>,
    window: bool,
}

/// The whole world as the model sees it. Every index is one that it handed out.
#[derive(Debug, Default)]
pub struct Model {
    mms: Vec<Mm>,
    notifiers: Vec<Notifier>,
    intervals: Vec<Interval>,
    brackets: Vec<Option<Bracket>>,
    /// What the last operation called.
    pub calls: Vec<Callback>,
}

/// The sequence that never fits.
const NEVER: u64 = 0;

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
            brackets: 0,
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

    /// Drops one user; the last is exit.
    pub fn mm_put(&mut self, mm: usize) {
        self.calls.clear();
        self.mms[mm].users -= 1;
        if self.mms[mm].users > 0 {
            return;
        }
        if self.mms[mm].has_intervals {
            let window = self.window_start(mm, (0, u64::MAX));
            self.window_end(mm, window);
        }
        for notifier in std::mem::take(&mut self.mms[mm].listed) {
            self.calls.push(Callback::Release(notifier));
        }
    }

    /// `Subsystem::get`. A subscriber made with `refuses` refuses every non-blockable start.
    pub fn get(&mut self, key: usize, mm: usize, refuses: bool) -> Answer {
        let found = self.mms[mm].listed.iter().copied().find(|n| self.notifiers[*n].key == Some(key));
        if let Some(notifier) = found {
            self.notifiers[notifier].users += 1;
            return Answer::Got(notifier, self.notifiers[notifier].users);
        }
        self.register(Some(key), mm, refuses)
    }

    /// `Registration::new` if there is no key.
    pub fn register(&mut self, key: Option<usize>, mm: usize, refuses: bool) -> Answer {
        if self.mms[mm].brackets > 0 {
            return Answer::WouldDeadlock;
        }
        self.notifiers.push(Notifier { mm, key, users: 1, refuses });
        let notifier = self.notifiers.len() - 1;
        self.mms[mm].listed.insert(0, notifier);
        Answer::Got(notifier, 1)
    }

    /// `Subscription::try_clone`.
    pub fn clone(&mut self, notifier: usize) -> Answer {
        self.notifiers[notifier].users += 1;
        Answer::Got(notifier, self.notifiers[notifier].users)
    }

    /// Drops one subscription, or a registration.
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
    pub fn unregister(&mut self, notifier: usize) -> Answer {
        self.calls.clear();
        let mm = self.notifiers[notifier].mm;
        if self.mms[mm].brackets > 0 {
            return Answer::WouldDeadlock;
        }
        if self.mms[mm].listed.contains(&notifier) {
            self.calls.push(Callback::Release(notifier));
        }
        self.delist(notifier);
        self.notifiers[notifier].users = 0;
        Answer::Done
    }

    /// `Subsystem::synchronize`: which notifiers of the subsystem have been freed when it succeeds.
    ///
    /// # Errors
    /// `WouldDeadlock` while a bracket is open.
    pub fn synchronize(&self, key: usize) -> Result<Vec<usize>, Answer> {
        if self.mms.iter().any(|mm| mm.brackets > 0) {
            return Err(Answer::WouldDeadlock);
        }
        let freed = |n: &usize| self.notifiers[*n].key == Some(key) && self.notifiers[*n].users == 0;
        Ok((0..self.notifiers.len()).filter(freed).collect())
    }

    /// `Mm::invalidate`; the answer's bracket is the number given back.
    pub fn invalidate(&mut self, mm: usize, pages: (u64, u64)) -> usize {
        self.calls.clear();
        let window = self.mms[mm].has_intervals && {
            self.window_start(mm, pages);
            true
        };
        let callees = self.mms[mm].listed.clone();
        self.calls.extend(callees.iter().map(|n| Callback::Start(*n)));
        self.open(mm, callees, window)
    }

    /// `Mm::try_invalidate`. Intervals never refuse here.
    ///
    /// # Errors
    /// `WouldBlock` if a subscriber refuses.
    pub fn try_invalidate(&mut self, mm: usize, pages: (u64, u64)) -> Result<usize, Answer> {
        self.calls.clear();
        let window = self.mms[mm].has_intervals && {
            self.window_start(mm, pages);
            true
        };
        let callees = self.mms[mm].listed.clone();
        self.calls.extend(callees.iter().map(|n| Callback::TryStart(*n)));
        if callees.iter().any(|n| self.notifiers[*n].refuses) {
            let accepted = callees.iter().filter(|n| !self.notifiers[**n].refuses);
            self.calls.extend(accepted.map(|n| Callback::End(*n)));
            self.window_end(mm, window);
            return Err(Answer::WouldBlock);
        }
        Ok(self.open(mm, callees, window))
    }

    fn open(&mut self, mm: usize, callees: Vec<usize>, window: bool) -> usize {
        self.mms[mm].brackets += 1;
        self.brackets.push(Some(Bracket { mm, callees, window }));
        self.brackets.len() - 1
    }

    /// Drops a bracket.
    ///
    /// # Panics
    /// If it was dropped before.
    pub fn end(&mut self, bracket: usize) {
        self.calls.clear();
        let Bracket { mm, callees, window } = self.brackets[bracket].take().expect("a bracket ends once");
        self.window_end(mm, window);
        let listed = &self.mms[mm].listed;
        self.calls.extend(listed.iter().filter(|n| callees.contains(n)).map(|n| Callback::End(*n)));
        self.mms[mm].brackets -= 1;
    }

    fn window_start(&mut self, mm: usize, pages: (u64, u64)) -> bool {
        self.mms[mm].active += 1;
        let hit: Vec<usize> = self.mms[mm].intervals.iter().copied().filter(|i| self.meets(*i, pages)).collect();
        if !hit.is_empty() {
            self.mms[mm].seq |= 1;
        }
        for interval in hit {
            self.intervals[interval].seq = self.mms[mm].seq;
            self.calls.push(Callback::Interval(interval));
        }
        true
    }

    fn meets(&self, interval: usize, pages: (u64, u64)) -> bool {
        let own = self.intervals[interval].pages;
        own.0 <= pages.1 && pages.0 <= own.1
    }

    fn window_end(&mut self, mm: usize, window: bool) {
        if !window {
            return;
        }
        self.mms[mm].active -= 1;
        if self.mms[mm].active > 0 || self.mms[mm].seq & 1 == 0 {
            return;
        }
        self.mms[mm].seq += 1;
        for interval in std::mem::take(&mut self.mms[mm].deferred) {
            self.intervals[interval].in_tree = true;
            self.mms[mm].intervals.push(interval);
        }
    }

    /// `IntervalNotifier::insert` of the pages from the first to the last.
    pub fn insert(&mut self, mm: usize, pages: (u64, u64)) -> Answer {
        if !self.mms[mm].has_intervals {
            if self.mms[mm].brackets > 0 {
                return Answer::WouldDeadlock;
            }
            self.mms[mm].has_intervals = true;
        }
        let interval = self.intervals.len();
        let full = self.mms[mm].seq & 1 == 1;
        let idle = self.mms[mm].active == 0;
        if !idle {
            self.mms[mm].seq |= 1;
        }
        let seq = if idle { self.mms[mm].seq - 1 } else { self.mms[mm].seq };
        self.intervals.push(Interval { mm, pages, in_tree: !full, seq });
        if full {
            self.mms[mm].deferred.push(interval)
        } else {
            self.mms[mm].intervals.push(interval)
        }
        Answer::Got(interval, 1)
    }

    /// How many intervals were ever inserted.
    #[must_use]
    pub fn intervals_made(&self) -> usize {
        self.intervals.len()
    }

    /// `IntervalNotifier::remove`.
    pub fn remove(&mut self, interval: usize) -> Answer {
        let mm = self.intervals[interval].mm;
        let full = self.mms[mm].seq & 1 == 1;
        if full && self.intervals[interval].in_tree {
            // The window is one of this very thread.
            return Answer::WouldDeadlock;
        }
        self.mms[mm].intervals.retain(|one| *one != interval);
        self.mms[mm].deferred.retain(|one| *one != interval);
        Answer::Done
    }

    /// `IntervalNotifier::read_begin`.
    #[must_use]
    pub fn read_begin(&self, interval: usize) -> u64 {
        let Interval { mm, seq, .. } = self.intervals[interval];
        if seq == self.mms[mm].seq { NEVER } else { seq }
    }

    /// `IntervalNotifier::try_install`.
    #[must_use]
    pub fn try_install(&self, interval: usize, seq: u64) -> Answer {
        if self.intervals[interval].seq == seq { Answer::Done } else { Answer::Retry }
    }

    /// The sequence of an address space's intervals, and how many windows are open.
    #[must_use]
    pub fn snapshot(&self, mm: usize) -> (u64, u64) {
        (self.mms[mm].seq, u64::from(self.mms[mm].active))
    }

    /// Whether a bracket of an address space would call anybody, as far as it can be known without looking.
    #[must_use]
    pub fn has_notifiers(&self, mm: usize) -> bool {
        !self.mms[mm].listed.is_empty() || self.mms[mm].has_intervals
    }
}
