//! The end of an address space.

use super::Mm;
use crate::mm::context;
use crate::{Blocking, Event, Exit, InvalidateRange, VaRange, lockdep};

/// Ends an address space for its intervals and subscribers.
///
/// 1. Every interval in the tree is invalidated once, over the whole address space.
/// 2. `release` of every subscriber is called, and only then every subscriber is delisted.
/// 3. Exit waits until no callback runs in any of them, unless this thread would wait for itself.
///
/// Step 2 has this order because a subscriber keeps its shadow entries until its `release` has
/// returned. If it were delisted first, a bracket that opens before `release` has returned would
/// not call it, and the entries could be stale.
///
/// The wait in step 3 also covers a `release` that `unregister` runs at the same time, because that
/// `release` runs in a read section. Intervals stay in the tree until they are removed, and later
/// brackets still call them.
///
/// # Source
/// `__mmu_notifier_release`, mm/mmu_notifier.c, Linux 5.15.
pub(super) fn release(mm: &Mm) {
    let list = mm.subscriptions();
    if mm.is_inherited() {
        return;
    }
    // No thread can register any more, because registering takes a user.
    if mm.intervals().is_enabled() {
        let _inside = context::Inside::enter(mm);
        let _guard = list.srcu().read_lock();
        let range = InvalidateRange {
            mm,
            range: VaRange::ALL,
            event: Event::Release(Exit(())),
            blocking: Blocking::Allowed,
            origin: 0,
        };
        if let Ok(window) = mm.intervals().start(&range) {
            mm.intervals().end(window);
        }
    }
    if list.is_empty() {
        return;
    }
    {
        let _inside = context::Inside::enter(mm);
        let section = list.read();
        section.for_each(mm, |notifier| notifier.release(mm));
        list.delist_all();
    }
    if !mm.would_deadlock() {
        lockdep::might_wait(Some(mm.id()));
        // The check above excludes a read section and a deferred free, so the wait cannot be
        // refused.
        let waited = list.srcu().synchronize();
        debug_assert!(waited.is_ok(), "exit was refused its grace period");
    }
}
