//! Subsystems: each is one instance of an operations table, and the key for its notifier on an
//! address space.

use crate::mm::context;
use crate::mm::subscriptions::registrar;
use crate::mm::subscriptions::{NodeRef, NotCounted};
use crate::pending::Pending;
use crate::registration;
use crate::subscription::Subscription;
use crate::sync::{Arc, forks};
use crate::{
    GetError, MmWithUser, MmapWriteGuard, Notifier, RegisterError, Registration, WouldDeadlock,
    lockdep,
};
use once_cell::race::OnceBox;
use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;

/// An instance of an operations table. Each address space has at most one live notifier that
/// [`get`](Self::get) of this subsystem has made.
///
/// The instance is the key: two subsystems of one type are two keys. `alloc` makes the notifier for
/// an address space that has none. The address space is locked while `alloc` runs, so `alloc` may
/// sleep but must not register on this address space. The notifier must be complete, because
/// callbacks may run before [`get`](Self::get) has returned.
///
/// The drop of a subsystem does not affect its subscriptions.
///
/// # Source
/// `struct mmu_notifier_ops` with `alloc_notifier`, Linux 5.4. Differs: the key is the instance and
/// never the address of a table or function, because Rust may merge those.
///
/// # Examples
/// ```
/// # #[global_allocator]
/// # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
/// use mmu_notifier::{InvalidateRange, MmWithUser, Notifier, Subsystem};
///
/// struct ShadowTable;
/// impl Notifier for ShadowTable {
///     fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
///         let _ = range.range(); // Let go of it here, without the allocator.
///     }
/// }
///
/// static SHADOW: Subsystem<ShadowTable> = Subsystem::new(|_mm| Ok(ShadowTable));
///
/// let mm = MmWithUser::new();
/// let one = SHADOW.get(&mm)?;
/// let same = SHADOW.get(&mm)?;
/// assert!(std::ptr::eq(&*one, &*same));
/// one.put();
/// same.put(); // The last: the notifier is freed after a grace period.
/// SHADOW.synchronize()?; // Now it has been.
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[doc(alias = "mmu_notifier_ops")]
pub struct Subsystem<N, E = Infallible, F = fn(&MmWithUser) -> Result<N, E>> {
    alloc: F,
    users_max: u32,
    pending: OnceBox<Arc<Pending>>,
    makes: PhantomData<fn() -> Result<N, E>>,
}

