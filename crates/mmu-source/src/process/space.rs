//! One traced address space.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use mmu_notifier::MmWithUser;

/// An address space and the tracer's state for it. The tasks of the address space and their open
/// calls share this value. When the last share is dropped, the address space exits.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) mm: MmWithUser,
    pub(super) brk: Cell<Break>,
    /// The number of live tasks in the address space.
    pub(super) tasks: Cell<u32>,
    /// The number of calls by tasks of other address spaces that hold brackets on this one.
    pub(super) from_elsewhere: Cell<u32>,
    /// The address spaces that may be this one: the tracer could not learn whether the first task
    /// here shares their memory.
    perhaps: RefCell<Vec<Weak<Space>>>,
}

impl Space {
    pub(super) fn new(brk: Break) -> Space {
        Space {
            mm: MmWithUser::new(),
            brk: Cell::new(brk),
            tasks: Cell::new(0),
            from_elsewhere: Cell::new(0),
            perhaps: RefCell::default(),
        }
    }

    /// Makes an address space that may be identical to one of `others`. An event in one of `others`
    /// is also reported in the new one, and vice versa.
    pub(super) fn doubtful<'a>(others: impl IntoIterator<Item = &'a Rc<Space>>) -> Space {
        let space = Space::new(Break::default());
        space
            .perhaps
            .borrow_mut()
            .extend(others.into_iter().map(Rc::downgrade));
        space
    }

    /// Records that this address space is different from all that existed when it was made.
    pub(super) fn is_its_own(&self) {
        self.perhaps.take();
    }

    /// Tells whether the two values may stand for the same address space.
    pub(super) fn may_be(&self, other: &Space) -> bool {
        let names = |a: &Space, b: &Space| {
            a.perhaps
                .borrow()
                .iter()
                .any(|weak| std::ptr::eq(weak.as_ptr(), b))
        };
        names(self, other) || names(other, self)
    }

    pub(super) fn update_brk<R>(&self, change: impl FnOnce(&mut Break) -> R) -> R {
        let mut brk = self.brk.get();
        let result = change(&mut brk);
        self.brk.set(brk);
        result
    }
}

/// What the tracer knows of the program break.
///
/// In a process with one thread, a call that grows the heap does not stop at its exit, so the
/// tracer does not learn whether the call succeeded. If the tracer must know the break, or if calls
/// of several threads have overlapped, it reads `/proc`.
///
/// # Invariants
/// If `sure` is known, the break lies between `sure` and `high`. `high` is at least the address
/// that any call in flight has requested.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Break {
    sure: Option<u64>,
    high: u64,
    in_flight: u32,
    overlapped: bool,
    /// The program has just been loaded and has no heap yet, so a call cannot shrink it.
    no_heap: bool,
}

/// What a call of `brk` is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BreakCall {
    /// If the call shrinks the heap, it unmaps from the new break to this address.
    pub(super) shrinks_from: Option<u64>,
    /// Whether the tracer needs the result. The call is then in flight until [`Break::finish`].
    pub(super) learn: bool,
}

impl Break {
    /// What is known after `execve` has just loaded a program.
    pub(super) fn of_new_program() -> Break {
        Break {
            no_heap: true,
            ..Break::default()
        }
    }

    /// Records a call. `heap_end` reads `/proc`. `alone` says that no other thread can be in `brk`.
    pub(super) fn begin(
        &mut self,
        new: u64,
        alone: bool,
        heap_end: impl FnOnce() -> Option<u64>,
    ) -> BreakCall {
        let mut end = match self.sure {
            // The break is known exactly, or the new address is above all earlier requests, so the
            // call grows the heap.
            Some(sure) if sure == self.high || new >= self.high => self.high,
            Some(_) => heap_end().map_or(self.high, |end| end.min(self.high)),
            None if self.no_heap => 0,
            None => heap_end().unwrap_or(0),
        };
        self.no_heap = false;
        if self.in_flight > 0 {
            self.overlapped = true;
            end = end.max(self.high);
        }
        let shrinks = new < end;
        let learn = shrinks || !alone || self.sure.is_none();
        self.high = self.high.max(new).max(end);
        if learn {
            self.in_flight += 1;
        }
        BreakCall {
            shrinks_from: shrinks.then_some(end),
            learn,
        }
    }

    /// Records the result of a call in flight, or `None` if its task died in the call.
    pub(super) fn finish(&mut self, result: Option<u64>) {
        self.in_flight -= 1;
        if self.in_flight > 0 {
            self.overlapped = true;
            return;
        }
        self.sure = result.filter(|_| !self.overlapped);
        self.high = self.sure.unwrap_or(0);
        self.overlapped = false;
    }

    /// Returns what is known of the break in a forked child.
    pub(super) fn inherited(self) -> Break {
        if self.in_flight == 0 {
            self
        } else {
            Break::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(at: u64) -> Break {
        Break {
            sure: Some(at),
            high: at,
            ..Break::default()
        }
    }

    #[test]
    fn the_first_call_learns_the_break_and_a_later_growth_needs_no_exit() {
        let mut brk = Break::default();
        assert_eq!(
            brk.begin(0x9000, true, || None),
            BreakCall {
                shrinks_from: None,
                learn: true
            }
        );
        brk.finish(Some(0x9000));
        let grow = brk.begin(0xa000, true, || panic!("known"));
        assert_eq!(
            grow,
            BreakCall {
                shrinks_from: None,
                learn: false
            }
        );
        assert_eq!(
            brk.begin(0xb000, true, || panic!("known well enough")),
            grow
        );
    }

    #[test]
    fn a_program_just_loaded_has_no_heap_to_look_for() {
        let mut brk = Break::of_new_program();
        let first = brk.begin(0x9000, true, || panic!("there is none"));
        assert_eq!(
            first,
            BreakCall {
                shrinks_from: None,
                learn: true
            }
        );
        assert_eq!(
            brk.begin(0x8000, false, || Some(0x9000)).shrinks_from,
            Some(0x9000),
            "the first is in flight"
        );
    }

    #[test]
    fn a_shrink_after_a_growth_of_unknown_success_asks_proc() {
        let mut brk = settled(0x9000);
        brk.begin(0xa000, true, || None);
        let failed = Break::begin(&mut { brk }, 0x8000, true, || Some(0x9000));
        assert_eq!(failed.shrinks_from, Some(0x9000));
        let joined = brk.begin(0x8000, true, || Some(0xf000));
        assert_eq!(
            joined.shrinks_from,
            Some(0xa000),
            "a neighbour of the heap is not the heap"
        );
    }

    #[test]
    fn calls_that_overlap_leave_the_break_unknown() {
        let mut brk = settled(0x9000);
        brk.begin(0xb000, false, || None);
        assert_eq!(
            brk.begin(0x8000, false, || Some(0x9000)).shrinks_from,
            Some(0xb000)
        );
        brk.finish(Some(0xb000));
        brk.finish(Some(0x8000));
        assert_eq!(brk.sure, None);
        assert_eq!(
            brk.begin(0x7000, false, || Some(0xb000)).shrinks_from,
            Some(0xb000)
        );
    }

    #[test]
    fn a_task_that_died_in_the_call_leaves_the_break_unknown() {
        let mut brk = settled(0x9000);
        brk.begin(0x8000, true, || None);
        assert_eq!(brk.inherited().sure, None);
        brk.finish(None);
        assert_eq!(brk.sure, None);
    }
}
