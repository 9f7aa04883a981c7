//! The interface through which a cache registers memory.

use mmu_notifier::VaRange;
use std::error::Error;

/// A device, or another client that must register memory before it uses that memory.
///
/// # Examples
/// ```
/// use mmu_notifier::VaRange;
/// use regcache::Registrar;
/// use std::convert::Infallible;
///
/// /// Registers nothing; the handle is the range itself.
/// struct Nowhere;
///
/// impl Registrar for Nowhere {
///     type Handle = VaRange;
///     type Error = Infallible;
///
///     fn register(&self, range: VaRange) -> Result<VaRange, Infallible> {
///         Ok(range)
///     }
///
///     fn deregister(&self, _handle: VaRange) {}
/// }
/// ```
pub trait Registrar: Send + Sync + 'static {
    /// The handle of a registration, such as a key or an index. The holders of the region's leases
    /// can read the handle.
    type Handle: Send + Sync + 'static;
    /// Why a registration failed.
    type Error: Error + Send + Sync + 'static;

    /// Registers a range of this process's memory.
    ///
    /// The cache calls `register` without a lock, on several threads at once, and for ranges that
    /// may overlap. The registrar must not use the cache that calls it.
    ///
    /// # Errors
    /// Any error of the device. [`cause`](Self::cause) decides how the cache handles the error.
    /// After an error, no part of the range may stay registered.
    fn register(&self, range: VaRange) -> Result<Self::Handle, Self::Error>;

    /// Undoes a registration that has no lease any more.
    ///
    /// The cache calls `deregister` without a lock. The function cannot fail, because the cache
    /// could not do anything about a failure.
    fn deregister(&self, handle: Self::Handle);

    /// Returns the cause of an error of [`register`](Self::register).
    fn cause(&self, error: &Self::Error) -> Cause {
        let _ = error;
        Cause::Other
    }

    /// Whether [`deregister`](Self::deregister) may be called inside an invalidation callback, so
    /// that a region that is not leased is deregistered before the memory goes away.
    ///
    /// Such a callback can run in the middle of `free`, with the allocator's lock held. If this
    /// function returns true, `deregister` and the drop of the handle must not allocate, free or
    /// unmap, and must not wait for a lock whose holder may be doing so. If this function returns
    /// false, the callback only removes the region from the look-up. Then the next miss, flush,
    /// [`reap`](crate::RegCache::reap) or end of a lease deregisters the region.
    fn deregisters_in_callbacks(&self) -> bool {
        false
    }
}

/// The cause of a failed registration, which decides what the cache does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// A limit is reached, such as `ENOMEM` for `RLIMIT_MEMLOCK`. The cache evicts a region and
    /// tries once more.
    Limit,
    /// Not all of the range is mapped, such as `EFAULT`.
    NotMapped,
    /// Anything else.
    Other,
}
