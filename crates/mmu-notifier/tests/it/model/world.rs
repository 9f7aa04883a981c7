//! The core's side, each thing beside its number in the model.

use super::Op;
use super::callbacks::{Entry, Probe, SecondaryProbe, Shadow, Shared, Tlb};
use super::threads::{Open, Tried, Worker, wait};
use crate::support::wait_until;
use mmu_notifier::{
    Event, GetError, InstallError, IntervalNotifier, InvalidateSeq, Mm, MmWithUser, Notifier, ReadSeq, Registration,
    Secondary, Snapshot, Subscription, Subsystem, Va, VaRange,
};
use std::collections::BTreeMap;
use std::mem::take;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use testkit::in_child;
use testkit::model::{Alloc, Answer, Callback, Kind, Model, USERS_MAX};

pub(super) const THREADS: usize = 3;

type Make = Box<dyn Fn(&MmWithUser) -> Result<Probe, ()> + Send + Sync>;
type Probes = Subsystem<Probe, (), Make>;

/// A registration of any kind.
enum Registered {
    Plain(Registration<Probe>),
    Tlb(Registration<SecondaryProbe>),
    Shadow(Registration<InvalidateSeq<Shadow>>),
}

/// Does the same with a registration of any kind.
macro_rules! each_kind {
    ($registered:expr, $registration:ident => $do:expr) => {
        match $registered {
            Registered::Plain($registration) => $do,
            Registered::Tlb($registration) => $do,
            Registered::Shadow($registration) => $do,
        }
    };
}

impl Registered {
    fn unregister(self) -> Result<(), Self> {
        fn of<N: Notifier>(one: Registration<N>, back: fn(Registration<N>) -> Registered) -> Result<(), Registered> {
            one.unregister().map(drop).map_err(|refused| back(refused.registration))
        }
        match self {
            Self::Plain(one) => of(one, Self::Plain),
            Self::Tlb(one) => of(one, Self::Tlb),
            Self::Shadow(one) => of(one, Self::Shadow),
        }
    }
}

/// What the model and the core said at the last `read_begin`.
type Seq = (u64, ReadSeq);

#[derive(Default)]
struct Space {
    users: Vec<MmWithUser>,
}

pub(super) struct World {
    model: Model,
    shared: Shared,
    subsystems: [Arc<Probes>; 2],
    workers: [Worker; THREADS],
    mms: Vec<(Mm, Space)>,
    subscriptions: Vec<(usize, Subscription<Probe>)>,
    registrations: Vec<(usize, Registered)>,
    /// The brackets that are open: their number and thread.
    brackets: Vec<(usize, usize)>,
    intervals: Vec<(usize, IntervalNotifier<Entry>, Option<Seq>)>,
    /// Faults that have begun: on which shadow, where, and what the model and the core said.
    faults: Vec<(usize, (u64, u64), u64, Snapshot)>,
    /// How often each callback may come more than the model says.
    extra: BTreeMap<Callback, usize>,
    parallel: bool,
}

/// Chooses one of `len`.
fn pick(number: usize, len: usize) -> Option<usize> {
    number.checked_rem(len)
}

fn pages(first: u64, more: u64) -> (VaRange, (u64, u64)) {
    (VaRange::covering(Va::new(first << 12), (more + 1) << 12).unwrap(), (first, first + more))
}

fn answer<E>(result: Result<(), E>, error: Answer) -> Answer {
    result.map_or(error, |()| Answer::Done)
}

