//! A device, its caches, and what the core tells them.

use crate::error::Refusal;
use crate::gate::{Armed, Gate};
use crate::index::{Index, Look};
use crate::lease::{Lease, OwnedLease};
use crate::options::reported;
use crate::raw::handles::Handles;
use crate::raw::held::Held;
use crate::raw::region::Status;
use crate::state::{Chain, State};
use crate::sync::{AtWork, Condvar, Mutex, MutexGuard, is_locking, lock, try_lock};
use crate::{Error, Options, Registrar, Stats};
use mmu_notifier::{
    GetError, InvalidateRange, Mm, MmWithUser, Notifier, Overflow, Subscription, Subsystem,
    VaRange, WouldBlock, WouldDeadlock,
};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
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
/// let bracket = mm.invalidate(buffer, Event::Unmap); // Somebody unmaps it while it is in use:
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
    home: Mm,
    subsystem: Subsystem<Cache<R>, io::Error, Make<R>>,
}

impl<R: Registrar> Device<R> {
    /// Makes a device whose caches have these options.
    #[must_use]
    pub fn new(registrar: R, options: Options) -> Self {
        let registrar = Arc::new(registrar);
        let for_caches = Arc::clone(&registrar);
        let make: Make<R> = Box::new(move |mm| {
            Gate::check(&options.kernel, mm)?;
            Cache::new(Arc::clone(&for_caches), options.clone())
        });
        Self {
            registrar,
            home: (*MmWithUser::new()).clone(),
            subsystem: Subsystem::new(make),
        }
    }

    /// Returns the registrar.
    #[must_use]
    pub fn registrar(&self) -> &R {
        &self.registrar
    }

