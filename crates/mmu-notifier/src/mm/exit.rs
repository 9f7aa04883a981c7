//! The end of an address space.

use super::Mm;
use crate::{Blocking, Event, Exit, InvalidateRange, VaRange, context, lockdep};

/// Tells every interval, then calls `release` of every subscriber, delists them all, and waits until no callback runs in any of them.
///
/// The order matters: a subscriber is delisted only after its `release` has returned, so that at no time its shadow
/// entries exist while nobody would tell it of a change. A `release` that `unregister` runs at the same time is waited
/// for as well. Intervals stay until they are removed, and are still told of what comes.
///
/// # Source
/// `__mmu_notifier_release`, mm/mmu_notifier.c, Linux 5.15.
pub(super) fn release(mm: &Mm) {
    let list = mm.subscriptions();
    if mm.is_inherited() {
        return;
    }
    // Nobody can register any more: that takes a user.
    if mm.intervals().is_enabled() {
        let _inside = context::Inside::enter(mm);
        let _guard = list.srcu().read_lock();
        let range =
            InvalidateRange { mm, range: VaRange::ALL, event: Event::Release(Exit(())), blocking: Blocking::Allowed };
        if let Ok(window) = mm.intervals().start(&range) {
            mm.intervals().end(window);
        }
    }
    if list.is_empty() {
        return;
    }
    {
        let _inside = context::Inside::enter(mm);
        let reading = list.read();
        reading.for_each(mm, |notifier| notifier.release(mm));
        list.delist_all();
    }
    if !mm.would_deadlock() {
        lockdep::might_wait(Some(mm));
        // Not inside a section or a free of this domain, as just asked, so this cannot be refused.
        let waited = list.srcu().synchronize();
        debug_assert!(waited.is_ok(), "exit was refused its grace period");
    }
}
