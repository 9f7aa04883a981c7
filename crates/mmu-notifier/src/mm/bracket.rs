//! Brackets: an invalidation from its start to its end.
//!
//! 1. The start opens a read section of the domain, and remembers the first subscriber.
//! 2. If an interval was ever inserted, the start opens a window of the intervals, and calls each
//!    interval that the range meets (overlaps).
//! 3. The start calls the start callback of each subscriber. The caller then changes the memory.
//! 4. The end, which is the guard's drop, closes the window, calls the end of each subscriber that
//!    got a start and is still listed, and closes the read section.
//!
//! A registrar waits for a grace period of the same domain. So there are two cases: either the
//! registrar waits until this bracket has ended, or this bracket's read section began after the
//! notifier was listed, and the bracket calls the notifier.

use super::Mm;
use crate::mm::context::Inside;
use crate::mm::intervals::Window;
use crate::mm::owned_guard::OwnedGuard;
use crate::mm::subscriptions::{ReadSection, Walk};
use crate::sync::mutant;
use crate::{Blocking, Event, InvalidateRange, VaRange, WouldBlock};
use srcu::Guard;
use std::marker::PhantomData;

impl Mm {
    /// Tells subscribers that `range` is about to change, and waits until they have dropped it.
    ///
    /// Dropping the returned guard is `invalidate_range_end`: the change is over. Brackets nest, in
    /// one thread and across threads. While a bracket is open, no new notifier can finish
    /// registering on this address space. So a bracket that is forgotten ([`std::mem::forget`])
    /// blocks registrars, exit and every deferred free for ever.
    /// [`with_invalidation`](Self::with_invalidation) is the form that cannot be forgotten.
    ///
    /// # Blocking
    /// Sleeps while callbacks run. Allocates nothing. Takes no lock as long as no interval was
    /// inserted on this address space; after that, it takes the lock of the intervals, but never
    /// across a callback.
    /// # Source
    /// `mmu_notifier_invalidate_range_start` and `_end`. Differs: the end is the guard's drop, in
    /// the same read section.
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
        let section = self.subscriptions().read();
        let blocking = Blocking::Allowed;
        let mut bracket = Bracket {
            _stays: STAYS,
            mm: self,
            range,
            event,
            blocking,
            window: None,
            section,
            _inside: inside,
        };
        if (!bracket.section.is_empty() || self.intervals().is_enabled()) && !self.is_inherited() {
            bracket.window = start_each(&bracket.range_for_all(), &bracket.section);
        }
        bracket
    }

    /// Like [`invalidate`](Self::invalidate), but the guard keeps the address space's object alive.
    /// For event sources that store brackets in their own data, such as a tracer with one bracket
    /// per stopped thread.
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
        let section = ReadSection::of(self.clone());
        let mut bracket = OwnedBracket {
            _stays: STAYS,
            range,
            event,
            window: None,
            section,
            _inside: inside,
        };
        if !self.is_inherited() {
            bracket.window = start_each(&bracket.range(), &bracket.section);
        }
        bracket
    }

    /// Tells subscribers that `range` is about to change, where the caller must not sleep.
    ///
    /// The intervals are called first. If an interval refuses, neither the intervals after it nor
    /// the subscribers are called. If no interval refuses, every subscriber is called, even after
    /// one has refused.
    ///
    /// # Blocking
    /// Never, as long as the callbacks obey their rule.
    /// # Errors
    /// [`WouldBlock`] if an interval or a subscriber would have had to sleep. Then everything is
    /// undone: the window of the intervals is closed, each subscriber that had accepted has got its
    /// end, and those that refused get none. No guard exists, and no end is owed.
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
    /// `mmu_notifier_invalidate_range_start_nonblock`, Linux 5.12: earlier versions do not call the
    /// ends of the starts that succeeded. Differs: a subscriber that refused gets no end.
    #[doc(alias = "mmu_notifier_invalidate_range_start_nonblock")]
    pub fn try_invalidate(&self, range: VaRange, event: Event) -> Result<Bracket<'_>, WouldBlock> {
        let inside = Inside::enter(self);
        let section = self.subscriptions().read();
        let blocking = Blocking::Forbidden;
        let each = InvalidateRange {
            mm: self,
            range,
            event,
            blocking,
            origin: 0,
        };
        if self.is_inherited() {
            return Ok(Bracket {
                _stays: STAYS,
                mm: self,
                range,
                event,
                blocking,
                window: None,
                section,
                _inside: inside,
            });
        }
        let window = if self.intervals().is_enabled() {
            Some(self.intervals().start(&each)?)
        } else {
            None
        };
        section.try_start(&each, window)?;
        Ok(Bracket {
            _stays: STAYS,
            mm: self,
            range,
            event,
            blocking,
            window,
            section,
            _inside: inside,
        })
    }

    /// Runs `change` inside a bracket. Subscribers get the start before it and the end after it,
    /// even if `change` panics.
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
    pub fn with_invalidation<R>(
        &self,
        range: VaRange,
        event: Event,
        change: impl FnOnce(&Bracket<'_>) -> R,
    ) -> R {
        let bracket = self.invalidate(range, event);
        change(&bracket)
    }
}