impl World {
    pub(super) fn new() -> Self {
        let shared = Shared::new();
        let subsystem = || {
            let shared = shared.clone();
            let make: Make = Box::new(move |_| match *shared.next.lock().unwrap() {
                (_, Alloc::Fails) => Err(()),
                (number, Alloc::Makes { refuses }) => Ok(Probe { mark: shared.mark(number), refuses }),
            });
            Arc::new(Subsystem::with_users_max(make, USERS_MAX))
        };
        Self {
            model: Model::default(),
            subsystems: [subsystem(), subsystem()],
            workers: [(); THREADS].map(|()| Worker::new()),
            shared,
            mms: Vec::new(),
            subscriptions: Vec::new(),
            registrations: Vec::new(),
            brackets: Vec::new(),
            intervals: Vec::new(),
            faults: Vec::new(),
            extra: BTreeMap::new(),
            parallel: false,
        }
    }

    /// The callbacks of the last operation are those of the model; intervals that begin at one page come in any order.
    fn agree(&mut self) {
        let (mut told, mut expected) = (take(&mut *self.shared.calls.lock().unwrap()), take(&mut self.model.calls));
        let mut extra = take(&mut self.extra);
        if take(&mut self.parallel) {
            told.sort();
            expected.sort();
            for callback in &expected {
                let at = told.iter().position(|one| one == callback);
                told.swap_remove(at.unwrap_or_else(|| panic!("{callback:?} did not come")));
            }
            for callback in told {
                let left = extra.entry(callback).or_default();
                *left = left.checked_sub(1).unwrap_or_else(|| panic!("{callback:?} came and should not have"));
            }
        } else {
            let last_start = told.iter().rposition(|call| matches!(call, Callback::Interval(_)));
            let first_finish = told.iter().position(|call| matches!(call, Callback::Finish(_)));
            assert!(last_start.is_none_or(|last| first_finish.is_none_or(|first| last < first)), "{told:?}");
            let split = |calls: Vec<Callback>| -> (Vec<Callback>, Vec<Callback>) {
                calls.iter().partition(|call| matches!(call, Callback::Interval(_) | Callback::Finish(_)))
            };
            let ((mut told, others), (mut expected, others_expected)) = (split(told), split(expected));
            told.sort();
            expected.sort();
            assert_eq!((told, others), (expected, others_expected));
        }
        assert!(self.model.is_sound());
        for (number, (mm, space)) in self.mms.iter().enumerate() {
            assert_eq!(mm.interval_snapshot(), self.model.snapshot(number));
            assert_eq!(mm.has_notifiers(), self.model.has_notifiers(number));
            assert_eq!((mm.callback_panics(), mm.mm_users()), (0, space.users.len()));
        }
    }

    /// Ends what an operation that has begun waits for, in the threads whose brackets they are.
    fn end_all(&mut self, blockers: &[(usize, usize)], delisted: &[usize]) {
        self.parallel |= !blockers.is_empty();
        for (bracket, thread) in blockers {
            // Whoever is delisted at the same time may hear the end or not.
            for notifier in delisted {
                *self.extra.entry(Callback::End(*notifier)).or_default() += 1;
            }
            self.end(*bracket, *thread);
        }
    }

    fn end(&mut self, bracket: usize, thread: usize) {
        self.brackets.retain(|one| *one != (bracket, thread));
        self.model.end(bracket);
        self.workers[thread].run(move |brackets| drop(brackets.remove(&bracket)));
    }

    /// The address space of that number, and one user of it, if it has any.
    fn user(&mut self, mm: usize) -> Option<(usize, MmWithUser)> {
        let mm = pick(mm, self.mms.len())?;
        Some((mm, self.mms[mm].1.users.pop()?))
    }

