//! Random operations, run on the core and on the reference model, must agree in every answer and every callback.

use mmu_notifier::{
    Event, Finish, GetError, IntervalNotifier, IntervalOps, InvalidateRange, Mm, MmWithUser, Notifier, OwnedBracket,
    ReadSeq, Registration, Subscription, Subsystem, Va, VaRange, WouldBlock,
};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use testkit::model::{Answer, Callback, Model};

/// One step. Numbers choose among what there is, modulo how many there are.
#[derive(Debug, Clone)]
enum Op {
    MmNew,
    MmGet(usize),
    MmPut(usize),
    Get(usize, usize, bool),
    Clone(usize),
    Put(usize),
    Register(usize, bool),
    Unregister(usize),
    Forget(usize),
    Invalidate(usize, u64, u64),
    TryInvalidate(usize, u64, u64),
    End(usize),
    Synchronize(usize),
    Insert(usize, u64, u64),
    Remove(usize),
    ReadBegin(usize),
    TryInstall(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let n = || 0..16_usize;
    let (page, count) = (|| 0..12_u64, || 0..3_u64);
    prop_oneof![
        1 => Just(Op::MmNew),
        1 => n().prop_map(Op::MmGet),
        2 => n().prop_map(Op::MmPut),
        6 => (0..2_usize, n(), any::<bool>()).prop_map(|(key, mm, refuses)| Op::Get(key, mm, refuses)),
        2 => n().prop_map(Op::Clone),
        4 => n().prop_map(Op::Put),
        2 => (n(), any::<bool>()).prop_map(|(mm, refuses)| Op::Register(mm, refuses)),
        2 => n().prop_map(Op::Unregister),
        1 => n().prop_map(Op::Forget),
        4 => (n(), page(), count()).prop_map(|(mm, page, count)| Op::Invalidate(mm, page, count)),
        4 => (n(), page(), count()).prop_map(|(mm, page, count)| Op::TryInvalidate(mm, page, count)),
        6 => n().prop_map(Op::End),
        1 => (0..2_usize).prop_map(Op::Synchronize),
        5 => (n(), page(), count()).prop_map(|(mm, page, count)| Op::Insert(mm, page, count)),
        3 => n().prop_map(Op::Remove),
        4 => n().prop_map(Op::ReadBegin),
        4 => n().prop_map(Op::TryInstall),
    ]
}

#[derive(Clone, Default)]
struct Shared {
    calls: Arc<Mutex<Vec<Callback>>>,
    freed: Arc<Mutex<BTreeSet<usize>>>,
    /// The number and temper of the next notifier that an `alloc` makes.
    next: Arc<Mutex<(usize, bool)>>,
}

impl Shared {
    fn call(&self, callback: Callback) {
        self.calls.lock().unwrap().push(callback);
    }

    fn probe(&self, number: usize, refuses: bool) -> Probe {
        Probe { number, refuses, shared: self.clone() }
    }
}

struct Probe {
    number: usize,
    refuses: bool,
    shared: Shared,
}

impl Notifier for Probe {
    fn release(&self, _mm: &Mm) {
        self.shared.call(Callback::Release(self.number));
    }
    fn invalidate_range_start(&self, _range: &InvalidateRange<'_>) {
        self.shared.call(Callback::Start(self.number));
    }
    fn try_invalidate_range_start(&self, _range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        self.shared.call(Callback::TryStart(self.number));
        if self.refuses { Err(WouldBlock) } else { Ok(()) }
    }
    fn invalidate_range_end(&self, _range: &InvalidateRange<'_>) {
        self.shared.call(Callback::End(self.number));
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        assert!(self.shared.freed.lock().unwrap().insert(self.number), "freed twice");
    }
}

struct Entry(usize, Shared);

impl IntervalOps for Entry {
    fn invalidate(&mut self, _range: &InvalidateRange<'_>) -> Option<Finish> {
        self.1.call(Callback::Interval(self.0));
        None
    }
}

type Alloc = Box<dyn Fn(&MmWithUser) -> Result<Probe, Infallible> + Send + Sync>;

/// What the model and the core said at the last `read_begin`.
type Seq = (u64, ReadSeq);

/// The core's side, each thing beside its number in the model.
struct World {
    model: Model,
    shared: Shared,
    subsystems: [Subsystem<Probe, Infallible, Alloc>; 2],
    mms: Vec<(Mm, Vec<MmWithUser>)>,
    subscriptions: Vec<Subscription<Probe>>,
    registrations: Vec<Registration<Probe>>,
    brackets: Vec<(usize, OwnedBracket)>,
    intervals: Vec<(IntervalNotifier<Entry>, Option<Seq>)>,
    notifiers: usize,
}

/// Chooses one of `len`.
fn pick(number: usize, len: usize) -> Option<usize> {
    number.checked_rem(len)
}

fn pages(first: u64, more: u64) -> (VaRange, (u64, u64)) {
    (VaRange::covering(Va::new(first << 12), (more + 1) << 12).unwrap(), (first, first + more))
}

impl World {
    fn new() -> Self {
        let shared = Shared::default();
        let subsystem = || {
            let shared = shared.clone();
            let alloc: Alloc = Box::new(move |_| {
                let (number, refuses) = *shared.next.lock().unwrap();
                Ok(shared.probe(number, refuses))
            });
            Subsystem::new(alloc)
        };
        Self {
            model: Model::default(),
            subsystems: [subsystem(), subsystem()],
            shared,
            mms: Vec::new(),
            subscriptions: Vec::new(),
            registrations: Vec::new(),
            brackets: Vec::new(),
            intervals: Vec::new(),
            notifiers: 0,
        }
    }

