//! Two steps that safe and raw code share: the registration of a new node, with the wait for the
//! brackets that do not call it; and the call of `release` before a node is unregistered.

use super::NodeRef;
use crate::mm::context;
use crate::sync::mutant;
use crate::{MmapWriteGuard, Notifier, WouldDeadlock, lockdep};

/// Lists a new node and waits until every bracket that does not call it has ended.
///
/// # Source
/// `__mmu_notifier_register`, Linux 5.15. Differs: a grace period of brackets replaces
/// `mm_take_all_locks`.
pub(crate) fn publish<N: Notifier>(node: &NodeRef<N>, locked: &MmapWriteGuard<'_>) {
    let list = locked.subscriptions();
    list.srcu().prepare();
    list.insert(node);
    // Every caller has called `would_deadlock` after it took the lock and ran its last callback, so
    // this wait is not refused.
    let waited = if mutant("register_waits_not") {
        Ok(())
    } else {
        list.srcu().synchronize()
    };
    debug_assert!(waited.is_ok(), "a registrar was refused its grace period");
}

/// Calls `release` of a notifier that the caller is about to unregister, unless exit has called it.
///
/// # Errors
/// [`WouldDeadlock`] if this thread must not wait for the notifier's callbacks afterwards.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn release<N: Notifier>(node: &NodeRef<N>) -> Result<(), WouldDeadlock> {
    let mm = node.mm();
    if mm.would_deadlock() {
        return Err(WouldDeadlock);
    }
    lockdep::might_wait(Some(mm.id()));
    let list = mm.subscriptions();
    if mutant("delist_before_release") {
        list.delist_ref(node);
        mm.catching(|| node.value().release(mm));
    } else if list.is_listed(node) {
        {
            let _inside = context::Inside::enter(mm);
            let _guard = list.srcu().read_lock();
            mm.catching(|| node.value().release(mm));
        }
        if mm.would_deadlock() {
            // `release` has left a bracket open on this thread, and the grace period would wait for
            // it.
            return Err(WouldDeadlock);
        }
    }
    Ok(())
}