    fn get(&mut self, thread: usize, key: usize, mm: usize, alloc: u8, locked: bool) {
        let alloc = if alloc == 3 { Alloc::Fails } else { Alloc::Makes { refuses: alloc == 2 } };
        let Some((mm, user)) = self.user(mm) else { return };
        let waits = !self.model.finds(key, mm) && !self.model.is_inside(thread, mm) && alloc != Alloc::Fails;
        let blockers = if waits { self.model.blockers(thread, mm) } else { Vec::new() };
        *self.shared.next.lock().unwrap() = (self.model.notifiers_made(), alloc);
        let expected = match locked {
            true => self.model.get_locked(thread, key, mm, alloc),
            false => self.model.get(thread, key, mm, alloc),
        };
        let subsystem = Arc::clone(&self.subsystems[key]);
        let begun = self.workers[thread].begin(move |_| {
            let got = match locked {
                true => match user.mmap_write_lock() {
                    Ok(mut guard) => subsystem.get_locked(&mut guard),
                    Err(_) => Err(GetError::WouldDeadlock),
                },
                false => subsystem.get(&user),
            };
            (got, user)
        });
        self.end_all(&blockers, &[]);
        let (got, user) = wait(&begun);
        self.mms[mm].1.users.push(user);
        let got = match got {
            Ok(subscription) => {
                let answer = Answer::Got(subscription.mark.number, subscription.users());
                self.subscriptions.push((subscription.mark.number, subscription));
                answer
            }
            Err(GetError::WouldDeadlock) => Answer::WouldDeadlock,
            Err(GetError::Overflow) => Answer::Overflow,
            Err(GetError::Alloc(())) => Answer::Alloc,
            Err(error) => panic!("{error:?}"),
        };
        assert_eq!(got, expected);
    }

    fn register<N: Notifier>(
        &mut self,
        thread: usize,
        mm: usize,
        kind: Kind,
        new: N,
        as_one: fn(Registration<N>) -> Registered,
    ) {
        let Some((mm, user)) = self.user(mm) else { return self.unmade(new) };
        let refused = self.model.is_inside(thread, mm);
        let blockers = if refused { Vec::new() } else { self.model.blockers(thread, mm) };
        let number = self.model.notifiers_made();
        let expected = self.model.register(thread, None, mm, kind);
        let begun = self.workers[thread].begin(move |_| (Registration::new(&user, new), user));
        self.end_all(&blockers, &[]);
        let (made, user) = wait(&begun);
        self.mms[mm].1.users.push(user);
        match made {
            Ok(registration) => {
                assert_eq!(expected, Answer::Got(number, 1));
                self.registrations.push((number, as_one(registration)));
            }
            Err(failed) => {
                assert_eq!(expected, Answer::WouldDeadlock);
                self.unmade(failed.notifier);
            }
        }
    }

    /// Drops a notifier that was never registered: its number goes to the next one.
    fn unmade<N>(&self, notifier: N) {
        drop(notifier);
        assert!(self.shared.freed.lock().unwrap().remove(&self.model.notifiers_made()));
    }

    fn probe(&self, refuses: bool) -> Probe {
        Probe { mark: self.shared.mark(self.model.notifiers_made()), refuses }
    }

    fn unregister(&mut self, thread: usize, one: usize) {
        let Some(one) = pick(one, self.registrations.len()) else { return };
        let (number, registered) = self.registrations.swap_remove(one);
        let mm = self.model.mm_of(number);
        let blockers = if self.model.is_inside(thread, mm) { Vec::new() } else { self.model.blockers(thread, mm) };
        let delisted: Vec<_> = self.model.listed(mm).iter().copied().filter(|one| *one == number).collect();
        let expected = self.model.unregister(thread, number);
        let begun = self.workers[thread].begin(move |_| registered.unregister());
        self.end_all(&blockers, &delisted);
        match wait(&begun) {
            Ok(()) => {
                assert_eq!(expected, Answer::Done);
                assert!(self.shared.freed.lock().unwrap().contains(&number), "dropped by the thread that has it back");
                self.faults.retain(|fault| fault.0 != number);
            }
            Err(back) => {
                assert_eq!(expected, Answer::WouldDeadlock);
                self.registrations.push((number, back));
            }
        }
    }