    /// Opens the device's cache for an address space, the same one for everybody.
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
        if self.home.is_inherited() {
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
/// subscribers of the kernel source are: any `get` can be a miss, also of a region that is leased,
/// because a change of its memory takes it out of the look-up. With [`Options::kernel`], each fork
/// changes all private writable memory. [`Mlock`](crate::Mlock) is not for handlers: it would wait
/// for the lock that the interrupted code holds. Where `get` would wait for the cache's own work
/// that the handler interrupted, it is refused ([`Error::WouldDeadlock`]). `flush`, `stats`,
/// `get_owned` and opening or dropping handles are not for handlers.
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
        let quick = if cache.gate.is_current() {
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
    /// `None` also while the kernel source of [`Options::kernel`] has changes that were not told
    /// yet, and in the child of a fork. A later [`get`](Self::get), or the source's own thread, has
    /// them told.
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
        if !cache.gate.is_current() {
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
    /// goes along with a request and is dropped when it completes. Dearer by the two counts of a
    /// handle.
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

/// What is kept of a registration.
pub(crate) struct Registered<R: Registrar> {
    pub(crate) handle: R::Handle,
    pub(crate) armed: Option<Armed>,
}

/// The notifier.
pub(crate) struct Cache<R: Registrar> {
    pub(crate) index: Index,
    pub(crate) handles: Handles<Registered<R>>,
    pub(crate) state: Mutex<State>,
    /// Notified when a registration has begun or ceased to exist and a thread waits for that.
    pub(crate) ended: Condvar,
    pub(crate) registrar: Arc<R>,
    pub(crate) options: Options,
    pub(crate) gate: Gate,
    in_callbacks: bool,
}

impl<R: Registrar> Cache<R> {
    fn new(registrar: Arc<R>, options: Options) -> io::Result<Self> {
        Ok(Self {
            index: Index::new(options.max_regions)?,
            handles: Handles::new(options.max_regions as usize),
            state: Mutex::new(State::new(options.max_regions)),
            ended: Condvar::new(),
            in_callbacks: registrar.deregisters_in_callbacks(),
            registrar,
            gate: Gate::new(options.kernel.clone()),
            options,
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The way of a request that was no quick hit, and may have leased a region that was not what
    /// it wanted. Its result fits into two registers, so that the quick way needs no memory for it.
    #[cold]
    #[inline(never)]
    fn find_or_register(
        &self,
        range: VaRange,
        wrong: Option<Held<'_>>,
    ) -> Result<Held<'_>, Refusal<R::Error>> {
        if let Some(held) = &wrong {
            self.end(held);
        }
        // To look again would be in vain, mostly, and what it misses is found under the lock.
        if wrong.is_some() || !self.gate.is_current() || !self.index.quick_sees_all() {
            self.gate.settle()?;
            match self.index.look_up(range) {
                Look::Hit(held) => return Ok(held),
                Look::Dead(region) => self.ended_dead(region),
                Look::Miss => {}
            }
        }
        self.miss(range)
    }

    /// The error of a request for `range`. Out of line, so that a hit does not make ready for it.
    #[cold]
    #[inline(never)]
    fn error(&self, refusal: Refusal<R::Error>, range: VaRange) -> Error<R::Error> {
        match refusal {
            Refusal::WouldDeadlock => Error::WouldDeadlock,
            #[cfg(feature = "kernel")]
            Refusal::InCallback => Error::Source {
                source: mmu_source::Error::InCallback { source: "kernel" },
            },
            Refusal::Forked => Error::Forked,
            Refusal::Exited => Error::Exited,
            Refusal::TooLarge => Error::TooLarge {
                range,
                limit: self.options.max_bytes,
            },
            Refusal::Full => {
                let state = self.lock();
                Error::Full {
                    range,
                    regions: state.regions,
                    bytes: reported(state.bytes),
                }
            }
            Refusal::Other(error) => *error,
        }
    }

    /// Ends a lease.
    #[inline(always)]
    pub(crate) fn end(&self, held: &Held<'_>) {
        if let Some(region) = self.index.end(held) {
            self.ended_dead(region);
        }
    }

    /// Ends a lease. The next scan asks whether it was the last.
    pub(crate) fn end_later(&self, held: &Held<'_>) {
        if self.index.end(held).is_some() {
            self.index.leave_unasked();
        }
    }

    /// Deregisters a dead region, if the lease that has just ended was its last.
    #[cold]
    #[inline(never)]
    fn ended_dead(&self, region: u32) {
        if self.index.page.is_inherited() {
            return;
        }
        if is_locking() {
            // In a signal handler. The next scan asks, perhaps that of the interrupted work.
            return self.index.leave_unasked();
        }
        let _at_work = AtWork::mark(self);
        let chain = self.lock().lease_ended(&self.index, region);
        self.reap(chain);
    }

    /// Deregisters the regions of a chain and frees their places.
    ///
    /// # Panics
    /// As the registrar does, once all regions have been deregistered: a panic costs the one region
    /// that it is about.
    pub(crate) fn reap(&self, mut chain: Chain) {
        if chain.is_empty() {
            return;
        }
        let mut first_panic = None;
        let mut next = self.lock().next_of(&mut chain);
        while let Some(region) = next {
            let result = catch_unwind(AssertUnwindSafe(|| self.deregister(region)));
            let mut state = self.lock();
            state.reaped(&self.index, region);
            next = state.next_of(&mut chain);
            self.wake(state);
            match result {
                Err(panic) if first_panic.is_none() => first_panic = Some(panic),
                // Leaked: its drop could panic as well. The panic hook has reported it.
                Err(panic) => std::mem::forget(panic),
                Ok(()) => {}
            }
        }
        if let Some(panic) = first_panic {
            resume_unwind(panic);
        }
    }

    /// Deregisters a region that is in the state `Reaping`, and has no more changes of it counted.
    pub(crate) fn deregister(&self, region: u32) {
        let Registered { handle, armed } = self.take(region);
        self.registrar.deregister(handle);
        drop(armed);
    }

    /// Takes the handle of a region that is in the state `Reaping`.
    #[expect(unsafe_code, reason = "the one place where a handle leaves")]
    pub(crate) fn take(&self, region: u32) -> Registered<R> {
        // SAFETY: The region must be registered, without a lease now and later, and this be done
        // once: it is `Reaping`, which it became under the lock after a scan found no lease, and
        // which only the caller that has it in its chain ends.
        unsafe { self.handles.take(region) }
    }

    pub(crate) fn reap_killed(&self) {
        if self.index.page.is_inherited() {
            return;
        }
        let _at_work = AtWork::mark(self);
        let chain = self.lock().harvest(&self.index);
        self.reap(chain);
    }

    fn flush(&self) -> u64 {
        if self.index.page.is_inherited() {
            return 0;
        }
        let _at_work = AtWork::mark(self);
        let (flushed, chain) = {
            let mut state = self.lock();
            let flushed = state.kill_all(&self.index);
            state.counts.flushed += flushed;
            (flushed, state.harvest(&self.index))
        };
        self.reap(chain);
        flushed
    }

    fn stats(&self) -> Stats {
        if self.index.page.is_inherited() {
            // A thread that is not in the child may have held the lock.
            return Stats::default();
        }
        let hits = self.index.hits();
        let state = self.lock();
        let counts = state.counts;
        Stats {
            hits: hits + counts.hits,
            misses: counts.misses,
            waits: counts.waits,
            registered: counts.registered,
            deregistered: counts.deregistered,
            failed: counts.failed,
            invalidated: counts.invalidated,
            replaced: counts.replaced,
            evicted: counts.evicted,
            flushed: counts.flushed,
            collisions: counts.collisions,
            lost: self.gate.lost(),
            regions: state.regions.into(),
            bytes: reported(state.bytes),
            live_regions: state.live_regions.into(),
            live_bytes: reported(state.live_bytes),
        }
    }

    fn start(&self, range: VaRange) {
        let _at_work = AtWork::mark(self);
        let mut state = self.lock();
        state.invalidate_start(&self.index, range);
        let chain = if self.in_callbacks {
            state.harvest(&self.index)
        } else {
            Chain::default()
        };
        drop(state);
        self.reap(chain);
    }
}

impl<R: Registrar> Notifier for Cache<R> {
    fn release(&self, _mm: &Mm) {
        if self.index.page.is_inherited() {
            return;
        }
        let _at_work = AtWork::mark(self);
        let chain = {
            let mut state = self.lock();
            state.closed = true;
            state.invalidate(&self.index, VaRange::ALL);
            self.index.page.close();
            state.harvest(&self.index)
        };
        self.reap(chain);
    }

    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        if !self.index.page.is_inherited() {
            self.start(range.range());
        }
    }

    fn try_invalidate_range_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        if !self.index.page.is_inherited() {
            let mut state = try_lock(&self.state).ok_or(WouldBlock)?;
            // What is not leased is deregistered later: that may sleep.
            state.invalidate_start(&self.index, range.range());
        }
        Ok(())
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        if !self.index.page.is_inherited() {
            self.lock().invalidate_end(range.range());
        }
    }
}

impl<R: Registrar> Drop for Cache<R> {
    /// Deregisters what is left, except under leases that were forgotten: their owners may still be
    /// at it.
    fn drop(&mut self) {
        if self.index.page.is_inherited() {
            return;
        }
        self.flush();
        let left = self
            .lock()
            .used()
            .filter(|(_, status)| *status == Status::Leased)
            .count();
        // Those keep their handles, which are leaked with them.
        debug_assert!(left == 0 || !cfg!(mmun_loom), "no model forgets a lease");
    }
}
