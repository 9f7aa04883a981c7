//! The longer operations. `World::run` has the code of the others.

use super::callbacks::{Entry, Probe, Shadow};
use super::threads::{Open, Tried, wait};
use super::world::{Registered, World, answer, pages, pick};
use mmu_notifier::{
    Event, GetError, InstallError, IntervalNotifier, InvalidateSeq, MmWithUser, Notifier,
    Registration, VaRange,
};
use std::mem::take;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use testkit::in_child;
use testkit::model::{Alloc, Answer, Kind};

impl World {
    /// Takes a user of the address space that `mm` chooses. Returns the index of the address space,
    /// and the user. Returns `None` if no user is left.
    fn user(&mut self, mm: usize) -> Option<(usize, MmWithUser)> {
        let mm = pick(mm, self.mms.len())?;
        Some((mm, self.mms[mm].1.users.pop()?))
    }

    pub(super) fn get(&mut self, thread: usize, key: usize, mm: usize, alloc: u8, locked: bool) {
        let alloc = if alloc == 3 {
            Alloc::Fails
        } else {
            Alloc::Makes {
                refuses: alloc == 2,
            }
        };
        let Some((mm, user)) = self.user(mm) else {
            return;
        };
        let waits = !self.model.finds(key, mm)
            && !self.model.is_inside(thread, mm)
            && alloc != Alloc::Fails;
        let blockers = if waits {
            self.model.blockers(thread, mm)
        } else {
            Vec::new()
        };
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
                self.subscriptions
                    .push((subscription.mark.number, subscription));
                answer
            }
            Err(GetError::WouldDeadlock) => Answer::WouldDeadlock,
            Err(GetError::Overflow) => Answer::Overflow,
            Err(GetError::Alloc(())) => Answer::Alloc,
            Err(error) => panic!("{error:?}"),
        };
        assert_eq!(got, expected);
    }

    pub(super) fn register<N: Notifier>(
        &mut self,
        thread: usize,
        mm: usize,
        kind: Kind,
        new: N,
        as_one: fn(Registration<N>) -> Registered,
    ) {
        let Some((mm, user)) = self.user(mm) else {
            return self.unmade(new);
        };
        let refused = self.model.is_inside(thread, mm);
        let blockers = if refused {
            Vec::new()
        } else {
            self.model.blockers(thread, mm)
        };
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

    /// Drops a notifier that was never registered. The next notifier gets its number.
    fn unmade<N>(&self, notifier: N) {
        drop(notifier);
        assert!(
            self.shared
                .freed
                .lock()
                .unwrap()
                .remove(&self.model.notifiers_made())
        );
    }

    pub(super) fn probe(&self, refuses: bool) -> Probe {
        Probe {
            mark: self.shared.mark(self.model.notifiers_made()),
            refuses,
        }
    }

    pub(super) fn unregister(&mut self, thread: usize, one: usize) {
        let Some(one) = pick(one, self.registrations.len()) else {
            return;
        };
        let (number, registered) = self.registrations.swap_remove(one);
        let mm = self.model.mm_of(number);
        let blockers = if self.model.is_inside(thread, mm) {
            Vec::new()
        } else {
            self.model.blockers(thread, mm)
        };
        let delisted: Vec<_> = self
            .model
            .listed(mm)
            .iter()
            .copied()
            .filter(|one| *one == number)
            .collect();
        let expected = self.model.unregister(thread, number);
        let begun = self.workers[thread].begin(move |_| registered.unregister());
        self.end_all(&blockers, &delisted);
        match wait(&begun) {
            Ok(()) => {
                assert_eq!(expected, Answer::Done);
                assert!(
                    self.shared.freed.lock().unwrap().contains(&number),
                    "dropped by the thread that has it back"
                );
                self.faults.retain(|fault| fault.0 != number);
            }
            Err(back) => {
                assert_eq!(expected, Answer::WouldDeadlock);
                self.registrations.push((number, back));
            }
        }
    }

    /// Drops a user. If it is the last one, this is exit.
    pub(super) fn mm_put(&mut self, thread: usize, mm: usize) {
        let Some(mm) = pick(mm, self.mms.len()) else {
            return;
        };
        let exits = self.mms[mm].1.users.len() == 1 && !self.model.is_inside(thread, mm);
        let mut blockers = if exits {
            self.model.blockers(thread, mm)
        } else {
            Vec::new()
        };
        if self.model.has_intervals(mm) {
            // Before exit, end the brackets that exit would wait for. Otherwise the order of the
            // threads would decide which windows overlap.
            self.end_all(&blockers, &[]);
            self.agree();
            blockers.clear();
        }
        let Some(user) = self.mms[mm].1.users.pop() else {
            return;
        };
        let listed = self.model.listed(mm).to_vec();
        self.model.mm_put(mm);
        let begun = self.workers[thread].begin(move |_| drop(user));
        self.end_all(&blockers, &listed);
        wait(&begun);
    }

    pub(super) fn synchronize(&mut self, thread: usize, key: usize, drain: bool) {
        let expected = self.model.synchronize(thread, key);
        let mut blockers = Vec::new();
        if expected.is_ok() {
            for mm in self.model.retired(key) {
                blockers.extend(self.model.blockers(thread, mm));
            }
        }
        let subsystem = Arc::clone(&self.subsystems[key]);
        let begun = self.workers[thread].begin(move |_| {
            if drain {
                subsystem.drain_until_idle()
            } else {
                subsystem.synchronize()
            }
        });
        self.end_all(&blockers, &[]);
        match (wait(&begun), expected) {
            (Ok(()), Ok(expected)) => {
                let freed = self.shared.freed.lock().unwrap();
                assert!(
                    expected.iter().all(|number| freed.contains(number)),
                    "freed {freed:?}, not {expected:?}"
                );
            }
            (answer, expected) => assert_eq!(answer.is_ok(), expected.is_ok()),
        }
    }

    pub(super) fn insert(
        &mut self,
        thread: usize,
        mm: usize,
        first: u64,
        more: u64,
        refuses: bool,
    ) {
        let Some((mm, user)) = self.user(mm) else {
            return;
        };
        let (range, pages) = pages(first, more);
        let waits = !self.model.has_intervals(mm) && !self.model.is_inside(thread, mm);
        let blockers = if waits {
            self.model.blockers(thread, mm)
        } else {
            Vec::new()
        };
        let number = self.model.intervals_made();
        let expected = self.model.insert(thread, mm, pages, refuses);
        let entry = Entry {
            number,
            refuses,
            shared: self.shared.clone(),
        };
        let begun = self.workers[thread]
            .begin(move |_| (IntervalNotifier::insert(&user, range, entry), user));
        self.end_all(&blockers, &[]);
        let (inserted, user) = wait(&begun);
        self.mms[mm].1.users.push(user);
        assert_eq!(expected == Answer::Got(number, 1), inserted.is_ok());
        self.intervals
            .extend(inserted.ok().map(|interval| (number, interval, None)));
    }

    pub(super) fn remove(&mut self, thread: usize, one: usize) {
        let Some(one) = pick(one, self.intervals.len()) else {
            return;
        };
        let (number, interval, seq) = self.intervals.swap_remove(one);
        let mm = self.model.mm_of_interval(number);
        let waits = self.model.snapshot(mm).0 % 2 == 1 && !self.model.is_inside(thread, mm);
        let blockers = if waits {
            self.model.blockers(thread, mm)
        } else {
            Vec::new()
        };
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

    pub(super) fn read_begin(&mut self, thread: usize, one: usize) {
        let Some(one) = pick(one, self.intervals.len()) else {
            return;
        };
        let (number, interval, _) = self.intervals.swap_remove(one);
        let mm = self.model.mm_of_interval(number);
        let waits = self.model.is_invalidating(number) && !self.model.is_inside(thread, mm);
        let blockers = if waits {
            self.model.blockers(thread, mm)
        } else {
            Vec::new()
        };
        let expected = self.model.read_begin(thread, number);
        let begun = self.workers[thread].begin(move |_| (interval.read_begin(), interval));
        self.end_all(&blockers, &[]);
        let (seq, interval) = wait(&begun);
        self.intervals
            .push((number, interval, Some((expected, seq))));
    }

    pub(super) fn invalidate(&mut self, thread: usize, mm: usize, first: u64, more: u64) {
        let Some(mm) = pick(mm, self.mms.len()) else {
            return;
        };
        let (range, pages) = pages(first, more);
        let bracket = self.model.invalidate(thread, mm, pages);
        let handle = self.mms[mm].0.clone();
        self.workers[thread].run(move |brackets| {
            let open = handle.invalidate_owned(range, Event::Clear);
            brackets.insert(bracket, Open::Owned { _bracket: open });
        });
        self.brackets.push((bracket, thread));
    }

    pub(super) fn try_invalidate(&mut self, thread: usize, mm: usize, first: u64, more: u64) {
        let Some(mm) = pick(mm, self.mms.len()) else {
            return;
        };
        let (range, pages) = pages(first, more);
        if self.model.is_ambiguous(mm, pages) {
            return;
        }
        let expected = self.model.try_invalidate(thread, mm, pages);
        let (handle, number) = (self.mms[mm].0.clone(), expected.unwrap_or_default());
        let opened = self.workers[thread].run(move |brackets| {
            let tried = Tried::new(handle, range, Event::Unmap);
            tried
                .map(|open| brackets.insert(number, Open::Tried { _bracket: open }))
                .is_ok()
        });
        assert_eq!(opened, expected.is_ok());
        self.brackets
            .extend(expected.ok().map(|bracket| (bracket, thread)));
    }

    pub(super) fn shadow(
        &self,
        one: usize,
    ) -> Option<(usize, &Registration<InvalidateSeq<Shadow>>)> {
        let shadows = || {
            self.registrations
                .iter()
                .filter_map(|(number, one)| match one {
                    Registered::Shadow(shadow) => Some((*number, shadow)),
                    _ => None,
                })
        };
        shadows().nth(pick(one, shadows().count())?)
    }

    pub(super) fn install(&mut self, one: usize) {
        let Some(one) = pick(one, self.faults.len()) else {
            return;
        };
        let (number, pages, seq, snapshot) = self.faults.swap_remove(one);
        let expected = self.model.install_shadow(number, seq, pages);
        let at = self.registrations.iter().position(|one| one.0 == number);
        let Some((_, Registered::Shadow(shadow))) = at.map(|at| &self.registrations[at]) else {
            return;
        };
        let got = match shadow.try_install(snapshot, |_| ()) {
            Ok(()) => Answer::Done,
            // The model knows one answer for both.
            Err(InstallError::Retry | InstallError::Exited) => Answer::Retry,
            Err(InstallError::NotWatched) => Answer::NotWatched,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(got, expected);
    }

    pub(super) fn watch(&mut self, thread: usize, one: usize, first: u64, more: u64) {
        let Some((number, _)) = self.shadow(one) else {
            return;
        };
        if self.model.is_released(number) {
            return;
        }
        let (range, pages) = pages(first, more);
        let mm = self.model.mm_of(number);
        let refused = self.brackets.iter().any(|bracket| bracket.1 == thread);
        let blockers = if refused {
            Vec::new()
        } else {
            self.model.blockers(thread, mm)
        };
        let at = self
            .registrations
            .iter()
            .position(|one| one.0 == number)
            .expect("it was picked there");
        let (_, registered) = self.registrations.swap_remove(at);
        let Registered::Shadow(shadow) = registered else {
            panic!("it is a shadow")
        };
        let begun = self.workers[thread].begin(move |_| (shadow.watch([range], |_| ()), shadow));
        self.end_all(&blockers, &[]);
        let (got, shadow) = wait(&begun);
        // Change the watched ranges in the model only now: when `end_all` ends the brackets, the
        // model must still have the ranges that were watched when they started.
        let expected = self.model.watch(thread, number, pages);
        self.registrations
            .push((number, Registered::Shadow(shadow)));
        assert_eq!(answer(got, Answer::WouldDeadlock), expected);
    }

    /// Forks. In the child, the parent's objects must call no callback and take no subscriber, and
    /// their drop must free nothing.
    pub(super) fn fork(&mut self) {
        let good = in_child(|| {
            let own = MmWithUser::new();
            let unheard = self.mms.iter().all(|(mm, _)| {
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
                .all(|user| {
                    self.subsystems[0].get(user).is_err() && user.mmap_write_lock().is_err()
                });
            let unread = self.intervals.iter().all(|(_, interval, _)| {
                interval.try_install(interval.read_begin(), |_| ()).is_err()
            });
            drop((
                take(&mut self.subscriptions),
                take(&mut self.registrations),
                take(&mut self.intervals),
            ));
            self.mms.clear();
            *self.shared.next.lock().unwrap() = (0, Alloc::Makes { refuses: false });
            let works = self
                .subsystems
                .iter()
                .all(|subsystem| subsystem.synchronize().is_ok());
            let quiet = self.shared.calls.lock().unwrap().is_empty();
            let kept = !self.shared.freed_elsewhere.load(Ordering::SeqCst);
            unheard && refused && unread && works && quiet && kept && !own.is_inherited()
        });
        assert!(good, "a child has something of its parent's");
    }
}