    /// Drops a user. If it is the last one, this is exit.
    fn mm_put(&mut self, thread: usize, mm: usize) {
        let Some(mm) = pick(mm, self.mms.len()) else { return };
        let exits = self.mms[mm].1.users.len() == 1 && !self.model.is_inside(thread, mm);
        let mut blockers = if exits { self.model.blockers(thread, mm) } else { Vec::new() };
        if self.model.has_intervals(mm) {
            // Which windows are one would depend on who comes first.
            self.end_all(&blockers, &[]);
            self.agree();
            blockers.clear();
        }
        let Some(user) = self.mms[mm].1.users.pop() else { return };
        let listed = self.model.listed(mm).to_vec();
        self.model.mm_put(mm);
        let begun = self.workers[thread].begin(move |_| drop(user));
        self.end_all(&blockers, &listed);
        wait(&begun);
    }

    fn synchronize(&mut self, thread: usize, key: usize, drain: bool) {
        let expected = self.model.synchronize(thread, key);
        let mut blockers = Vec::new();
        if expected.is_ok() {
            for mm in self.model.retired(key) {
                blockers.extend(self.model.blockers(thread, mm));
            }
        }
        let subsystem = Arc::clone(&self.subsystems[key]);
        let begun = self.workers[thread]
            .begin(move |_| if drain { subsystem.drain_until_idle() } else { subsystem.synchronize() });
        self.end_all(&blockers, &[]);
        match (wait(&begun), expected) {
            (Ok(()), Ok(expected)) => {
                let freed = self.shared.freed.lock().unwrap();
                assert!(expected.iter().all(|number| freed.contains(number)), "freed {freed:?}, not {expected:?}");
            }
            (answer, expected) => assert_eq!(answer.is_ok(), expected.is_ok()),
        }
    }

    fn insert(&mut self, thread: usize, mm: usize, first: u64, more: u64, refuses: bool) {
        let Some((mm, user)) = self.user(mm) else { return };
        let (range, pages) = pages(first, more);
        let waits = !self.model.has_intervals(mm) && !self.model.is_inside(thread, mm);
        let blockers = if waits { self.model.blockers(thread, mm) } else { Vec::new() };
        let number = self.model.intervals_made();
        let expected = self.model.insert(thread, mm, pages, refuses);
        let entry = Entry { number, refuses, shared: self.shared.clone() };
        let begun = self.workers[thread].begin(move |_| (IntervalNotifier::insert(&user, range, entry), user));
        self.end_all(&blockers, &[]);
        let (inserted, user) = wait(&begun);
        self.mms[mm].1.users.push(user);
        assert_eq!(expected == Answer::Got(number, 1), inserted.is_ok());
        self.intervals.extend(inserted.ok().map(|interval| (number, interval, None)));
    }

    fn remove(&mut self, thread: usize, one: usize) {
        let Some(one) = pick(one, self.intervals.len()) else { return };
        let (number, interval, seq) = self.intervals.swap_remove(one);
        let mm = self.model.mm_of_interval(number);
        let waits = self.model.snapshot(mm).0 % 2 == 1 && !self.model.is_inside(thread, mm);
        let blockers = if waits { self.model.blockers(thread, mm) } else { Vec::new() };
        let expected = self.model.remove(thread, number);
        let begun = self.workers[thread].begin(move |_| interval.remove());
        self.end_all(&blockers, &[]);
        match wait(&begun) {
            Ok(_entry) => assert_eq!(expected, Answer::Done),
            Err(refused) => {
                assert_eq!(expected, Answer::WouldDeadlock);
                self.intervals.push((number, refused.interval, seq));
            }
        }
    }

    fn read_begin(&mut self, thread: usize, one: usize) {
        let Some(one) = pick(one, self.intervals.len()) else { return };
        let (number, interval, _) = self.intervals.swap_remove(one);
        let mm = self.model.mm_of_interval(number);
        let waits = self.model.is_invalidating(number) && !self.model.is_inside(thread, mm);
        let blockers = if waits { self.model.blockers(thread, mm) } else { Vec::new() };
        let expected = self.model.read_begin(thread, number);
        let begun = self.workers[thread].begin(move |_| (interval.read_begin(), interval));
        self.end_all(&blockers, &[]);
        let (seq, interval) = wait(&begun);
        self.intervals.push((number, interval, Some((expected, seq))));
    }

