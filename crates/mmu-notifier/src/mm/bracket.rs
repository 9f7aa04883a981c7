//! Brackets: the time between the start and the end of an invalidation.

use super::Mm;
use crate::context::Inside;
use crate::interval::Window;
use crate::owned_guard::OwnedGuard;
use crate::subscriptions::{Reading, Walk};
use crate::sync::mutant;
use crate::{Blocking, Event, InvalidateRange, VaRange, WouldBlock};
use srcu::Guard;
use std::marker::PhantomData;

impl Mm {
    /// Tells subscribers that `range` is about to change, and waits until they have let go of it.
    ///
    /// Dropping the returned guard is `invalidate_range_end`: the change is over. Brackets nest, in one thread and across
    /// threads. As long as one is open, nobody can finish subscribing to this address space, so a bracket that is
    /// forgotten ([`std::mem::forget`]) holds up registrars, exit and every deferred free for ever; the form that cannot
    /// be forgotten is [`with_invalidation`](Self::with_invalidation).
    ///
    /// # Blocking
    /// Sleeps while callbacks run. Allocates nothing and takes no lock.
    /// # Source
    /// `mmu_notifier_invalidate_range_start` and `_end`. Differs: the end is the guard's drop, in the same read section.
    /// # Examples
    /// ```
    /// use mmu_notifier::{Event, MmWithUser, Va, VaRange};
    ///
    /// let mm = MmWithUser::new();
    /// let range = VaRange::covering(Va::new(0x7000), 0x1000)?;
    /// let bracket = mm.invalidate(range, Event::Unmap);
    /// // Unmap it here.
    /// drop(bracket);
    /// # Ok::<(), mmu_notifier::InvalidRange>(())
    /// ```
    #[doc(alias = "mmu_notifier_invalidate_range_start")]
    #[inline(always)]
    pub fn invalidate(&self, range: VaRange, event: Event) -> Bracket<'_> {
        let inside = Inside::enter(self);
        let reading = self.subscriptions().read();
        let blocking = Blocking::Allowed;
        let mut bracket =
            Bracket { _stays: STAYS, mm: self, range, event, blocking, window: None, reading, _inside: inside };
        if (!bracket.reading.is_empty() || self.intervals().is_enabled()) && !self.is_inherited() {
            bracket.window = start_each(&bracket.range_for_all(), &bracket.reading);
        }
        bracket
    }

    /// The same as [`invalidate`](Self::invalidate), for a guard that keeps the address space itself: for sources that
    /// hold brackets in their own data, such as a tracer with one per stopped thread.
    ///
    /// # Blocking
    /// Sleeps while callbacks run.
    /// # Source
    /// `mmu_notifier_invalidate_range_start` and `_end`, as for `invalidate`.
    /// # Examples
    /// ```
    /// use mmu_notifier::{Event, MmWithUser, OwnedBracket, VaRange};
    ///
    /// let mm = MmWithUser::new();
    /// let mut stopped: Vec<OwnedBracket> = vec![mm.invalidate_owned(VaRange::ALL, Event::Clear)];
    /// drop(mm); // Exit runs now; the bracket keeps the object alone.
    /// stopped.clear();
    /// ```
    #[must_use = "the bracket ends when the guard is dropped"]
    pub fn invalidate_owned(&self, range: VaRange, event: Event) -> OwnedBracket {
        let inside = Inside::enter(self);
        let reading = Reading::of(self.clone());
        let mut bracket = OwnedBracket { _stays: STAYS, range, event, window: None, reading, _inside: inside };
        if !self.is_inherited() {
            bracket.window = start_each(&bracket.range(), &bracket.reading);
        }
        bracket
    }

    /// Tells subscribers that `range` is about to change, where nobody may sleep.
    ///
    /// Every subscriber is called, also after one has refused.
    ///
    /// # Blocking
    /// No, as far as the callbacks keep their promise.
    /// # Errors
    /// [`WouldBlock`] if a subscriber would have had to sleep. Then everything is undone: each one that had accepted has
    /// got its end, the one that refused gets none, no guard exists and no end is owed.
    /// # Examples
    /// ```
    /// use mmu_notifier::{Event, MmWithUser, VaRange};
    ///
    /// let mm = MmWithUser::new();
    /// match mm.try_invalidate(VaRange::ALL, Event::Unmap) {
    ///     Ok(bracket) => drop(bracket), // Reap it.
    ///     Err(_would_block) => (),      // Leave it and try another.
    /// }
    /// ```
    /// # Source
    /// `mmu_notifier_invalidate_range_start_nonblock`, Linux 5.12 for the ends. Differs: who refused gets no end.
    #[doc(alias = "mmu_notifier_invalidate_range_start_nonblock")]
    pub fn try_invalidate(&self, range: VaRange, event: Event) -> Result<Bracket<'_>, WouldBlock> {
        let inside = Inside::enter(self);
        let reading = self.subscriptions().read();
        let blocking = Blocking::Forbidden;
        let each = InvalidateRange { mm: self, range, event, blocking };
        if self.is_inherited() {
            return Ok(Bracket {
                _stays: STAYS,
                mm: self,
                range,
                event,
                blocking,
                window: None,
                reading,
                _inside: inside,
            });
        }
        let window = if self.intervals().is_enabled() { Some(self.intervals().start(&each)?) } else { None };
        reading.try_start(&each, window)?;
        Ok(Bracket { _stays: STAYS, mm: self, range, event, blocking, window, reading, _inside: inside })
    }

    /// Runs `change` inside a bracket: subscribers hear the start before it and the end after it, also if it panics.
    ///
    /// # Blocking
    /// Sleeps while callbacks run.
    /// # Source
    /// None: the kernel's callers pair start and end by hand.
    /// # Examples
    /// ```
    /// use mmu_notifier::{Event, MmWithUser, VaRange};
    ///
    /// let mm = MmWithUser::new();
    /// let pages = mm.with_invalidation(VaRange::ALL, Event::Clear, |bracket| bracket.range().pages());
    /// assert_eq!(pages, 1 << 52);
    /// ```
    pub fn with_invalidation<R>(&self, range: VaRange, event: Event, change: impl FnOnce(&Bracket<'_>) -> R) -> R {
        let bracket = self.invalidate(range, event);
        change(&bracket)
    }
}

