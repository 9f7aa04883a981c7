//! One traced address space.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use mmu_notifier::MmWithUser;

/// An address space and what the tracer keeps about it. Shared by its tasks; the last one's drop is
/// its exit.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) mm: MmWithUser,
    pub(super) brk: Cell<Break>,
    /// The tasks in it that are alive.
    pub(super) tasks: Cell<u32>,
    /// The calls of tasks elsewhere that hold brackets on it open.
    pub(super) from_elsewhere: Cell<u32>,
    /// Address spaces that may be the same as this one: the tracer could not learn whether the
    /// first task of this one shares their memory.
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

    /// Makes an address space that may be the same as any of `others`. An event in one of them is
    /// told in this one too, and vice versa.
    pub(super) fn doubtful<'a>(others: impl IntoIterator<Item = &'a Rc<Space>>) -> Space {
        let space = Space::new(Break::default());
        space
            .perhaps
            .borrow_mut()
            .extend(others.into_iter().map(Rc::downgrade));
        space
    }

    /// Records that this address space is none of the others.
    pub(super) fn is_its_own(&self) {
        self.perhaps.take();
    }

    /// Tells whether the two may be the same one.
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

/// What is known of the program break.
///
/// The tracer does not stop at the exit of a call that grows the heap of a process with one thread.
/// So it does not know whether that call succeeded. When it needs to know, and when calls of
/// several threads have overlapped, it reads `/proc`.
///
/// # Invariants
/// If `sure` is known, the break lies between it and `high`. `high` is at least what any call in
/// flight asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Break {
    sure: Option<u64>,
    high: u64,
    in_flight: u32,
    overlapped: bool,
    /// The program has just been loaded: there is no heap yet that could shrink.
    no_heap: bool,
}

/// What a call to `brk` is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BreakCall {
    /// Unmaps from the new break up to here, if it is a shrink.
    pub(super) shrinks_from: Option<u64>,
    /// The result is needed; the call is in flight until [`Break::finish`].
    pub(super) learn: bool,
}

impl Break {
    /// What is known of a program that `execve` has just loaded.
    pub(super) fn of_new_program() -> Break {
        Break {
            no_heap: true,
            ..Break::default()
        }
    }

    /// Takes note of a call. `heap_end` asks `/proc`; `alone` says that no other thread could be in
    /// the call.
    pub(super) fn begin(
        &mut self,
        new: u64,
        alone: bool,
        heap_end: impl FnOnce() -> Option<u64>,
    ) -> BreakCall {
        let mut end = match self.sure {
            // The break is known exactly, or the request is above everything that was asked for so
            // far and therefore grows the heap.
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

    /// Takes note of the result of a call in flight, or that its task died in it.
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

    /// What a forked child knows.
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