    fn invalidate(&mut self, thread: usize, mm: usize, first: u64, more: u64) {
        let Some(mm) = pick(mm, self.mms.len()) else { return };
        let (range, pages) = pages(first, more);
        let bracket = self.model.invalidate(thread, mm, pages);
        let handle = self.mms[mm].0.clone();
        self.workers[thread].run(move |brackets| {
            let open = handle.invalidate_owned(range, Event::Clear);
            brackets.insert(bracket, Open::Owned { _bracket: open });
        });
        self.brackets.push((bracket, thread));
    }

    fn try_invalidate(&mut self, thread: usize, mm: usize, first: u64, more: u64) {
        let Some(mm) = pick(mm, self.mms.len()) else { return };
        let (range, pages) = pages(first, more);
        if self.model.is_ambiguous(mm, pages) {
            return;
        }
        let expected = self.model.try_invalidate(thread, mm, pages);
        let (handle, number) = (self.mms[mm].0.clone(), expected.unwrap_or_default());
        let opened = self.workers[thread].run(move |brackets| {
            let tried = Tried::new(handle, range, Event::Unmap);
            tried.map(|open| brackets.insert(number, Open::Tried { _bracket: open })).is_ok()
        });
        assert_eq!(opened, expected.is_ok());
        self.brackets.extend(expected.ok().map(|bracket| (bracket, thread)));
    }

    fn shadow(&self, one: usize) -> Option<(usize, &Registration<InvalidateSeq<Shadow>>)> {
        let shadows = || {
            self.registrations.iter().filter_map(|(number, one)| match one {
                Registered::Shadow(shadow) => Some((*number, shadow)),
                _ => None,
            })
        };
        shadows().nth(pick(one, shadows().count())?)
    }

