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
    /// Drops the value, and returns the node's memory to its owner. Runs after the last put and a
    /// grace period, like the kernel's `free_notifier`.
    ///
    /// # Blocking
    /// Runs on the reclaimer thread and must not sleep, because every other deferred free waits
    /// behind it.
    /// # Safety
    /// The caller promises that `node` was registered, that no callback can be running in it, and
    /// that no thread uses it any more. The value has not been dropped yet, so this function must
    /// drop it.
    unsafe fn dispose(node: NonNull<Node<Self>>)
    where
        Self: Sized;
}

/// The error of a put of a notifier that has no users left: the caller owned no reference. The put
/// has changed nothing.
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
    /// Drops one reference. The put of the last reference delists the node and queues its
    /// [`dispose`](Embedded::dispose).
    ///
    /// # Blocking
    /// Never. Allocates nothing.
    /// # Errors
    /// [`SurplusPut`] if the node has no users left but is not disposed of yet.
    /// # Safety
    /// `node` must be registered and not disposed of. Both hold as long as the node has users.
    /// # Source
    /// `mmu_notifier_put`, Linux 5.15.
    #[inline]
    pub unsafe fn put(node: NonNull<Self>) -> Result<(), SurplusPut> {
        let node: NonNull<Header> = node.cast();
        // SAFETY: The node must be alive, which the caller promises.
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

    /// Calls `release` unless exit has done so, delists the node, and waits until no callback runs
    /// in the node. Then the memory is the caller's again, with the value still in it. The count of
    /// users does not matter, and `dispose` is not called.
    ///
    /// # Blocking
    /// Sleeps while `release` and the brackets open now last, and those opened later that it
    /// [may have to wait for](crate#what-a-wait-waits-for).
    /// # Errors
    /// [`WouldDeadlock`] if this thread is inside a bracket or callback of the address space or
    /// runs a deferred free, or if `release` has left a bracket open. Always if the address space
    /// is that of a parent process. The node is still registered then.
    /// # Safety
    /// `node` must be registered, and neither disposed of nor put for the last time. No thread may
    /// use the node afterwards.
    /// # Source
    /// `mmu_notifier_unregister`, Linux 5.15.
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn unregister(node: NonNull<Self>) -> Result<(), WouldDeadlock> {
        // SAFETY: The node must be alive and counted, which the caller promises. `ManuallyDrop`
        // keeps the count.
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

    /// Returns how many references there are now. For reports and tests.
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

/// Moves the header out of a node, and passes the node to `N::dispose`.
///
/// # Safety
/// `head` must be the head of a retired `Node<N>` of `Notifiers`, and a grace period must have
/// passed since the node was delisted.
unsafe fn dispose<N: Embedded>(head: NonNull<srcu::Head>) {
    // SAFETY: A reference needs a live node: only this function disposes of it, and the header
    // begins with the head.
    if unsafe { head.cast::<Header>().as_ref() }.is_inherited() {
        // The free was queued before a fork, and this is the child. The parent disposes of the
        // node.
        return;
    }
    // SAFETY: Moving out needs a place that no thread uses any more: the caller promises that the
    // node is retired and the grace period over, so no user is left and no walker can stand on the
    // node.
    let header = unsafe { ptr::read(head.cast::<Header>().as_ptr()) };
    // SAFETY: The node must have been registered, and no thread may use it. Both follow from the
    // same promise.
    header.freed(|| unsafe { N::dispose(head.cast()) });
}
