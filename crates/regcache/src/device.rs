//! The objects that a program holds: a device, and handles of the device's caches.

mod owned_lease;

pub use owned_lease::OwnedLease;

use crate::cache::Cache;
use crate::freshness::Freshness;
use crate::index::Look;
use crate::lease::Lease;
use crate::{Error, Options, Registrar, Stats};
use mmu_notifier::{
    GetError, Mm, MmWithUser, Overflow, Subscription, Subsystem, VaRange, WouldDeadlock,
};
use std::sync::Arc;
use std::{fmt, io};

type Make<R> = Box<dyn Fn(&MmWithUser) -> io::Result<Cache<R>> + Send + Sync>;

/// A registrar and its caches, one for each address space. All callers that open an address space
/// share its cache.
///
/// Dropping a device does not close its caches.
///
/// # Examples
/// ```
/// use mmu_notifier::{Event, MmWithUser, Va, VaRange};
/// use regcache::{Counting, Device, Options};
///
/// let device = Device::new(Counting::default(), Options::new());
/// let mm = MmWithUser::new(); // Or `mmu_source::current()`, where the sources open brackets.
/// let cache = device.open(&mm)?;
///
/// let buffer = VaRange::covering(Va::new(0x7000_0000), 64 << 10)?;
/// drop(cache.get(buffer)?); // Registers the buffer.
/// let lease = cache.get(buffer)?; // Finds the registration.
/// assert_eq!(device.registrar().registered(), 1);
///
/// let bracket = mm.invalidate(buffer, Event::Unmap); // The buffer is unmapped while it is in use:
/// assert!(!lease.is_current());
/// drop(bracket);
/// assert_eq!(device.registrar().deregistered(), 0, "the lease keeps it registered");
/// drop(lease);
/// assert_eq!(device.registrar().deregistered(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Device<R: Registrar> {
    registrar: Arc<R>,
    /// An address space that has exited, which identifies the process that made the device.
    origin: Mm,
    subsystem: Subsystem<Cache<R>, io::Error, Make<R>>,
}

impl<R: Registrar> Device<R> {
    /// Makes a device whose caches have these options.
    #[must_use]
    pub fn new(registrar: R, options: Options) -> Self {
        let registrar = Arc::new(registrar);
        let for_caches = Arc::clone(&registrar);
        let make: Make<R> = Box::new(move |mm| {
            Freshness::check(&options.kernel, mm)?;
            Cache::new(Arc::clone(&for_caches), options.clone())
        });
        Self {
            registrar,
            origin: (*MmWithUser::new()).clone(),
            subsystem: Subsystem::new(make),
        }
    }

    /// Returns the registrar.
    #[must_use]
    pub fn registrar(&self) -> &R {
        &self.registrar
    }

    /// Opens the device's cache for an address space. All handles for the same address space share
    /// one cache.
    ///
    /// After the last handle is dropped, another thread deregisters all regions of the cache and
    /// frees it. [`synchronize`](Self::synchronize) waits until that is done.
    ///
    /// # Blocking
    /// The first call for an address space sleeps until the invalidations that are running have
    /// ended.
    /// # Errors
    /// [`Error::Open`] with the error of the core or of the kernel. The error is `InvalidInput` if
    /// the options have a kernel source and `mm` is not [`mmu_source::current`].
    /// [`Error::Forked`] in the child of a fork.
    pub fn open(&self, mm: &MmWithUser) -> Result<RegCache<R>, Error<R::Error>> {
        if self.origin.is_inherited() {
            return Err(Error::Forked);
        }
        let subscription = self
            .subsystem
            .get(mm)
            .map_err(|source| Error::Open { source })?;
        Ok(RegCache { subscription })
    }

    /// Waits until every cache whose last handle was dropped before this call has deregistered all
    /// its regions.
    ///
    /// # Blocking
    /// Sleeps until then.
    /// # Errors
    /// [`WouldDeadlock`] inside an invalidation callback.
    pub fn synchronize(&self) -> Result<(), WouldDeadlock> {
        self.subsystem.synchronize()
    }
}

