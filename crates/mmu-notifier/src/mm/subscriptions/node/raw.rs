//! Nodes in memory that a C caller provides: it embeds the node in an object of its own and frees
//! that object itself.

use super::{Header, Node, NodeRef, registrar, retire};
use crate::sync::atomic::Ordering;
use crate::{Mm, Notifier, WouldDeadlock};
use std::error::Error;
use std::fmt;
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};

/// A notifier whose node is embedded in an object of the caller. The caller, not this crate, frees
/// the object.
///
/// # Safety
/// The memory of a node that was given to [`Notifiers::register`](crate::raw::Notifiers::register)
/// must stay valid, at its place, and untouched by other code, until `dispose` is called with it or
/// [`Node::unregister`] has succeeded.
pub unsafe trait Embedded: Notifier {
    /// Gives the node's memory back to the caller, after the last put and a grace period. It is the
    /// kernel's `free_notifier`.
    ///
    /// # Blocking
    /// Runs on the reclaimer thread and must not sleep, because every other deferred free waits
    /// behind it.
    /// # Safety
    /// `node` was registered, no callback can be running in it, and no thread uses it any more. Its
    /// value has not been dropped yet: this function must drop it.
    unsafe fn dispose(node: NonNull<Node<Self>>)
    where
        Self: Sized;
}

/// A put of a notifier that has no users left, so the caller owned no reference. Nothing has
/// changed.
///
/// # Source
/// The warning of `mmu_notifier_put`, Linux 5.15.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SurplusPut;

impl fmt::Display for SurplusPut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the notifier was put more often than it was got")
    }
}

impl Error for SurplusPut {}

impl<N: Embedded> Node<N> {
    /// Gives one reference back; the last one delists the node and queues its
    /// [`dispose`](Embedded::dispose).
    ///
    /// # Blocking
    /// Never; it allocates nothing.
    /// # Errors
    /// [`SurplusPut`] if the node has no users left but is not disposed of yet.
    /// # Safety
    /// `node` must be registered and not disposed of. Both hold as long as it has users.
    /// # Source
    /// `mmu_notifier_put`, Linux 5.15.
    #[inline]
    pub unsafe fn put(node: NonNull<Self>) -> Result<(), SurplusPut> {
        let node: NonNull<Header> = node.cast();
        // SAFETY: The node must be alive: the caller's duty.
        let header = unsafe { node.as_ref() };
        let mut users = header.users.load(Ordering::Relaxed);
        while users != 0 {
            // ORDER(core-put): AcqRel, as in the drop of `NodeRef`. Partner: itself.
            match header.users.compare_exchange_weak(
                users,
                users - 1,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(1) => {
                    // SAFETY: The node is alive until it is disposed of, this was its last user,
                    // and it is a `Node<N>`.
                    unsafe { retire(node, dispose::<N>) };
                    return Ok(());
                }
                Ok(_) => return Ok(()),
                Err(now) => users = now,
            }
        }
        Err(SurplusPut)
    }

    /// Calls `release` unless exit has done so, delists the node, waits until no callback runs in
    /// it, and gives the memory back to the caller with the value still in it. The count of users
    /// does not matter, and `dispose` is not called.
    ///
    /// # Blocking
    /// Sleeps while `release` and the brackets open now last, and those opened later that it
    /// [may have to wait for](crate#what-a-wait-waits-for).
    /// # Errors
    /// [`WouldDeadlock`] if this thread is inside a bracket or callback of the address space or
    /// runs a deferred free, or if `release` has left a bracket open. The node is still registered
    /// then.
    /// # Safety
    /// `node` must be registered, and neither disposed of nor put for the last time. No thread may
    /// use the node afterwards.
    /// # Source
    /// `mmu_notifier_unregister`, Linux 5.15.
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn unregister(node: NonNull<Self>) -> Result<(), WouldDeadlock> {
        // SAFETY: The node must be alive and counted: the caller's duty. The count is not given up.
        let counted = ManuallyDrop::new(unsafe { NodeRef::from_node(node) });
        registrar::release(&counted)?;
        let list = counted.mm().subscriptions();
        list.delist_ref(&counted);
        // `registrar::release` has just asked whether this wait would be refused.
        list.srcu().synchronize()?;
        // SAFETY: Moving out needs a place that no thread uses any more. The node was delisted
        // before a grace period that has ended, and the caller promises that no thread uses it
        // afterwards.
        drop(unsafe { ptr::read(node.as_ptr().cast::<Header>()) });
        Ok(())
    }

    /// Returns the address space, which may have ended.
    #[must_use]
    pub fn mm(&self) -> &Mm {
        &self.header.mm
    }

    /// Returns how many references there are. A snapshot, for reports and tests.
    #[must_use]
    pub fn users(&self) -> u32 {
        self.header.users.load(Ordering::Relaxed)
    }

    /// Returns the notifier.
    #[must_use]
    pub fn value(&self) -> &N {
        &self.value
    }
}

impl<N: Notifier> fmt::Debug for Node<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("users", &self.header.users)
            .finish_non_exhaustive()
    }
}

/// # Safety
/// `head` must be that of a retired `Node<N>` of `Notifiers`, and a grace period must have passed
/// since it was delisted.
unsafe fn dispose<N: Embedded>(head: NonNull<srcu::Head>) {
    // SAFETY: A reference needs a live node: only this function disposes of it, and the header
    // begins with the head.
    if unsafe { head.cast::<Header>().as_ref() }.is_inherited() {
        // Queued before a fork, and this is the child: the node is the parent's to dispose of.
        return;
    }
    // SAFETY: Moving out needs a place that no thread uses any more: no user is left and no walker
    // can stand on it (the caller's duty).
    let header = unsafe { ptr::read(head.cast::<Header>().as_ptr()) };
    // SAFETY: The node must have been registered, and no thread may use it: the caller's duty.
    header.freed(|| unsafe { N::dispose(head.cast()) });
}
