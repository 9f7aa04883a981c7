//! Registrations: for callers that make a notifier and later unregister it.

mod error;

pub use error::{RegisterError, UnregisterError};

use crate::mm::subscriptions::{NodeRef, registrar};
use crate::pending::Pending;
use crate::sync::Arc;
use crate::{Mm, MmWithUser, MmapWriteGuard, Notifier, WouldDeadlock, lockdep};
use std::fmt;
use std::ops::Deref;

/// Registers a notifier, of a subsystem or of none. The caller holds the write lock.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn register<N: Notifier>(
    locked: &MmapWriteGuard<'_>,
    owner: Option<&Arc<Pending>>,
    notifier: N,
) -> Result<Registration<N>, RegisterError<N>> {
    if locked.would_deadlock() {
        return Err(RegisterError {
            error: WouldDeadlock,
            notifier,
        });
    }
    lockdep::might_wait(Some(locked.id()));
    let node = NodeRef::new((**locked.mm()).clone(), owner.cloned(), notifier);
    registrar::publish(&node, locked);
    Ok(Registration { node })
}

/// A notifier that one owner has registered and will unregister.
///
/// A registration has no key, so no lookup finds the notifier. So no second user can still have it
/// when the owner unregisters it. Dropping the registration is `put`: the drop calls no `release`
/// and does not wait, and the notifier is dropped after a grace period. To be able to wait for that
/// drop, register the notifier through a [`Subsystem`](crate::Subsystem::register).
///
/// # Source
/// `mmu_notifier_register`, `mmu_notifier_unregister`, Linux 5.15. Differs: a type of its own,
/// which `get` does not find.
///
/// # Examples
/// ```
/// use mmu_notifier::{MmWithUser, Notifier, Registration};
///
/// struct Table(Vec<u64>);
/// impl Notifier for Table {}
///
/// let mm = MmWithUser::new();
/// let registration = Registration::new(&mm, Table(vec![1]))?;
/// let table = registration.unregister()?;
/// assert_eq!(table.0, [1], "the value came back, and no callback runs in it any more");
/// # Ok::<(), mmu_notifier::WouldDeadlock>(())
/// ```
#[must_use = "dropping a registration gives its notifier up"]
#[doc(alias = "mmu_notifier_register")]
pub struct Registration<N: Notifier> {
    node: NodeRef<N>,
}