impl<R: Registrar + fmt::Debug> fmt::Debug for Device<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("registrar", &self.registrar)
            .finish_non_exhaustive()
    }
}

/// A handle of a cache. From [`Device::open`].
///
/// Handles can be sent and shared between threads: `get` takes no lock if the range is already
/// registered.
///
/// # Signal handlers
/// A handler may call [`get_cached`](Self::get_cached), which never registers, and end the lease
/// with [`Lease::end_later`], which never deregisters. Both are safe whatever code the handler has
/// interrupted.
///
/// With [`Options::kernel`], a handler must not call [`get`](Self::get) or [`Lease::is_current`],
/// and must not drop a lease. Both calls may run callbacks, and the handler may have interrupted
/// code that holds a lock which the callbacks need.
///
/// Without it, a handler may call `is_current`. It may call `get` and drop a lease only if it
/// cannot have interrupted the allocator, and if the registrar is safe in signal handlers. The
/// reason is that any `get` can be a miss, which may allocate: a change of its memory removes even
/// a leased region from the look-up. [`Mlock`](crate::Mlock) is not safe in handlers, because it
/// would wait for the lock that the interrupted code may hold.
///
/// If the handler has interrupted work on this cache, and `get` would have to wait for that work,
/// `get` returns [`Error::WouldDeadlock`]. `get` does not notice the locks of other code, such as
/// the registrar's.
///
/// A handler must not call `flush`, `stats` or `get_owned`, and must not open or drop handles.
pub struct RegCache<R: Registrar> {
    subscription: Subscription<Cache<R>>,
}

