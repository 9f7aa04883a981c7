//! The system calls of the tracees, from entry to exit, and again if the kernel restarts them.

use std::mem;
use std::rc::Rc;

use mmu_notifier::{Event, VaRange};

use super::super::abi::Abi;
use super::super::births::Birth;
use super::super::decode::{Context, Entry, Plan, Then};
use super::super::proc::Named;
use super::super::space::Space;
use super::super::sys::{Place, RawCall};
use super::super::task::{Elsewhere, Life, OpenCall, means_again};
use super::{Observer, Pid, Scope, TaskEvent, Tracer};

impl<O: Observer> Tracer<O> {
    /// Handles the entry of a system call. `picked` says whether the filter selected the call.
    pub(super) fn call_begins(&mut self, tid: Pid, raw: RawCall, picked: bool) {
        self.interrupted_calls_meet(tid, &raw);
        let Some(tracee) = self.tasks.get(&tid) else {
            return;
        };
        if tracee.filtered && !picked {
            // The task stops here because it has an interrupted call. If the filter selects this
            // call too, the task will stop once more.
            return;
        }
        let (Life::In(space, _), None) = (&tracee.life, &tracee.call) else {
            return;
        };
        let (task, space) = (tracee.task, Rc::clone(space));
        let RawCall {
            arch,
            number,
            mut args,
            ..
        } = raw;
        let Some((abi, number)) = Abi::of(arch, number) else {
            let _scope = Scope::new(task, "unknown", None);
            self.observer
                .event(&TaskEvent::UnknownAbi { task, arch, number });
            return;
        };
        let Some(call) = abi.call(number) else { return };
        if abi == Abi::Compat {
            args = args.map(|arg| arg & u64::from(u32::MAX));
        }
        let mut ranges = mem::take(&mut self.ranges);
        ranges.clear();
        let plan = space.update_brk(|brk| {
            let alone = space.tasks.get() == 1 && !self.in_doubt;
            let tasks = || self.tasks.keys().copied().collect();
            let mut copied =
                |ranges: &mut Vec<VaRange>| self.last_maps.writable(tid, space.mm.id(), ranges);
            Entry {
                tid,
                abi,
                call,
                args,
            }
            .plan(
                Context {
                    brk,
                    alone,
                    tasks: &tasks,
                    copied: &mut copied,
                },
                &mut ranges,
            )
        });
        let birth = Birth::of(call, &args).filter(|_| self.options.births);
        let only_birth = || {
            birth.map(|_| Plan {
                cause: call.name(),
                event: Event::Unmap,
                then: Then::Close,
            })
        };
        let plan = plan.or_else(only_birth);
        let acts = plan.and_then(|plan| Some((self.targets(&space, plan.then)?, plan)));
        if let Some(((here, others), plan)) = acts {
            let _scope = Scope::new(task, plan.cause, None);
            let open = |space: &Space| {
                ranges
                    .iter()
                    .map(|range| space.mm.invalidate_owned(*range, plan.event))
                    .collect()
            };
            let brackets = if here { open(&space) } else { Vec::new() };
            let elsewhere = others.into_iter().map(|other| {
                let brackets = open(&other);
                Elsewhere::new(other, brackets)
            });
            let elsewhere = elsewhere.collect();
            let compat = abi.is_compat();
            let call = OpenCall {
                raw,
                cause: plan.cause,
                space,
                brackets,
                elsewhere,
                then: plan.then,
                birth,
                compat,
            };
            if let Some(tracee) = self.tasks.get_mut(&tid) {
                tracee.call = Some(call);
            }
        }
        self.ranges = ranges;
    }

    /// Returns the address spaces that a call by a task in `own` acts on: whether `own` is one of
    /// them, and the others. Returns `None` if the call acts on no traced address space.
    fn targets(&self, own: &Rc<Space>, then: Then) -> Option<(bool, Vec<Rc<Space>>)> {
        let (here, mut others) = match then {
            Then::Elsewhere(Named::Stranger) => return None,
            Then::Elsewhere(Named::Task(pid)) => {
                // A leader that has ended still identifies its process.
                let leader = self.tasks.get(&pid).and_then(|tracee| tracee.space());
                let any = || {
                    self.tasks
                        .values()
                        .filter(|tracee| tracee.task.pid == pid)
                        .find_map(|tracee| tracee.space())
                };
                let target = leader.or_else(any)?;
                if Rc::ptr_eq(target, own) {
                    (true, Vec::new())
                } else {
                    (false, vec![Rc::clone(target)])
                }
            }
            Then::Elsewhere(Named::Anyone) => {
                (true, self.spaces_where(|space| !Rc::ptr_eq(space, own)))
            }
            _ => (true, Vec::new()),
        };
        if self.in_doubt {
            let known = |space: &Rc<Space>| {
                here && Rc::ptr_eq(space, own)
                    || others.iter().any(|other| Rc::ptr_eq(space, other))
            };
            let may_be = |space: &Rc<Space>| {
                here && space.may_be(own) || others.iter().any(|other| space.may_be(other))
            };
            let doubtful = self.spaces_where(|space| !known(space) && may_be(space));
            others.extend(doubtful);
        }
        Some((here, others))
    }

