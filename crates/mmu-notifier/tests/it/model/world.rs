//! The core's side: each object beside its number in the model.

use super::Op;
use super::callbacks::{Entry, Probe, SecondaryProbe, Shadow, Shared, Tlb};
use super::threads::Worker;
use crate::support::wait_until;
use mmu_notifier::{
    IntervalNotifier, InvalidateSeq, Mm, MmWithUser, Notifier, ReadSeq, Registration, Secondary,
    Snapshot, Subscription, Subsystem, Va, VaRange,
};
use std::collections::BTreeMap;
use std::mem::take;
use std::sync::Arc;
use testkit::model::{Alloc, Answer, Callback, Kind, Model, USERS_MAX};

pub(super) const THREADS: usize = 3;

type Make = Box<dyn Fn(&MmWithUser) -> Result<Probe, ()> + Send + Sync>;
type Probes = Subsystem<Probe, (), Make>;

/// A registration of any kind.
pub(super) enum Registered {
    Plain(Registration<Probe>),
    Tlb(Registration<SecondaryProbe>),
    Shadow(Registration<InvalidateSeq<Shadow>>),
}

/// Evaluates `$do` for a registration of any kind.
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
    pub(super) fn unregister(self) -> Result<(), Self> {
        fn of<N: Notifier>(
            one: Registration<N>,
            back: fn(Registration<N>) -> Registered,
        ) -> Result<(), Registered> {
            one.unregister()
                .map(drop)
                .map_err(|refused| back(refused.registration))
        }
        match self {
            Self::Plain(one) => of(one, Self::Plain),
            Self::Tlb(one) => of(one, Self::Tlb),
            Self::Shadow(one) => of(one, Self::Shadow),
        }
    }
}

/// The answers of the model and of the core at the last `read_begin`.
type Seq = (u64, ReadSeq);

#[derive(Default)]
pub(super) struct Space {
    pub(super) users: Vec<MmWithUser>,
}

pub(super) struct World {
    pub(super) model: Model,
    pub(super) shared: Shared,
    pub(super) subsystems: [Arc<Probes>; 2],
    pub(super) workers: [Worker; THREADS],
    pub(super) mms: Vec<(Mm, Space)>,
    pub(super) subscriptions: Vec<(usize, Subscription<Probe>)>,
    pub(super) registrations: Vec<(usize, Registered)>,
    /// The brackets that are open: their number and thread.
    pub(super) brackets: Vec<(usize, usize)>,
    pub(super) intervals: Vec<(usize, IntervalNotifier<Entry>, Option<Seq>)>,
    /// Faults that have begun: the shadow, the pages, and the snapshots of the model and of the
    /// core.
    pub(super) faults: Vec<(usize, (u64, u64), u64, Snapshot)>,
    /// How many more times than the model says each callback may come.
    extra: BTreeMap<Callback, usize>,
    parallel: bool,
}

/// Chooses one of `len` objects.
pub(super) fn pick(number: usize, len: usize) -> Option<usize> {
    number.checked_rem(len)
}

pub(super) fn pages(first: u64, more: u64) -> (VaRange, (u64, u64)) {
    (
        VaRange::covering(Va::new(first << 12), (more + 1) << 12).unwrap(),
        (first, first + more),
    )
}

pub(super) fn answer<E>(result: Result<(), E>, error: Answer) -> Answer {
    result.map_or(error, |()| Answer::Done)
}