/// Calls the intervals and then the subscribers. Returns the window that the end must close.
#[inline(always)]
pub(super) fn start_each<G>(
    range: &InvalidateRange<'_>,
    section: &ReadSection<G>,
) -> Option<Window> {
    if range.mm.intervals().is_enabled() {
        return start_with_intervals(range, section.walk());
    }
    section.walk().start(range);
    None
}

/// Closes the window, and calls the end of the subscribers that were listed at the start and still
/// are.
///
/// Out of line, because inlined it would make the drop of a bracket too large to be inlined itself,
/// and the bracket would then be kept in memory. Generic, so that it is compiled into the crate
/// that drops the bracket: a call from that crate into this one would go through a pointer.
#[inline(never)]
#[expect(
    clippy::extra_unused_type_parameters,
    reason = "it is there to be generic"
)]
#[expect(
    improper_ctypes_definitions,
    reason = "the C ABI is wanted for one thing only: it tells the optimiser that nothing unwinds"
)]
extern "C" fn end_each<G>(
    range: &InvalidateRange<'_>,
    subscribers: Walk<'_>,
    window: Option<Window>,
) {
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
pub(super) extern "C" fn close(mm: &Mm, window: Window) {
    mm.intervals().end(window);
}

/// Out of line, because everything that is inlined into the callers of `invalidate` must be small.
#[cold]
#[expect(improper_ctypes_definitions, reason = "as for `end_each`")]
extern "C" fn start_with_intervals(
    range: &InvalidateRange<'_>,
    subscribers: Walk<'_>,
) -> Option<Window> {
    // `start` fails only if a callback refuses, and none may refuse where sleeping is allowed.
    let window = range.mm.intervals().start(range).ok();
    subscribers.start(range);
    window
}

/// Makes a bracket `!Send`, and its name is the reason in the compiler's message. The end of a
/// bracket runs in the read section of its start, and a thread-local count says that the thread is
/// inside the bracket.
#[derive(Debug)]
struct EndsOnTheThreadThatBeganIt(PhantomData<*const ()>);

const STAYS: EndsOnTheThreadThatBeganIt = EndsOnTheThreadThatBeganIt(PhantomData);

/// An invalidation in progress. Its drop calls the end callbacks of the subscribers.
///
/// A bracket stays on its thread:
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
    /// First, so that the compiler's message names this field.
    _stays: EndsOnTheThreadThatBeganIt,
    mm: &'a Mm,
    range: VaRange,
    event: Event,
    blocking: Blocking,
    window: Option<Window>,
    section: ReadSection<Guard<'a>>,
    _inside: Inside,
}

impl<'a> Bracket<'a> {
    /// Returns the invalidation as the subscribers see it. Called only where a callback follows, so
    /// that the fields stay in registers on the fast path.
    #[inline]
    fn range_for_all(&self) -> InvalidateRange<'a> {
        InvalidateRange {
            mm: self.mm,
            range: self.range,
            event: self.event,
            blocking: self.blocking,
            origin: 0,
        }
    }

    /// Returns the pages that change.
    #[must_use]
    pub fn range(&self) -> VaRange {
        self.range
    }

    /// Returns the event: why the pages change.
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
        if self.window.is_some() || !self.section.is_empty() {
            let found = mutant("ends_whom_it_finds").then(|| self.mm.subscriptions().read());
            let subscribers = found.as_ref().unwrap_or(&self.section).walk();
            end_each::<Guard<'_>>(&self.range_for_all(), subscribers, self.window);
        }
    }
}

/// An invalidation in progress that keeps its address space's object alive. Its drop calls the end
/// callbacks of the subscribers.
#[must_use = "the bracket ends when the guard is dropped"]
#[derive(Debug)]
pub struct OwnedBracket {
    /// First, so that the compiler's message names this field.
    _stays: EndsOnTheThreadThatBeganIt,
    range: VaRange,
    event: Event,
    window: Option<Window>,
    section: ReadSection<OwnedGuard>,
    _inside: Inside,
}

impl OwnedBracket {
    /// Returns the invalidation as the subscribers see it.
    #[must_use]
    pub fn range(&self) -> InvalidateRange<'_> {
        InvalidateRange {
            mm: self.section.mm(),
            range: self.range,
            event: self.event,
            blocking: Blocking::Allowed,
            origin: 0,
        }
    }
}

impl Drop for OwnedBracket {
    fn drop(&mut self) {
        end_each::<OwnedGuard>(&self.range(), self.section.walk(), self.window);
    }
}