/// Calls the intervals and then the subscribers; returns the window that is owed its end.
#[inline(always)]
fn start_each<G>(range: &InvalidateRange<'_>, reading: &Reading<G>) -> Option<Window> {
    if range.mm.intervals().is_enabled() {
        return start_with_intervals(range, reading.walk());
    }
    reading.walk().start(range);
    None
}

/// Closes the window and calls the subscribers that were there at the start.
///
/// Out of line, or the drop of a bracket would be too large to be inlined, and the bracket in memory for it. Generic, and so
/// compiled into the crate that drops it: a call from there into this one goes through a pointer.
#[inline(never)]
#[expect(clippy::extra_unused_type_parameters, reason = "it is there to be generic")]
#[expect(
    improper_ctypes_definitions,
    reason = "the C ABI is wanted for one thing only: it tells the optimiser that nothing unwinds"
)]
extern "C" fn end_each<G>(range: &InvalidateRange<'_>, subscribers: Walk<'_>, window: Option<Window>) {
    if range.mm.is_inherited() {
        return;
    }
    if let Some(window) = window {
        close(range.mm, window);
    }
    subscribers.end(range);
}

#[cold]
#[expect(improper_ctypes_definitions, reason = "as for `end_each`")]
extern "C" fn close(mm: &Mm, window: Window) {
    mm.intervals().end(window);
}

/// Out of line, for what is inlined into every caller of `invalidate` must be small.
#[cold]
#[expect(improper_ctypes_definitions, reason = "as for `end_each`")]
extern "C" fn start_with_intervals(range: &InvalidateRange<'_>, subscribers: Walk<'_>) -> Option<Window> {
    // Nobody can refuse where sleeping is allowed.
    let window = range.mm.intervals().start(range).ok();
    subscribers.start(range);
    window
}

/// Why a bracket cannot be sent to another thread, in the words of the compiler's message: its end
/// runs in the read section of its start, and the thread is known to be inside it.
#[derive(Debug)]
struct EndsOnTheThreadThatBeganIt(PhantomData<*const ()>);

const STAYS: EndsOnTheThreadThatBeganIt = EndsOnTheThreadThatBeganIt(PhantomData);

/// An invalidation in progress. Dropping it tells the subscribers that the change is over.
///
/// It stays on its thread:
///
/// ```compile_fail,E0277
/// fn send<T: Send>(_: T) {}
/// let mm = mmu_notifier::MmWithUser::new();
/// send(mm.invalidate(mmu_notifier::VaRange::ALL, mmu_notifier::Event::Clear));
/// ```
///
/// and does not outlive its address space:
///
/// ```compile_fail,E0505
/// let mm = mmu_notifier::MmWithUser::new();
/// let bracket = mm.invalidate(mmu_notifier::VaRange::ALL, mmu_notifier::Event::Clear);
/// drop(mm);
/// drop(bracket);
/// ```
#[must_use = "the bracket ends when the guard is dropped"]
#[derive(Debug)]
#[doc(alias = "mmu_notifier_invalidate_range_end")]
pub struct Bracket<'a> {
    /// First, so that the compiler names it.
    _stays: EndsOnTheThreadThatBeganIt,
    mm: &'a Mm,
    range: VaRange,
    event: Event,
    blocking: Blocking,
    window: Option<Window>,
    reading: Reading<Guard<'a>>,
    _inside: Inside,
}

impl<'a> Bracket<'a> {
    /// What the subscribers see. Made only where somebody is called: in the fast path its fields stay in registers.
    #[inline]
    fn range_for_all(&self) -> InvalidateRange<'a> {
        InvalidateRange { mm: self.mm, range: self.range, event: self.event, blocking: self.blocking }
    }

    /// Returns the pages that change.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.range
    }

    /// Returns what happens to them.
    #[must_use]
    pub fn event(&self) -> Event {
        self.event
    }

    /// Returns the address space.
    #[must_use]
    pub fn mm(&self) -> &'a Mm {
        self.mm
    }
}

impl Drop for Bracket<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.window.is_some() || !self.reading.is_empty() {
            let found = mutant("ends_whom_it_finds").then(|| self.mm.subscriptions().read());
            let subscribers = found.as_ref().unwrap_or(&self.reading).walk();
            end_each::<Guard<'_>>(&self.range_for_all(), subscribers, self.window);
        }
    }
}

/// An invalidation in progress that keeps its address space. Dropping it tells the subscribers that the change is over.
#[must_use = "the bracket ends when the guard is dropped"]
#[derive(Debug)]
pub struct OwnedBracket {
    /// First, so that the compiler names it.
    _stays: EndsOnTheThreadThatBeganIt,
    range: VaRange,
    event: Event,
    window: Option<Window>,
    reading: Reading<OwnedGuard>,
    _inside: Inside,
}

impl OwnedBracket {
    /// Returns what the subscribers see.
    #[must_use]
    pub fn range(&self) -> InvalidateRange<'_> {
        InvalidateRange { mm: self.reading.mm(), range: self.range, event: self.event, blocking: Blocking::Allowed }
    }
}

impl Drop for OwnedBracket {
    fn drop(&mut self) {
        end_each::<OwnedGuard>(&self.range(), self.reading.walk(), self.window);
    }
}