impl<N, E, F> Subsystem<N, E, F>
where
    N: Notifier,
    F: Fn(&MmWithUser) -> Result<N, E>,
{
    /// Makes a subsystem whose notifiers `alloc` makes.
    #[must_use]
    pub const fn new(alloc: F) -> Self {
        Self::with_users_max(alloc, u32::MAX)
    }

    /// Like `new`, with a lower limit on the users of one notifier, for tests of the overflow.
    #[doc(hidden)]
    #[must_use]
    pub const fn with_users_max(alloc: F, users_max: u32) -> Self {
        Self {
            alloc,
            users_max,
            pending: OnceBox::new(),
            makes: PhantomData,
        }
    }

    /// Returns a reference to this subsystem's notifier on `mm`. Makes the notifier if there is
    /// none.
    ///
    /// When `get` returns, every bracket that does not call this notifier has ended. So if the
    /// caller caches a translation afterwards, every bracket that changes it calls the notifier.
    ///
    /// # Blocking
    /// Never, if the notifier exists: `get` finds it without a lock. To make a notifier, `get`
    /// sleeps in `alloc`, while other registrars of `mm` are at work, and until the brackets open
    /// at that time have ended, and those opened later that it [may have to wait
    /// for](crate#what-a-wait-waits-for).
    /// # Errors
    /// [`GetError::Alloc`] if `alloc` failed; nothing was registered. [`GetError::Overflow`] if the
    /// notifier has the maximum number of users. [`GetError::WouldDeadlock`] if there is no
    /// notifier yet and this thread is inside a bracket of `mm`, holds its write lock (use
    /// [`get_locked`](Self::get_locked)) or runs a deferred free. Always `WouldDeadlock` if `mm` is
    /// the address space of a parent process. `alloc` was not called then, unless `alloc` itself
    /// left a bracket open.
    /// # Source
    /// `mmu_notifier_get`, Linux 5.4. Differs: a signal does not interrupt it, and the caller
    /// cannot pass a dead address space.
    #[doc(alias = "mmu_notifier_get")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn get(&self, mm: &MmWithUser) -> Result<Subscription<N>, GetError<E>> {
        match self.find(mm) {
            Some(found) => found,
            None => self.get_slowly(mm),
        }
    }

    /// Out of line, because this function needs stack space for a notifier that is aligned to cache
    /// lines, while the fast path of `get` needs no stack.
    #[cold]
    #[cfg_attr(debug_assertions, track_caller)]
    fn get_slowly(&self, mm: &MmWithUser) -> Result<Subscription<N>, GetError<E>> {
        let mut locked = mm
            .mmap_write_lock()
            .map_err(|WouldDeadlock| GetError::WouldDeadlock)?;
        self.get_locked(&mut locked)
    }

    /// Like [`get`](Self::get), for a caller that holds the write lock.
    ///
    /// # Blocking
    /// Blocks as `get` does, but not for the lock.
    /// # Errors
    /// The errors of `get`. [`GetError::WouldDeadlock`] only if this thread has opened a bracket of
    /// the address space since it took the lock.
    /// # Source
    /// `mmu_notifier_get_locked`, Linux 5.4.
    /// # Examples
    /// ```
    /// use mmu_notifier::{MmWithUser, Notifier, Subsystem};
    ///
    /// struct Gru;
    /// impl Notifier for Gru {}
    /// static GRU: Subsystem<Gru> = Subsystem::new(|_| Ok(Gru));
    ///
    /// let mm = MmWithUser::new();
    /// let mut locked = mm.mmap_write_lock()?;
    /// let subscription = GRU.get_locked(&mut locked)?; // `get` would wait for this thread itself.
    /// drop(locked);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "mmu_notifier_get_locked")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn get_locked(
        &self,
        locked: &mut MmapWriteGuard<'_>,
    ) -> Result<Subscription<N>, GetError<E>> {
        if let Some(found) = self.find(locked.mm()) {
            return found;
        }
        if locked.would_deadlock() {
            return Err(GetError::WouldDeadlock);
        }
        lockdep::might_wait(Some(locked.mm().id()));
        let notifier = (self.alloc)(locked.mm()).map_err(GetError::Alloc)?;
        if locked.would_deadlock() {
            // `alloc` has left a bracket open on this thread, and the registrar would wait for that
            // bracket.
            return Err(GetError::WouldDeadlock);
        }
        let node = NodeRef::new(
            (**locked.mm()).clone(),
            Some(Arc::clone(self.pending())),
            notifier,
        );
        registrar::publish(&node, locked);
        node.set_live();
        Ok(Subscription::new(node))
    }

    #[inline(always)]
    fn find(&self, mm: &MmWithUser) -> Option<Result<Subscription<N>, GetError<E>>> {
        match self.lookup(mm, |_| true) {
            Ok(node) => Some(Ok(Subscription::new(node))),
            Err(NotCounted::Overflow) => Some(Err(GetError::Overflow)),
            Err(NotCounted::Gone) => None,
        }
    }
}

impl<N: Notifier> Subsystem<N, Infallible, ()> {
    /// Makes a subsystem without `get`. All its notifiers come from [`register`](Self::register).
    ///
    /// # Source
    /// `struct mmu_notifier_ops` without `alloc_notifier`.
    #[must_use]
    pub const fn without_alloc() -> Self {
        Self {
            alloc: (),
            users_max: u32::MAX,
            pending: OnceBox::new(),
            makes: PhantomData,
        }
    }
}

impl<N: Notifier, E, F> Subsystem<N, E, F> {
    /// Finds the newest live notifier for which `is_wanted` is true, and takes a reference to it.
    #[inline(always)]
    pub(crate) fn lookup(
        &self,
        mm: &MmWithUser,
        is_wanted: impl Fn(&N) -> bool,
    ) -> Result<NodeRef<N>, NotCounted> {
        if mm.is_inherited() {
            return Err(NotCounted::Gone);
        }
        mm.subscriptions().lookup(self.pending(), is_wanted)
    }