impl World {
    pub(super) fn new() -> Self {
        let shared = Shared::new();
        let subsystem = || {
            let shared = shared.clone();
            let make: Make = Box::new(move |_| match *shared.next.lock().unwrap() {
                (_, Alloc::Fails) => Err(()),
                (number, Alloc::Makes { refuses }) => Ok(Probe {
                    mark: shared.mark(number),
                    refuses,
                }),
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

    /// Checks that the callbacks of the last operation are those of the model. The callbacks of
    /// intervals may come in any order, but a second pass comes after each first pass. If other
    /// threads have ended brackets meanwhile, all callbacks may come in any order, and also those
    /// of `extra` may come.
    pub(super) fn agree(&mut self) {
        let (mut told, mut expected) = (
            take(&mut *self.shared.calls.lock().unwrap()),
            take(&mut self.model.calls),
        );
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
                *left = left
                    .checked_sub(1)
                    .unwrap_or_else(|| panic!("{callback:?} came and should not have"));
            }
        } else {
            let last_start = told
                .iter()
                .rposition(|call| matches!(call, Callback::Interval(_)));
            let first_finish = told
                .iter()
                .position(|call| matches!(call, Callback::Finish(_)));
            assert!(
                last_start.is_none_or(|last| first_finish.is_none_or(|first| last < first)),
                "{told:?}"
            );
            let split = |calls: Vec<Callback>| -> (Vec<Callback>, Vec<Callback>) {
                calls
                    .iter()
                    .partition(|call| matches!(call, Callback::Interval(_) | Callback::Finish(_)))
            };
            let ((mut told, others), (mut expected, others_expected)) =
                (split(told), split(expected));
            told.sort();
            expected.sort();
            assert_eq!((told, others), (expected, others_expected));
        }
        assert!(self.model.is_sound());
        for (number, (mm, space)) in self.mms.iter().enumerate() {
            assert_eq!(mm.interval_snapshot(), self.model.snapshot(number));
            assert_eq!(mm.has_notifiers(), self.model.has_notifiers(number));
            assert_eq!(
                (mm.callback_panics(), mm.mm_users()),
                (0, space.users.len())
            );
        }
    }

    /// Ends the brackets that a running operation waits for, each in its thread.
    pub(super) fn end_all(&mut self, blockers: &[(usize, usize)], delisted: &[usize]) {
        self.parallel |= !blockers.is_empty();
        for (bracket, thread) in blockers {
            // The end may or may not call a subscriber that is delisted at the same time.
            for notifier in delisted {
                *self.extra.entry(Callback::End(*notifier)).or_default() += 1;
            }
            self.end(*bracket, *thread);
        }
    }

    pub(super) fn end(&mut self, bracket: usize, thread: usize) {
        self.brackets.retain(|one| *one != (bracket, thread));
        self.model.end(bracket);
        self.workers[thread].run(move |brackets| drop(brackets.remove(&bracket)));
    }

    pub(super) fn run(&mut self, op: &Op) {
        match *op {
            Op::MmNew => {
                let user = MmWithUser::new();
                assert_eq!(self.model.mm_new(), self.mms.len());
                self.mms
                    .push(((*user).clone(), Space { users: vec![user] }));
            }
            Op::MmGet(mm) => {
                let Some(mm) = pick(mm, self.mms.len()) else {
                    return;
                };
                let got = self.mms[mm].0.mmget_not_zero();
                assert_eq!(self.model.mm_get(mm) == Answer::Done, got.is_some());
                self.mms[mm].1.users.extend(got);
            }
            Op::MmPut(thread, mm) => self.mm_put(thread, mm),
            Op::Get(thread, key, mm, alloc) => self.get(thread, key, mm, alloc, false),
            Op::GetLocked(thread, key, mm, alloc) => self.get(thread, key, mm, alloc, true),
            Op::Clone(thread, one) => {
                let Some(one) = pick(one, self.subscriptions.len()) else {
                    return;
                };
                let (number, held) = self.subscriptions.swap_remove(one);
                let expected = self.model.clone(number);
                let (cloned, held) = self.workers[thread].run(move |_| (held.try_clone(), held));
                assert_eq!(
                    cloned
                        .as_ref()
                        .map_or(Answer::Overflow, |one| Answer::Got(number, one.users())),
                    expected
                );
                self.subscriptions.extend(
                    cloned
                        .ok()
                        .into_iter()
                        .chain([held])
                        .map(|one| (number, one)),
                );
            }
            Op::Put(thread, one) => {
                let Some(one) = pick(one, self.subscriptions.len()) else {
                    return;
                };
                let (number, held) = self.subscriptions.swap_remove(one);
                self.model.put(number);
                self.workers[thread].run(move |_| held.put());
            }
            Op::Register(thread, mm, refuses) => {
                let probe = self.probe(refuses);
                self.register(
                    thread,
                    mm,
                    Kind::Plain { refuses },
                    probe,
                    Registered::Plain,
                );
            }
            Op::RegisterTlb(thread, mm) => {
                let probe = Secondary(Tlb(self.probe(false)));
                self.register(thread, mm, Kind::Tlb, probe, Registered::Tlb);
            }
            Op::RegisterShadow(thread, mm, first, more) => {
                let (range, watched) = pages(first, more);
                let shadow = InvalidateSeq::new([range], Shadow(self.probe(false).mark));
                self.register(
                    thread,
                    mm,
                    Kind::Shadow { watched },
                    shadow,
                    Registered::Shadow,
                );
            }
            Op::Forget(thread, one) | Op::UnregisterNoRelease(thread, one) => {
                let Some(one) = pick(one, self.registrations.len()) else {
                    return;
                };
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
            Op::TryInvalidate(thread, mm, first, more) => {
                self.try_invalidate(thread, mm, first, more)
            }
            Op::End(one) => {
                let Some(one) = pick(one, self.brackets.len()) else {
                    return;
                };
                let (bracket, thread) = self.brackets[one];
                self.end(bracket, thread);
            }
            Op::Young(thread, mm, page) => {
                let Some(mm) = pick(mm, self.mms.len()) else {
                    return;
                };
                let (handle, range) = (self.mms[mm].0.clone(), pages(page, 0).0);
                let expected = (
                    self.model.clear_young(mm),
                    self.model.clear_young(mm),
                    self.model.test_young(mm),
                );
                let got = self.workers[thread].run(move |_| {
                    (
                        handle.clear_flush_young(range),
                        handle.clear_young(range),
                        handle.test_young(range.start()),
                    )
                });
                assert_eq!(got, expected);
            }
            Op::Flush(thread, mm, page) => {
                let Some(mm) = pick(mm, self.mms.len()) else {
                    return;
                };
                let handle = self.mms[mm].0.clone();
                self.model.flush(mm);
                self.workers[thread]
                    .run(move |_| handle.invalidate_secondary_tlbs(pages(page, 0).0));
            }
            Op::Synchronize(thread, key) => self.synchronize(thread, key, false),
            Op::Drain(thread, key) => self.synchronize(thread, key, true),
            Op::Insert(thread, mm, first, more, refuses) => {
                self.insert(thread, mm, first, more, refuses)
            }
            Op::Remove(thread, one) => self.remove(thread, one),
            Op::ReadBegin(thread, one) => self.read_begin(thread, one),
            Op::TryInstall(thread, one) => {
                let Some(one) = pick(one, self.intervals.len()) else {
                    return;
                };
                let (number, interval, read) = self.intervals.swap_remove(one);
                let Some((expected, seq)) = read else {
                    return self.intervals.push((number, interval, None));
                };
                let expected = self.model.try_install(number, expected);
                let (got, interval) = self.workers[thread]
                    .run(move |_| (interval.try_install(seq, |_| ()), interval));
                assert_eq!(answer(got, Answer::Retry), expected);
                self.intervals.push((number, interval, read));
            }
            Op::Snapshot(one, page) => {
                let (range, pages) = pages(page, 1);
                let Some((number, shadow)) = self.shadow(one) else {
                    return;
                };
                let snapshot = shadow.snapshot(range);
                self.faults
                    .push((number, pages, self.model.snapshot_shadow(number), snapshot));
            }
            Op::Install(_thread, one) => self.install(one),
            Op::Watch(thread, one, first, more) => self.watch(thread, one, first, more),
            Op::Fork => self.fork(),
        }
        self.agree();
    }

    /// Drops everything. Then all notifiers that were made must be freed, and no reference may keep
    /// an address space.
    pub(super) fn finish(mut self) {
        while !self.brackets.is_empty() {
            self.run(&Op::End(0));
        }
        drop((
            take(&mut self.subscriptions),
            take(&mut self.registrations),
            take(&mut self.intervals),
        ));
        for subsystem in &self.subsystems {
            subsystem.drain_until_idle().unwrap();
        }
        let handles: Vec<_> = take(&mut self.mms).into_iter().map(|(mm, _)| mm).collect();
        wait_until(|| handles.iter().all(|mm| mm.mm_count() == 1));
        let freed = self.shared.freed.lock().unwrap();
        assert!(
            freed.iter().copied().eq(0..self.model.notifiers_made()),
            "made and not freed, or the other way round"
        );
    }
}