    /// The callbacks of the last operation are those of the model; intervals that begin at one page come in any order.
    fn agree(&mut self) {
        let split = |calls: &[Callback]| -> (Vec<Callback>, Vec<Callback>) {
            calls.iter().partition(|call| matches!(call, Callback::Interval(_)))
        };
        let (mut told, others) = split(&std::mem::take(&mut *self.shared.calls.lock().unwrap()));
        let (mut expected, others_expected) = split(&std::mem::take(&mut self.model.calls));
        told.sort();
        expected.sort();
        assert_eq!((told, others), (expected, others_expected));
        for (number, (mm, _)) in self.mms.iter().enumerate() {
            assert_eq!(mm.interval_snapshot(), self.model.snapshot(number));
            assert_eq!(mm.has_notifiers(), self.model.has_notifiers(number));
            assert_eq!(mm.callback_panics(), 0);
        }
    }

    fn get(&mut self, key: Option<usize>, mm: usize, refuses: bool) {
        let Some(mm) = pick(mm, self.mms.len()) else { return };
        let Some(user) = self.mms[mm].1.first() else { return };
        let expected = match key {
            Some(key) => self.model.get(key, mm, refuses),
            None => self.model.register(None, mm, refuses),
        };
        *self.shared.next.lock().unwrap() = (self.notifiers, refuses);
        let got = match key {
            Some(key) => match self.subsystems[key].get(user) {
                Ok(subscription) => {
                    let answer = Answer::Got(subscription.number, subscription.users());
                    self.subscriptions.push(subscription);
                    answer
                }
                Err(GetError::WouldDeadlock) => Answer::WouldDeadlock,
                Err(error) => panic!("{error}"),
            },
            None => match Registration::new(user, self.shared.probe(self.notifiers, refuses)) {
                Ok(registration) => {
                    self.registrations.push(registration);
                    Answer::Got(self.notifiers, 1)
                }
                Err(failed) => {
                    drop(failed.notifier);
                    // Its number goes to the next one.
                    self.shared.freed.lock().unwrap().remove(&self.notifiers);
                    Answer::WouldDeadlock
                }
            },
        };
        assert_eq!(got, expected);
        self.notifiers += usize::from(got == Answer::Got(self.notifiers, 1));
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::MmNew => {
                let user = MmWithUser::new();
                assert_eq!(self.model.mm_new(), self.mms.len());
                self.mms.push(((*user).clone(), vec![user]));
            }
            Op::MmGet(mm) => {
                let Some(mm) = pick(mm, self.mms.len()) else { return };
                let got = self.mms[mm].0.mmget_not_zero();
                assert_eq!(self.model.mm_get(mm) == Answer::Done, got.is_some());
                self.mms[mm].1.extend(got);
            }
            Op::MmPut(mm) => {
                let Some(mm) = pick(mm, self.mms.len()) else { return };
                let Some(user) = self.mms[mm].1.pop() else { return };
                self.model.mm_put(mm);
                drop(user);
            }
            Op::Get(key, mm, refuses) => self.get(Some(key), mm, refuses),
            Op::Register(mm, refuses) => self.get(None, mm, refuses),
            Op::Clone(one) => {
                let Some(one) = pick(one, self.subscriptions.len()) else { return };
                let clone = self.subscriptions[one].try_clone().unwrap();
                assert_eq!(self.model.clone(clone.number), Answer::Got(clone.number, clone.users()));
                self.subscriptions.push(clone);
            }
            Op::Put(one) => {
                let Some(one) = pick(one, self.subscriptions.len()) else { return };
                let subscription = self.subscriptions.swap_remove(one);
                self.model.put(subscription.number);
                subscription.put();
            }
            Op::Forget(one) => {
                let Some(one) = pick(one, self.registrations.len()) else { return };
                let registration = self.registrations.swap_remove(one);
                self.model.put(registration.number);
                registration.put();
            }
            Op::Unregister(one) => {
                let Some(one) = pick(one, self.registrations.len()) else { return };
                let registration = self.registrations.swap_remove(one);
                let expected = self.model.unregister(registration.number);
                let answer = match registration.unregister() {
                    Ok(_probe) => Answer::Done,
                    Err(refused) => {
                        self.registrations.push(refused.registration);
                        Answer::WouldDeadlock
                    }
                };
                assert_eq!(answer, expected);
            }
            Op::Invalidate(mm, first, more) => {
                let Some(mm) = pick(mm, self.mms.len()) else { return };
                let (range, pages) = pages(first, more);
                let bracket = self.mms[mm].0.invalidate_owned(range, Event::Clear);
                self.brackets.push((self.model.invalidate(mm, pages), bracket));
            }
            Op::TryInvalidate(mm, first, more) => {
                let Some(mm) = pick(mm, self.mms.len()) else { return };
                let (range, pages) = pages(first, more);
                let bracket = self.mms[mm].0.try_invalidate(range, Event::Clear);
                let expected = self.model.try_invalidate(mm, pages);
                assert_eq!(bracket.is_ok(), expected.is_ok());
                if let (Ok(bracket), Ok(number)) = (bracket, expected) {
                    let starts = self.model.calls.clone();
                    drop(bracket);
                    self.model.end(number);
                    self.model.calls.splice(0..0, starts);
                }
            }
            Op::End(one) => {
                let Some(one) = pick(one, self.brackets.len()) else { return };
                let (number, bracket) = self.brackets.swap_remove(one);
                self.model.end(number);
                drop(bracket);
            }
            Op::Synchronize(key) => match (self.subsystems[key].synchronize(), self.model.synchronize(key)) {
                (Ok(()), Ok(expected)) => {
                    let freed = self.shared.freed.lock().unwrap();
                    assert!(expected.iter().all(|number| freed.contains(number)), "freed {freed:?}, not {expected:?}");
                }
                (answer, expected) => assert_eq!(answer.is_ok(), expected.is_ok()),
            },
            Op::Insert(mm, first, more) => {
                let Some(mm) = pick(mm, self.mms.len()) else { return };
                let Some(user) = self.mms[mm].1.first() else { return };
                let (range, pages) = pages(first, more);
                let number = self.model_intervals();
                let inserted = IntervalNotifier::insert(user, range, Entry(number, self.shared.clone()));
                assert_eq!(self.model.insert(mm, pages) == Answer::Got(number, 1), inserted.is_ok());
                self.intervals.extend(inserted.ok().map(|interval| (interval, None)));
            }
            Op::Remove(one) => {
                let Some(one) = pick(one, self.intervals.len()) else { return };
                let (interval, seq) = self.intervals.swap_remove(one);
                let number = interval.with_state(|entry| entry.0);
                let expected = self.model.remove(number);
                match interval.remove() {
                    Ok(_entry) => assert_eq!(expected, Answer::Done),
                    Err(refused) => {
                        assert_eq!(expected, Answer::WouldDeadlock);
                        self.intervals.push((refused.interval, seq));
                    }
                }
            }
            Op::ReadBegin(one) => {
                let Some(one) = pick(one, self.intervals.len()) else { return };
                let (interval, seq) = &mut self.intervals[one];
                *seq = Some((self.model.read_begin(interval.with_state(|entry| entry.0)), interval.read_begin()));
            }
            Op::TryInstall(one) => {
                let Some(one) = pick(one, self.intervals.len()) else { return };
                let (interval, Some((expected, seq))) = &self.intervals[one] else { return };
                let number = interval.with_state(|entry| entry.0);
                let installed = interval.try_install(*seq, |_| ()).is_ok();
                assert_eq!(installed, self.model.try_install(number, *expected) == Answer::Done);
            }
        }
        self.agree();
    }

    fn model_intervals(&self) -> usize {
        self.model.intervals_made()
    }
}

impl Drop for World {
    /// Brackets first: what else is dropped waits for them.
    fn drop(&mut self) {
        self.brackets.clear();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_operations_agree_with_the_model(ops in proptest::collection::vec(op(), 1..120)) {
        let mut world = World::new();
        world.run(&Op::MmNew);
        for op in &ops {
            world.run(op);
        }
    }
}