    /// Registers a notifier that the caller made, as [`Registration::new`] does.
    /// [`synchronize`](Self::synchronize) waits for the free of this notifier as well.
    ///
    /// [`get`](Self::get) does not find this notifier, and it does not count as the subsystem's one
    /// notifier of `mm`.
    ///
    /// # Blocking
    /// Blocks as [`Registration::new`] does.
    /// # Errors
    /// The errors of [`Registration::new`].
    /// # Source
    /// `mmu_notifier_register`, Linux 5.15. Differs: `get` does not find it.
    /// # Examples
    /// ```
    /// # use std::convert::Infallible;
    /// use mmu_notifier::{MmWithUser, Notifier, Subsystem};
    ///
    /// struct Domain(std::sync::mpsc::Sender<&'static str>);
    /// impl Notifier for Domain {}
    /// impl Drop for Domain {
    ///     fn drop(&mut self) {
    ///         self.0.send("freed").unwrap();
    ///     }
    /// }
    /// static DOMAINS: Subsystem<Domain, Infallible, ()> = Subsystem::without_alloc();
    ///
    /// let (mm, (send, freed)) = (MmWithUser::new(), std::sync::mpsc::channel());
    /// DOMAINS.register(&mm, Domain(send))?.put();
    /// DOMAINS.synchronize()?;
    /// assert_eq!(freed.try_recv(), Ok("freed"));
    /// # Ok::<(), mmu_notifier::WouldDeadlock>(())
    /// ```
    #[doc(alias = "mmu_notifier_register")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn register(
        &self,
        mm: &MmWithUser,
        notifier: N,
    ) -> Result<Registration<N>, RegisterError<N>> {
        match mm.mmap_write_lock() {
            Ok(locked) => registration::register(&locked, Some(self.pending()), notifier),
            Err(error) => Err(RegisterError { error, notifier }),
        }
    }

    /// Like [`register`](Self::register), for a caller that holds the write lock.
    ///
    /// # Blocking
    /// Blocks as [`Registration::new_locked`] does.
    /// # Errors
    /// The errors of [`Registration::new_locked`].
    /// # Source
    /// `__mmu_notifier_register`, Linux 5.15.
    #[doc(alias = "__mmu_notifier_register")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn register_locked(
        &self,
        locked: &mut MmapWriteGuard<'_>,
        notifier: N,
    ) -> Result<Registration<N>, RegisterError<N>> {
        registration::register(locked, Some(self.pending()), notifier)
    }

    /// Waits until each notifier of this subsystem whose last reference was put before the call (by
    /// any thread) has been freed, and its reference to the address space dropped. This covers the
    /// notifiers that `get` made, those that [`register`](Self::register) registered, and the
    /// values that [`unregister_no_release`](Registration::unregister_no_release) passes to its
    /// closure.
    ///
    /// This call does not wait for notifiers that these frees put. Use
    /// [`drain_until_idle`](Self::drain_until_idle) for those.
    ///
    /// # Blocking
    /// Sleeps for the grace periods and the frees.
    /// # Errors
    /// [`WouldDeadlock`] inside a bracket, a callback or a deferred free of any address space.
    /// # Source
    /// `mmu_notifier_synchronize`. Differs: the kernel's function only waits for a grace period,
    /// although its comment promises this wait.
    #[doc(alias = "mmu_notifier_synchronize")]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn synchronize(&self) -> Result<(), WouldDeadlock> {
        if context::is_inside() {
            return Err(WouldDeadlock);
        }
        lockdep::might_wait(None);
        self.pending().synchronize();
        Ok(())
    }

    /// Waits until no free of this subsystem is queued or running. Unlike
    /// [`synchronize`](Self::synchronize), it also waits for the notifiers that these frees put.
    ///
    /// # Blocking
    /// Sleeps for the grace periods and the frees. Never returns if other threads never stop
    /// putting.
    /// # Errors
    /// [`WouldDeadlock`] inside a bracket, a callback or a deferred free of any address space.
    /// # Source
    /// None: the kernel's users that need this flush a work queue of their own.
    /// # Examples
    /// ```
    /// # use mmu_notifier::{MmWithUser, Notifier, Subscription, Subsystem};
    /// /// Keeps the device of another address space until it is freed itself.
    /// struct Device(Option<Subscription<Device>>);
    /// impl Notifier for Device {}
    ///
    /// let (outer, inner) = (MmWithUser::new(), MmWithUser::new());
    /// let devices = Subsystem::<Device, _, _>::new(|mm: &MmWithUser| {
    ///     Ok::<_, std::convert::Infallible>(Device(if **mm == *outer { Some(INNER.get(&inner).unwrap()) } else { None }))
    /// });
    /// # static INNER: Subsystem<Device> = Subsystem::new(|_| Ok(Device(None)));
    /// devices.get(&outer)?.put();
    /// devices.drain_until_idle()?;
    /// INNER.drain_until_idle()?; // Another subsystem: it is drained by itself.
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn drain_until_idle(&self) -> Result<(), WouldDeadlock> {
        if context::is_inside() {
            return Err(WouldDeadlock);
        }
        lockdep::might_wait(None);
        while !self.pending().is_idle() {
            self.pending().synchronize();
        }
        Ok(())
    }

    /// Returns the count of unfinished frees of this process. The first call makes the count. The
    /// child of a fork gets a new one.
    #[inline]
    pub(crate) fn pending(&self) -> &Arc<Pending> {
        self.pending
            .get()
            .filter(|pending| pending.forks == forks())
            .unwrap_or_else(|| self.pending_slowly())
    }

    #[cold]
    fn pending_slowly(&self) -> &Arc<Pending> {
        let mut place = &self.pending;
        loop {
            let pending = place.get_or_init(|| Box::new(Arc::new(Pending::new(self.users_max))));
            if pending.forks == forks() {
                return pending;
            }
            place = &pending.child;
        }
    }
}

impl<N, E, F> fmt::Debug for Subsystem<N, E, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subsystem")
            .field("pending", &self.pending.get())
            .finish_non_exhaustive()
    }
}