impl<N: Notifier> Registration<N> {
    /// Registers `notifier` on `mm`. When this call returns, every bracket that does not call the
    /// notifier has ended.
    ///
    /// # Blocking
    /// Sleeps while other registrars of `mm` are at work, and until the brackets open at that time
    /// have ended, and those opened later that it [may have to wait
    /// for](crate#what-a-wait-waits-for).
    /// # Errors
    /// [`RegisterError`] with the unchanged notifier, for another try, if this thread is inside a
    /// bracket of `mm`, holds its write lock (use [`new_locked`](Self::new_locked)) or runs a
    /// deferred free. Always if `mm` is the address space of a parent process.
    /// # Source
    /// `mmu_notifier_register`, Linux 5.15. Differs: a signal does not interrupt it, and it fails
    /// only before it has changed anything.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn new(mm: &MmWithUser, notifier: N) -> Result<Self, RegisterError<N>> {
        match mm.mmap_write_lock() {
            Ok(locked) => register(&locked, None, notifier),
            Err(error) => Err(RegisterError { error, notifier }),
        }
    }

    /// Like [`new`](Self::new), for a caller that holds the write lock.
    ///
    /// # Blocking
    /// Blocks as `new` does, but not for the lock.
    /// # Errors
    /// [`RegisterError`] with the unchanged notifier, if this thread has opened a bracket of the
    /// address space since it took the lock.
    /// # Source
    /// `__mmu_notifier_register`, Linux 5.15.
    /// # Examples
    /// ```
    /// use mmu_notifier::{MmWithUser, Notifier, Registration};
    ///
    /// struct Enclave;
    /// impl Notifier for Enclave {}
    ///
    /// let mm = MmWithUser::new();
    /// let mut locked = mm.mmap_write_lock()?;
    /// let registration = Registration::new_locked(&mut locked, Enclave)?; // `new` would wait for this thread itself.
    /// drop(locked);
    /// registration.unregister()?;
    /// # Ok::<(), mmu_notifier::WouldDeadlock>(())
    /// ```
    #[doc(alias = "__mmu_notifier_register")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn new_locked(
        locked: &mut MmapWriteGuard<'_>,
        notifier: N,
    ) -> Result<Self, RegisterError<N>> {
        register(locked, None, notifier)
    }

    /// Calls `release` unless exit has done so, delists the notifier, waits until no callback runs
    /// in it, and returns it.
    ///
    /// # Blocking
    /// Sleeps while `release` runs, and until the brackets open at that time have ended, and those
    /// opened later that it [may have to wait for](crate#what-a-wait-waits-for).
    /// # Errors
    /// [`UnregisterError`] with the registration, if this thread is inside a bracket or callback of
    /// the address space or runs a deferred free, or if `release` has left a bracket open on this
    /// thread. Always if the address space is that of a parent process. The notifier is still
    /// registered then. The next `unregister` calls `release` again, even if this one has called
    /// it.
    /// # Panics
    /// Never.
    /// # Source
    /// `mmu_notifier_unregister`, Linux 5.15.
    /// # Examples
    /// ```
    /// use mmu_notifier::{Event, MmWithUser, Notifier, Registration, VaRange};
    ///
    /// struct Table;
    /// impl Notifier for Table {}
    ///
    /// let mm = MmWithUser::new();
    /// let registration = Registration::new(&mm, Table)?;
    /// let bracket = mm.invalidate(VaRange::ALL, Event::Clear);
    /// let refused = registration.unregister().err().expect("it would wait for the bracket of this thread");
    /// drop(bracket);
    /// refused.registration.unregister()?;
    /// # Ok::<(), mmu_notifier::WouldDeadlock>(())
    /// ```
    #[doc(alias = "mmu_notifier_unregister")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn unregister(self) -> Result<N, UnregisterError<N>> {
        if let Err(error) = registrar::release(&self.node) {
            return Err(UnregisterError {
                error,
                registration: self,
            });
        }
        let mm = self.mm().clone();
        Ok(mm.subscriptions().reclaim(self.node))
    }

    /// Delists the notifier without `release` and without waiting, and passes its value to `free`
    /// after a grace period.
    ///
    /// A callback that is running may continue until then. This call is for a caller that has
    /// already dropped all shadow entries and must not sleep, but needs more than the plain drop of
    /// [`put`](Self::put).
    ///
    /// # Blocking
    /// Never, but this call allocates. `free` runs on the reclaimer thread and must not sleep.
    /// # Source
    /// `mmu_notifier_unregister_no_release` and `mmu_notifier_call_srcu`, Linux 5.3. Differs: the
    /// two are one call, so the value cannot be freed too early. The address space's object stays
    /// alive until `free` has returned.
    /// # Examples
    /// ```
    /// use mmu_notifier::{MmWithUser, Notifier, Registration};
    ///
    /// struct Table(u64);
    /// impl Notifier for Table {}
    ///
    /// let mm = MmWithUser::new();
    /// let registration = Registration::new(&mm, Table(7))?;
    /// let (send, received) = std::sync::mpsc::channel();
    /// registration.unregister_no_release(move |table| send.send(table.0).unwrap());
    /// assert_eq!(received.recv()?, 7, "after a grace period");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "mmu_notifier_unregister_no_release")]
    #[doc(alias = "mmu_notifier_call_srcu")]
    pub fn unregister_no_release(self, free: impl FnOnce(N) + Send + 'static) {
        let mm = self.mm().clone();
        mm.subscriptions().reclaim_later(self.node, free);
    }

    /// Delists the notifier, as dropping the registration does.
    ///
    /// Calls no `release`. The background thread drops the notifier after a grace period. If the
    /// notifier was registered through [`Subsystem::register`](crate::Subsystem::register),
    /// [`Subsystem::synchronize`](crate::Subsystem::synchronize) waits for that drop. Otherwise no
    /// function does.
    ///
    /// # Blocking
    /// Never. Allocates nothing.
    /// # Source
    /// `mmu_notifier_put` of a registered notifier, Linux 5.15.
    #[doc(alias = "mmu_notifier_put")]
    pub fn put(self) {
        drop(self);
    }

    /// Returns the address space, which may have ended.
    #[must_use]
    pub fn mm(&self) -> &Mm {
        self.node.mm()
    }
}

impl<N: Notifier> Deref for Registration<N> {
    type Target = N;

    fn deref(&self) -> &N {
        self.node.value()
    }
}

impl<N: Notifier + fmt::Debug> fmt::Debug for Registration<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("notifier", &**self)
            .finish_non_exhaustive()
    }
}
