//! Brackets in memory of the caller, where they begin and end: for C, whose ranges have words for
//! them.
//!
//! A [`Bracket`](super::Bracket) is a value that the optimiser keeps in registers, and its
//! subscribers see a copy. A C program cannot hold such a value, and moving it into memory and back
//! costs more than the bracket: here the subscribers see what lies in that memory.

use super::Mm;
use super::bracket::{close, start_each};
use crate::mm::context::Inside;
use crate::mm::intervals::Window;
use crate::mm::subscriptions::ReadSection;
use crate::{Blocking, Event, InvalidateRange, VaRange, WouldBlock};
use srcu::Guard;
use std::mem::MaybeUninit;

/// An invalidation in progress, in memory that a C caller provides. Dropping it in place tells the
/// subscribers that the change is over, as the drop of a [`Bracket`](crate::Bracket) does.
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
    /// Opens one as [`Mm::invalidate`] does.
    ///
    /// # Safety
    /// `origin` is 0, or the address of the range in C, which stays valid until the bracket has
    /// ended: subscribers in C are shown it ([`raw::origin`](crate::raw::origin)).
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

    /// Opens one as [`Mm::try_invalidate`] does.
    ///
    /// # Safety
    /// As for [`PlacedBracket::start`].
    /// # Blocking
    /// Never, as long as the callbacks obey their rule.
    /// # Errors
    /// [`WouldBlock`] if a subscriber would have had to sleep. Then `place` is as it was.
    /// # Source
    /// `mmu_notifier_invalidate_range_start_nonblock`, Linux 5.12 for the ends.
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