impl<R: Registrar> RegCache<R> {
    /// Leases a region that covers `range`. If there is none, registers one.
    ///
    /// The region stays registered until the lease is dropped, whatever happens to the memory. If
    /// the memory changes meanwhile, look-ups no longer find the region, and [`Lease::is_current`]
    /// returns false.
    ///
    /// # Blocking
    /// A hit takes no lock and allocates nothing. A miss allocates, and sleeps in the registrar or
    /// while another thread registers the same memory. So a signal handler calls
    /// [`get_cached`](Self::get_cached) instead. An invalidation callback must not call `get` if
    /// that other thread's registrar could wait for the callback.
    /// # Errors
    /// Every [`Error`] except [`Error::Open`]. If a callback that the source of [`Options::kernel`]
    /// runs calls `get`, and the miss would have to sleep, the error is [`Error::Source`] with
    /// [`mmu_source::Error::InCallback`].
    #[inline(always)]
    pub fn get(&self, range: VaRange) -> Result<Lease<'_, R>, Error<R::Error>> {
        let cache = &*self.subscription;
        let quick = if cache.freshness.is_current() {
            cache.index.quick(range)
        } else {
            Err(None)
        };
        match quick.or_else(|wrong| cache.find_or_register(range, wrong)) {
            Ok(held) => Ok(Lease::new(cache, held)),
            Err(refusal) => Err(cache.error(refusal, range)),
        }
    }

    /// Leases a region that covers `range`, if the look-up finds one. Never registers, allocates
    /// nothing, and calls neither the registrar nor a callback. So it suits signal handlers, and
    /// callers that do not want to wait for a registration.
    ///
    /// # Blocking
    /// Does not wait, except once in each thread: the first look-up claims a thread number, which
    /// selects the thread's slots, under a lock that other threads hold for some hundred
    /// nanoseconds at a time.
    ///
    /// The function also returns `None` in the child of a fork. With [`Options::kernel`] it returns
    /// `None` as long as the source has counted a change whose callbacks have not run. A later
    /// [`get`](Self::get) or the source's own thread runs these callbacks.
    ///
    /// # Examples
    /// ```
    /// # use mmu_notifier::{MmWithUser, Va, VaRange};
    /// # use regcache::{Counting, Device, Options};
    /// # let (device, mm) = (Device::new(Counting::default(), Options::new()), MmWithUser::new());
    /// let cache = device.open(&mm)?;
    /// let buffer = VaRange::covering(Va::new(0x7000_0000), 64 << 10)?;
    /// assert!(cache.get_cached(buffer).is_none());
    /// drop(cache.get(buffer)?);
    /// if let Some(lease) = cache.get_cached(buffer) {
    ///     lease.end_later(); // In a signal handler. Other code can just drop it.
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn get_cached(&self, range: VaRange) -> Option<Lease<'_, R>> {
        let cache = &*self.subscription;
        if !cache.freshness.is_current() {
            return None;
        }
        let held = cache.index.quick(range).or_else(|wrong| {
            if let Some(wrong) = wrong {
                cache.end_later(&wrong);
            }
            match cache.index.look_up(range) {
                Look::Hit(held) => Ok(held),
                Look::Dead(_) => {
                    cache.index.leave_unasked();
                    Err(())
                }
                Look::Miss => Err(()),
            }
        });
        held.ok().map(|held| Lease::new(cache, held))
    }

    /// Like [`get`](Self::get), but the lease keeps the cache itself alive. So the lease can be
    /// stored with a request until the request completes. Such a lease costs two more updates of
    /// the handle count: one at the beginning and one at the end.
    ///
    /// # Errors
    /// The errors of `get`; [`Error::Open`] if there are too many handles.
    pub fn get_owned(&self, range: VaRange) -> Result<OwnedLease<R>, Error<R::Error>> {
        let cache = self.try_clone().map_err(|Overflow| Error::Open {
            source: GetError::Overflow,
        })?;
        OwnedLease::new(cache, range)
    }

    /// Leases a region that covers the memory of `buffer`.
    ///
    /// # Errors
    /// The errors of [`get`](Self::get).
    /// # Panics
    /// If the buffer is empty, because then there is nothing to register.
    #[inline]
    pub fn get_for<T>(&self, buffer: &[T]) -> Result<Lease<'_, R>, Error<R::Error>> {
        self.get(VaRange::of(buffer).expect("a buffer that is not empty covers a page"))
    }

    /// Like [`get_owned`](Self::get_owned), for the memory of `buffer`. The lease keeps the cache
    /// alive, but not the buffer.
    ///
    /// # Errors
    /// The errors of [`get_owned`](Self::get_owned).
    /// # Panics
    /// If the buffer is empty, because then there is nothing to register.
    pub fn get_owned_for<T>(&self, buffer: &[T]) -> Result<OwnedLease<R>, Error<R::Error>> {
        self.get_owned(VaRange::of(buffer).expect("a buffer that is not empty covers a page"))
    }

    /// Removes every region from the look-up and deregisters those without a lease. Returns how
    /// many regions it removed.
    ///
    /// # Blocking
    /// Sleeps in the registrar.
    pub fn flush(&self) -> u64 {
        self.subscription.flush()
    }

    /// Deregisters the regions that were removed from the look-up and could not be deregistered in
    /// a callback.
    ///
    /// A miss and the end of a lease deregister them too. So only a program that has no miss and
    /// ends no lease for a long time needs this function.
    ///
    /// # Blocking
    /// Sleeps in the registrar.
    pub fn reap(&self) {
        self.subscription.reap_killed();
    }

    /// Returns the counters of the cache, and how many regions and bytes it has now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.subscription.stats()
    }

    /// Returns the registrar.
    #[must_use]
    pub fn registrar(&self) -> &R {
        &self.subscription.registrar
    }

    /// Returns the address space.
    #[must_use]
    pub fn mm(&self) -> &Mm {
        self.subscription.mm()
    }

    /// Makes another handle of the same cache. A handle is not `Clone`, because this function can
    /// fail: the count of handles has 32 bits, as in the kernel. A handle in an `Arc` can be cloned
    /// without that limit.
    ///
    /// # Errors
    /// [`Overflow`] after 2^32 - 1 handles.
    pub fn try_clone(&self) -> Result<Self, Overflow> {
        Ok(Self {
            subscription: self.subscription.try_clone()?,
        })
    }
}

impl<R: Registrar> fmt::Debug for RegCache<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegCache")
            .field("mm", self.mm())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
