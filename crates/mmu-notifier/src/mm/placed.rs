//! Brackets in memory that a C caller provides.
//!
//! A [`Bracket`](super::Bracket) is a value that the optimiser keeps in registers, and its
//! subscribers see a copy. A C program cannot hold such a value, and a move of it into memory and
//! back would cost more than the bracket itself. So a placed bracket begins and ends in the
//! caller's memory, and the subscribers see it there.

use super::Mm;
use super::bracket::{close, start_each};
use crate::mm::context::Inside;
use crate::mm::intervals::Window;
use crate::mm::subscriptions::ReadSection;
use crate::{Blocking, Event, InvalidateRange, VaRange, WouldBlock};
use srcu::Guard;
use std::mem::MaybeUninit;

/// An invalidation in progress, in memory that a C caller provides. Its drop in place calls the end
/// callbacks of the subscribers, as the drop of a [`Bracket`](crate::Bracket) does.
///
/// # Source
/// `mmu_notifier_invalidate_range_start` and `_end`, Linux 5.15.
#[derive(Debug)]
pub struct PlacedBracket<'a> {
    each: InvalidateRange<'a>,
    window: Option<Window>,
    section: ReadSection<Guard<'a>>,
    _inside: Inside,
}

impl<'a> PlacedBracket<'a> {
    /// Opens a bracket at `place`, as [`Mm::invalidate`] does.
    ///
    /// # Safety
    /// `origin` must be 0, or the address of the range in C, which must stay valid until the
    /// bracket has ended. Subscribers in C read the range there
    /// ([`raw::origin`](crate::raw::origin)).
    /// # Blocking
    /// Sleeps while callbacks run.
    /// # Source
    /// `mmu_notifier_invalidate_range_start`, Linux 5.15.
    #[inline(always)]
    pub unsafe fn start(
        place: &mut MaybeUninit<Self>,
        mm: &'a Mm,
        range: VaRange,
        event: Event,
        origin: usize,
    ) {
        let inside = Inside::enter(mm);
        let section = mm.subscriptions().read();
        let bracket = place.write(Self {
            each: InvalidateRange {
                mm,
                range,
                event,
                blocking: Blocking::Allowed,
                origin,
            },
            window: None,
            section,
            _inside: inside,
        });
        if (!bracket.section.is_empty() || mm.intervals().is_enabled()) && !mm.is_inherited() {
            bracket.window = start_each(&bracket.each, &bracket.section);
        }
    }

    /// Opens a bracket at `place`, as [`Mm::try_invalidate`] does.
    ///
    /// # Safety
    /// The same as for [`PlacedBracket::start`].
    /// # Blocking
    /// Never, as long as the callbacks obey their rule.
    /// # Errors
    /// [`WouldBlock`] if an interval or a subscriber would have had to sleep. Then `place` is
    /// unchanged.
    /// # Source
    /// `mmu_notifier_invalidate_range_start_nonblock`, Linux 5.12: earlier versions do not call the
    /// ends of the starts that succeeded.
    pub unsafe fn try_start(
        place: &mut MaybeUninit<Self>,
        mm: &'a Mm,
        range: VaRange,
        event: Event,
        origin: usize,
    ) -> Result<(), WouldBlock> {
        let inside = Inside::enter(mm);
        let section = mm.subscriptions().read();
        let each = InvalidateRange {
            mm,
            range,
            event,
            blocking: Blocking::Forbidden,
            origin,
        };
        let mut window = None;
        if !mm.is_inherited() {
            if mm.intervals().is_enabled() {
                window = Some(mm.intervals().start(&each)?);
            }
            section.try_start(&each, window)?;
        }
        place.write(Self {
            each,
            window,
            section,
            _inside: inside,
        });
        Ok(())
    }
}

impl Drop for PlacedBracket<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let mm = self.each.mm;
        if (self.window.is_some() || !self.section.is_empty()) && !mm.is_inherited() {
            if let Some(window) = self.window {
                close(mm, window);
            }
            self.section.walk().end(&self.each);
        }
    }
}
