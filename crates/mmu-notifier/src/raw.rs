//! Notifiers and intervals in memory that a C caller provides: the base of a C interface.
//!
//! In C a `struct mmu_notifier` is a field of the driver's own object, the driver frees that
//! object, and a table of operations is the key by which the notifier is found. So in this module
//! the caller provides the memory of a node, passes a closure that selects a node, and gets
//! pointers. Callbacks, waits and errors are the same as for [`Subsystem`] and
//! [`Registration`](crate::Registration), because the code is the same.
//!
//! Rust programs do not need this module: the rest of the crate is safe.
//!
//! # Safety
//! A node is alive from `register` until it is disposed of or unregistered. `find` returns a
//! counted node, which is not disposed of before the caller puts it. Each function states the
//! further promises of its caller.

pub use crate::interval::raw::{Interval, RawIntervalOps};
pub use crate::mm::PlacedBracket;
pub use crate::mm::notifier::Sealed;
pub use crate::mm::subscriptions::{Embedded, Node, SurplusPut};

use crate::mm::context;
use crate::mm::subscriptions::registrar;
use crate::mm::subscriptions::{NodeRef, NotCounted};
use crate::{
    InvalidateRange, Mm, MmWithUser, MmapWriteGuard, Overflow, Subsystem, WouldDeadlock, lockdep,
};
use std::convert::Infallible;
use std::ptr::NonNull;

/// All notifiers of one type whose nodes lie in memory that a C caller provides, and the count of
/// their queued frees.
///
/// # Examples
/// An object with an id by which it is found, and a counter of invalidations:
///
/// ```
/// # #[global_allocator]
/// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
/// use mmu_notifier::raw::{Embedded, Node, Notifiers};
/// use mmu_notifier::{Event, InvalidateRange, MmWithUser, Notifier, VaRange};
/// use std::mem::MaybeUninit;
/// use std::ptr::NonNull;
/// use std::sync::atomic::{AtomicU32, Ordering};
///
/// struct Counter(u32, AtomicU32);
///
/// impl Notifier for Counter {
///     fn invalidate_range_start(&self, _: &InvalidateRange<'_>) {
///         self.1.fetch_add(1, Ordering::Relaxed);
///     }
/// }
///
/// // SAFETY: The memory of each node is a box of its own, leaked until here.
/// unsafe impl Embedded for Counter {
///     unsafe fn dispose(node: NonNull<Node<Self>>) {
///         // SAFETY: The node was leaked below, and no thread uses it any more.
///         drop(unsafe { Box::from_raw(node.as_ptr()) });
///     }
/// }
///
/// static COUNTERS: Notifiers<Counter> = Notifiers::new();
///
/// let mm = MmWithUser::new();
/// let place = NonNull::from(Box::leak(Box::new(MaybeUninit::<Node<Counter>>::uninit()))).cast();
/// let mut locked = mm.mmap_write_lock()?;
/// // SAFETY: The place is leaked until `dispose`.
/// unsafe { COUNTERS.register(place, Counter(7, AtomicU32::new(0)), &mut locked)? };
/// drop(locked);
///
/// drop(mm.invalidate(VaRange::ALL, Event::Clear));
/// let found = COUNTERS.find(&mm, |counter| counter.0 == 7)?.expect("it is registered");
/// // SAFETY: The node is counted.
/// assert_eq!(unsafe { found.as_ref() }.value().1.load(Ordering::Relaxed), 1);
/// for _found_and_registered in 0..2 {
///     // SAFETY: The node has a user until the second put.
///     unsafe { Node::put(found)? };
/// }
/// COUNTERS.synchronize()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Notifiers<N> {
    subsystem: Subsystem<N, Infallible, ()>,
}

impl<N: Embedded> Notifiers<N> {
    /// Makes an empty set, which can be a `static`.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it is a static")]
    pub const fn new() -> Self {
        Self {
            subsystem: Subsystem::without_alloc(),
        }
    }

    /// Returns the newest notifier of `mm` that `is_wanted` accepts and that still has users, with
    /// one more user.
    ///
    /// # Blocking
    /// Never. `is_wanted` runs in a read section and must not wait.
    /// # Errors
    /// [`Overflow`] if the notifier has the maximum number of users.
    /// # Source
    /// `find_get_mmu_notifier`, mm/mmu_notifier.c, Linux 5.15.
    #[inline]
    pub fn find(
        &self,
        mm: &MmWithUser,
        is_wanted: impl Fn(&N) -> bool,
    ) -> Result<Option<NonNull<Node<N>>>, Overflow> {
        match self.subsystem.lookup(mm, is_wanted) {
            Ok(node) => Ok(Some(node.into_node())),
            Err(NotCounted::Gone) => Ok(None),
            Err(NotCounted::Overflow) => Err(Overflow),
        }
    }

    /// Makes a node of one user at `place`, and registers the node. When this call returns, every
    /// bracket that does not call the node has ended.
    ///
    /// # Blocking
    /// Sleeps until the brackets open at that time have ended, and those opened later that it [may
    /// have to wait for](crate#what-a-wait-waits-for).
    /// # Errors
    /// [`WouldDeadlock`] if this thread has opened a bracket of the address space since it took the
    /// lock. Nothing was written.
    /// # Safety
    /// `place` must be valid for writes, aligned and not in use, and must keep the promises of
    /// [`Embedded`].
    /// # Source
    /// `__mmu_notifier_register`, Linux 5.15.
    #[cfg_attr(debug_assertions, track_caller)]
    pub unsafe fn register(
        &self,
        place: NonNull<Node<N>>,
        notifier: N,
        locked: &mut MmapWriteGuard<'_>,
    ) -> Result<(), WouldDeadlock> {
        if locked.would_deadlock() {
            return Err(WouldDeadlock);
        }
        lockdep::might_wait(Some(locked.mm().id()));
        let node = Node::unlisted(
            (**locked.mm()).clone(),
            Some(self.subsystem.pending().clone()),
            notifier,
        );
        // SAFETY: The place must be valid for writes, which the caller promises.
        unsafe { place.write(node) };
        // SAFETY: The node must be new and must stay alive. It was written above, and the caller
        // keeps it.
        let node = unsafe { NodeRef::adopt(place) };
        registrar::publish(&node, locked);
        node.set_live();
        node.into_node();
        Ok(())
    }

    /// Waits until each node whose last reference was put before the call (by any thread) has been
    /// disposed of, and its reference to the address space dropped. See
    /// [`Subsystem::synchronize`].
    ///
    /// # Blocking
    /// Sleeps for the grace periods and the frees.
    /// # Errors
    /// [`WouldDeadlock`] inside a bracket, a callback or a deferred free of any address space.
    /// # Source
    /// `mmu_notifier_synchronize`, which waits for the notifiers of all operations tables, too.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn synchronize(&self) -> Result<(), WouldDeadlock> {
        self.subsystem.synchronize()
    }
}

/// Returns the `origin` that the opener passed to [`PlacedBracket::start`], or 0 for every other
/// bracket.
#[must_use]
#[inline]
pub fn origin(range: &InvalidateRange<'_>) -> usize {
    range.origin
}

/// Tells whether a wait for brackets of `mm` would be refused: inside a bracket of this thread, in
/// a deferred free, and in the child of a fork if `mm` is the parent's.
#[must_use]
pub fn would_deadlock(mm: &Mm) -> bool {
    mm.would_deadlock()
}

/// Tells whether [`Notifiers::synchronize`] and [`Subsystem::synchronize`] would be refused: inside
/// a bracket, a callback or a deferred free of any address space.
#[must_use]
pub fn is_inside() -> bool {
    context::is_inside()
}