    fn install(&mut self, one: usize) {
        let Some(one) = pick(one, self.faults.len()) else { return };
        let (number, pages, seq, snapshot) = self.faults.swap_remove(one);
        let expected = self.model.install_shadow(number, seq, pages);
        let at = self.registrations.iter().position(|one| one.0 == number);
        let Some((_, Registered::Shadow(shadow))) = at.map(|at| &self.registrations[at]) else { return };
        let got = match shadow.try_install(snapshot, |_| ()) {
            Ok(()) => Answer::Done,
            Err(InstallError::Retry) => Answer::Retry,
            Err(InstallError::NotWatched) => Answer::NotWatched,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(got, expected);
    }

    fn watch(&mut self, thread: usize, one: usize, first: u64, more: u64) {
        let Some((number, _)) = self.shadow(one) else { return };
        if self.model.is_released(number) {
            return;
        }
        let (range, pages) = pages(first, more);
        let mm = self.model.mm_of(number);
        let refused = self.brackets.iter().any(|bracket| bracket.1 == thread);
        let blockers = if refused { Vec::new() } else { self.model.blockers(thread, mm) };
        let at = self.registrations.iter().position(|one| one.0 == number).expect("it was picked there");
        let (_, registered) = self.registrations.swap_remove(at);
        let Registered::Shadow(shadow) = registered else { panic!("it is a shadow") };
        let begun = self.workers[thread].begin(move |_| (shadow.watch([range], |_| ()), shadow));
        self.end_all(&blockers, &[]);
        let (got, shadow) = wait(&begun);
        // Now, as ends decide as their starts did.
        let expected = self.model.watch(thread, number, pages);
        self.registrations.push((number, Registered::Shadow(shadow)));
        assert_eq!(answer(got, Answer::WouldDeadlock), expected);
    }

    /// In a child nothing of all this is there, and what it drops stays the parent's.
    fn fork(&mut self) {
        let good = in_child(|| {
            let own = MmWithUser::new();
            let nobody = self.mms.iter().all(|(mm, _)| {
                drop(mm.invalidate(VaRange::ALL, Event::Clear));
                let tried = mm.try_invalidate(VaRange::ALL, Event::Clear).is_ok();
                tried
                    && mm.is_inherited()
                    && !mm.has_notifiers()
                    && !mm.clear_young(VaRange::ALL)
                    && mm.mmget_not_zero().is_none()
            });
            let refused = self
                .mms
                .iter()
                .flat_map(|(_, space)| &space.users)
                .all(|user| self.subsystems[0].get(user).is_err() && user.mmap_write_lock().is_err());
            let unread = self
                .intervals
                .iter()
                .all(|(_, interval, _)| interval.try_install(interval.read_begin(), |_| ()).is_err());
            drop((take(&mut self.subscriptions), take(&mut self.registrations), take(&mut self.intervals)));
            self.mms.clear();
            *self.shared.next.lock().unwrap() = (0, Alloc::Makes { refuses: false });
            let works = self.subsystems.iter().all(|subsystem| subsystem.synchronize().is_ok());
            let quiet = self.shared.calls.lock().unwrap().is_empty();
            let kept = !self.shared.freed_elsewhere.load(Ordering::SeqCst);
            nobody && refused && unread && works && quiet && kept && !own.is_inherited()
        });
        assert!(good, "a child has something of its parent's");
    }

    pub(super) fn run(&mut self, op: &Op) {
        match *op {
            Op::MmNew => {
                let user = MmWithUser::new();
                assert_eq!(self.model.mm_new(), self.mms.len());
                self.mms.push(((*user).clone(), Space { users: vec![user] }));
            }
            Op::MmGet(mm) => {
                let Some(mm) = pick(mm, self.mms.len()) else { return };
                let got = self.mms[mm].0.mmget_not_zero();
                assert_eq!(self.model.mm_get(mm) == Answer::Done, got.is_some());
                self.mms[mm].1.users.extend(got);
            }
            Op::MmPut(thread, mm) => self.mm_put(thread, mm),
            Op::Get(thread, key, mm, alloc) => self.get(thread, key, mm, alloc, false),
            Op::GetLocked(thread, key, mm, alloc) => self.get(thread, key, mm, alloc, true),
            Op::Clone(thread, one) => {
                let Some(one) = pick(one, self.subscriptions.len()) else { return };
                let (number, held) = self.subscriptions.swap_remove(one);
                let expected = self.model.clone(number);
                let (cloned, held) = self.workers[thread].run(move |_| (held.try_clone(), held));
                assert_eq!(cloned.as_ref().map_or(Answer::Overflow, |one| Answer::Got(number, one.users())), expected);
                self.subscriptions.extend(cloned.ok().into_iter().chain([held]).map(|one| (number, one)));
            }
            Op::Put(thread, one) => {
                let Some(one) = pick(one, self.subscriptions.len()) else { return };
                let (number, held) = self.subscriptions.swap_remove(one);
                self.model.put(number);
                self.workers[thread].run(move |_| held.put());
            }
            Op::Register(thread, mm, refuses) => {
                let probe = self.probe(refuses);
                self.register(thread, mm, Kind::Plain { refuses }, probe, Registered::Plain);
            }
            Op::RegisterTlb(thread, mm) => {
                let probe = Secondary(Tlb(self.probe(false)));
                self.register(thread, mm, Kind::Tlb, probe, Registered::Tlb);
            }
            Op::RegisterShadow(thread, mm, first, more) => {
                let (range, watched) = pages(first, more);
                let shadow = InvalidateSeq::new([range], Shadow(self.probe(false).mark));
                self.register(thread, mm, Kind::Shadow { watched }, shadow, Registered::Shadow);
            }
            Op::Forget(thread, one) | Op::UnregisterNoRelease(thread, one) => {
                let Some(one) = pick(one, self.registrations.len()) else { return };
                let (number, registered) = self.registrations.swap_remove(one);
                self.faults.retain(|fault| fault.0 != number);
                self.model.put(number);
                let forget = matches!(op, Op::Forget(..));
                self.workers[thread].run(move |_| {
                    each_kind!(registered, one => if forget { one.put() } else { one.unregister_no_release(drop) });
                });
            }
            Op::Unregister(thread, one) => self.unregister(thread, one),
            Op::Invalidate(thread, mm, first, more) => self.invalidate(thread, mm, first, more),
            Op::TryInvalidate(thread, mm, first, more) => self.try_invalidate(thread, mm, first, more),
            Op::End(one) => {
                let Some(one) = pick(one, self.brackets.len()) else { return };
                let (bracket, thread) = self.brackets[one];
                self.end(bracket, thread);
            }
            Op::Young(thread, mm, page) => {
                let Some(mm) = pick(mm, self.mms.len()) else { return };
                let (handle, range) = (self.mms[mm].0.clone(), pages(page, 0).0);
                let expected = (self.model.clear_young(mm), self.model.clear_young(mm), self.model.test_young(mm));
                let got = self.workers[thread].run(move |_| {
                    (handle.clear_flush_young(range), handle.clear_young(range), handle.test_young(range.start()))
                });
                assert_eq!(got, expected);
            }
            Op::Flush(thread, mm, page) => {
                let Some(mm) = pick(mm, self.mms.len()) else { return };
                let handle = self.mms[mm].0.clone();
                self.model.flush(mm);
                self.workers[thread].run(move |_| handle.invalidate_secondary_tlbs(pages(page, 0).0));
            }
            Op::Synchronize(thread, key) => self.synchronize(thread, key, false),
            Op::Drain(thread, key) => self.synchronize(thread, key, true),
            Op::Insert(thread, mm, first, more, refuses) => self.insert(thread, mm, first, more, refuses),
            Op::Remove(thread, one) => self.remove(thread, one),
            Op::ReadBegin(thread, one) => self.read_begin(thread, one),
            Op::TryInstall(thread, one) => {
                let Some(one) = pick(one, self.intervals.len()) else { return };
                let (number, interval, read) = self.intervals.swap_remove(one);
                let Some((expected, seq)) = read else { return self.intervals.push((number, interval, None)) };
                let expected = self.model.try_install(number, expected);
                let (got, interval) = self.workers[thread].run(move |_| (interval.try_install(seq, |_| ()), interval));
                assert_eq!(answer(got, Answer::Retry), expected);
                self.intervals.push((number, interval, read));
            }
            Op::Snapshot(one, page) => {
                let (range, pages) = pages(page, 1);
                let Some((number, shadow)) = self.shadow(one) else { return };
                let snapshot = shadow.snapshot(range);
                self.faults.push((number, pages, self.model.snapshot_shadow(number), snapshot));
            }
            Op::Install(_thread, one) => self.install(one),
            Op::Watch(thread, one, first, more) => self.watch(thread, one, first, more),
            Op::Fork => self.fork(),
        }
        self.agree();
    }

    /// Lets go of everything, and counts: as many are freed as were made, and no address space is held.
    pub(super) fn finish(mut self) {
        while !self.brackets.is_empty() {
            self.run(&Op::End(0));
        }
        drop((take(&mut self.subscriptions), take(&mut self.registrations), take(&mut self.intervals)));
        for subsystem in &self.subsystems {
            subsystem.drain_until_idle().unwrap();
        }
        let handles: Vec<_> = take(&mut self.mms).into_iter().map(|(mm, _)| mm).collect();
        wait_until(|| handles.iter().all(|mm| mm.mm_count() == 1));
        let freed = self.shared.freed.lock().unwrap();
        assert!(freed.iter().copied().eq(0..self.model.notifiers_made()), "made and not freed, or the other way round");
    }
}
