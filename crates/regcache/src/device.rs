//! What a program holds: a device, and handles of its caches.

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

/// A registrar and the caches over it: one for each address space, shared by all who open it.
///
/// Dropping it leaves the open caches alone.
///
/// # Examples
/// ```
/// use mmu_notifier::{Event, MmWithUser, Va, VaRange};
/// use regcache::{Counting, Device, Options};
///
/// let device = Device::new(Counting::default(), Options::new());
/// let mm = MmWithUser::new(); // Or `mmu_source::current()`, which event sources feed.
/// let cache = device.open(&mm)?;
///
/// let buffer = VaRange::covering(Va::new(0x7000_0000), 64 << 10)?;
/// drop(cache.get(buffer)?); // Registers it,
/// let lease = cache.get(buffer)?; // which this one finds.
/// assert_eq!(device.registrar().registered(), 1);
///
/// let bracket = mm.invalidate(buffer, Event::Unmap); // The buffer is unmapped while it is in use:
/// assert!(!lease.is_current());
/// drop(bracket);
/// assert_eq!(device.registrar().deregistered(), 0, "it stays registered for as long as the lease lasts");
/// drop(lease);
/// assert_eq!(device.registrar().deregistered(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Device<R: Registrar> {
    registrar: Arc<R>,
    /// An address space that has ended; it knows the process that it was made in.
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

    /// Opens the device's cache for an address space. All handles are of the same cache.
    ///
    /// When the last handle is dropped, the cache deregisters everything, a moment later and on
    /// another thread. [`synchronize`](Self::synchronize) waits for it.
    ///
    /// # Blocking
    /// The first one sleeps until the invalidations that run now have ended.
    /// # Errors
    /// [`Error::Open`], with the core's reason or the kernel's; also (`InvalidInput`) if the
    /// options have a kernel source and this is another address space than [`mmu_source::current`].
    /// [`Error::Forked`] in a child of the process that made the device.
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

    /// Waits until the caches whose last handle was dropped before have deregistered everything.
    ///
    /// # Blocking
    /// Sleeps meanwhile.
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
/// Send and share it as you like: `get` takes no lock for what is registered already.
///
/// # Signal handlers
/// A handler calls [`get_cached`](Self::get_cached), which never registers, and ends the lease with
/// [`Lease::end_later`], which never deregisters. Both may interrupt anything.
///
/// [`get`](Self::get) and the drop of a lease are for handlers only if the registrar is, and the
/// subscribers of the kernel source are: any `get` can be a miss. Even a leased region
/// can be out of the look-up, because a change of its memory takes it out. With
/// [`Options::kernel`], each fork changes all private writable memory. [`Mlock`](crate::Mlock) is
/// not for handlers: it would wait for the lock that the interrupted code holds. Where `get` would
/// wait for the cache's own work that the handler interrupted, it is refused
/// ([`Error::WouldDeadlock`]). `flush`, `stats`, `get_owned` and opening or dropping handles are
/// not for handlers.
pub struct RegCache<R: Registrar> {
    subscription: Subscription<Cache<R>>,
}

impl<R: Registrar> RegCache<R> {
    /// Leases a region that covers `range`, and registers one if there is none.
    ///
    /// The region stays registered until the lease is dropped, whatever happens to the memory. If
    /// it is taken away meanwhile, the lease says so ([`Lease::is_current`]), and the region is not
    /// found any more.
    ///
    /// # Blocking
    /// A hit takes no lock. A miss sleeps in the registrar, or while another thread registers the
    /// same memory. In an invalidation callback, it must not if that thread's registrar could wait
    /// for the callback; in one that the kernel source runs, it is refused. A signal handler calls
    /// [`get_cached`](Self::get_cached) instead: a hit allocates nothing and takes no lock, but a
    /// miss allocates and calls the registrar.
    /// # Errors
    /// Those of [`Error`], [`Error::Open`] apart. [`Error::Source`] with
    /// [`mmu_source::Error::InCallback`] in a callback of the kernel source of [`Options::kernel`].
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

    /// Leases a region that covers `range` if there is one in the look-up. Never registers,
    /// allocates nothing, and calls neither the registrar nor a callback: for signal handlers, and
    /// for callers that would rather go without.
    ///
    /// # Blocking
    /// Waits for nothing, except once in a thread: its first look-up takes a number for the thread,
    /// under a lock that other threads hold for some hundred nanoseconds while they take theirs.
    ///
    /// Returns `None` also in the child of a fork, and while changes that the kernel source of
    /// [`Options::kernel`] has counted were not told to the cache yet. A later [`get`](Self::get),
    /// or the source's own thread, runs their callbacks.
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
    ///     lease.end_later(); // In a handler; elsewhere it can just be dropped.
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

    /// The same as [`get`](Self::get), for a lease that keeps the cache itself, such as one that
    /// goes along with a request and is dropped when it completes. It costs more by the two counts
    /// of a handle.
    ///
    /// # Errors
    /// As `get`; [`Error::Open`] if there are too many handles.
    pub fn get_owned(&self, range: VaRange) -> Result<OwnedLease<R>, Error<R::Error>> {
        let cache = self.try_clone().map_err(|Overflow| Error::Open {
            source: GetError::Overflow,
        })?;
        OwnedLease::new(cache, range)
    }

    /// Leases a region that covers the memory of `buffer`.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    /// # Panics
    /// If the buffer is empty: there is nothing to register.
    #[inline]
    pub fn get_for<T>(&self, buffer: &[T]) -> Result<Lease<'_, R>, Error<R::Error>> {
        self.get(VaRange::of(buffer).expect("a buffer that is not empty covers a page"))
    }

    /// The same as [`get_for`](Self::get_for), for a lease that keeps the cache itself, as
    /// [`get_owned`](Self::get_owned) gives it. It does not keep the buffer.
    ///
    /// # Errors
    /// As [`get_owned`](Self::get_owned).
    /// # Panics
    /// If the buffer is empty: there is nothing to register.
    pub fn get_owned_for<T>(&self, buffer: &[T]) -> Result<OwnedLease<R>, Error<R::Error>> {
        self.get_owned(VaRange::of(buffer).expect("a buffer that is not empty covers a page"))
    }

    /// Takes everything out of the look-up and deregisters what is not leased. Returns how many
    /// regions were found until then.
    ///
    /// # Blocking
    /// Sleeps in the registrar.
    pub fn flush(&self) -> u64 {
        self.subscription.flush()
    }

    /// Deregisters what was taken out of the look-up and could not be deregistered in a callback.
    ///
    /// Misses and ends of leases do so, too. This is for programs that have neither for a long
    /// time.
    ///
    /// # Blocking
    /// Sleeps in the registrar.
    pub fn reap(&self) {
        self.subscription.reap_killed();
    }

    /// Returns what the cache did and holds.
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

    /// Makes another handle of the same cache. Not `Clone`, because the count of handles is 32 bits
    /// wide, as the kernel's is, and a clone cannot fail; an `Arc` of one handle can be cloned.
    ///
    /// # Errors
    /// [`Overflow`] after 2^32 - 1 of them.
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