    /// Returns the address spaces that fulfil a condition, each once.
    pub(super) fn spaces_where(&self, condition: impl Fn(&Rc<Space>) -> bool) -> Vec<Rc<Space>> {
        let mut found: Vec<Rc<Space>> = self
            .tasks
            .values()
            .filter_map(|tracee| tracee.space())
            .filter(|space| condition(space))
            .cloned()
            .collect();
        found.sort_unstable_by_key(|space| space.mm.id());
        found.dedup_by_key(|space| space.mm.id());
        found
    }

    /// Handles the exit of a system call.
    pub(super) fn call_returns(&mut self, tid: Pid, result: i64, place: Place) {
        let Some(tracee) = self.tasks.get_mut(&tid) else {
            return;
        };
        let Some(call) = tracee.call.take() else {
            // This may be the return from a signal handler. If the task is then behind the
            // interrupted call, the kernel does not restart the call but makes it fail.
            if tracee
                .again
                .last()
                .is_some_and(|call| call.raw.place == place)
            {
                if let Some(call) = tracee.again.pop() {
                    self.finish(tid, call, Some(result));
                }
            }
            return;
        };
        let narrow = if call.compat {
            i64::from(result as i32)
        } else {
            result
        };
        if means_again(narrow) {
            tracee.again.push(call);
        } else {
            self.finish(tid, call, Some(result));
        }
    }

    /// Closes the interrupted calls that a task will never restart. If the task is about to restart
    /// one, makes that call the open one.
    fn interrupted_calls_meet(&mut self, tid: Pid, next: &RawCall) {
        while let Some(tracee) = self
            .tasks
            .get_mut(&tid)
            .filter(|tracee| tracee.call.is_none())
        {
            let Some(last) = tracee.again.last() else {
                return;
            };
            let is_made_again = last.is_made_again(next);
            let is_given_up = last.is_given_up_at(next.place)
                || tracee.again.iter().any(|call| call.is_made_again(next));
            match tracee.again.pop() {
                Some(call) if is_made_again => tracee.call = Some(call),
                Some(call) if is_given_up => self.finish(tid, call, None),
                Some(call) => return tracee.again.push(call),
                None => {}
            }
        }
    }

    /// Handles the end of a task, of its address space or of its tracing: none of its calls will
    /// return.
    pub(super) fn calls_are_cut(&mut self, tid: Pid) {
        let Some(tracee) = self.tasks.get_mut(&tid) else {
            return;
        };
        let again = mem::take(&mut tracee.again);
        let calls: Vec<OpenCall> = tracee
            .call
            .take()
            .into_iter()
            .chain(again.into_iter().rev())
            .collect();
        for call in calls {
            self.finish(tid, call, None);
        }
    }

    /// Ends a call: closes its brackets, learns the program break, and reports the mapping that the
    /// call has made.
    pub(super) fn finish(&mut self, tid: Pid, mut call: OpenCall, result: Option<i64>) {
        let Some(tracee) = self.tasks.get(&tid) else {
            return;
        };
        let _scope = Scope::new(tracee.task, call.cause, result);
        call.close();
        if call.then == Then::LearnBreak {
            let mask = if call.compat {
                u64::from(u32::MAX)
            } else {
                u64::MAX
            };
            call.space
                .update_brk(|brk| brk.finish(result.map(|result| result as u64 & mask)));
        }
        let born = call
            .birth
            .zip(result)
            .and_then(|(birth, result)| birth.range(tid, result as u64));
        if let Some(range) = born {
            self.observer.event(&TaskEvent::Mapped {
                task: tracee.task,
                mm: &call.space.mm,
                range,
            });
        }
    }

    /// Closes the brackets that tasks of other address spaces hold on an address space that is
    /// about to exit. Otherwise the exit would wait for these brackets, and the subscribers, which
    /// are put before the exit, would miss the end callbacks.
    pub(super) fn close_from_elsewhere(&mut self, space: &Rc<Space>) {
        for tracee in self.tasks.values_mut() {
            for call in tracee.call.iter_mut().chain(&mut tracee.again) {
                let _scope = Scope::new(tracee.task, call.cause, None);
                call.close_on(space);
            }
        }
    }
}
