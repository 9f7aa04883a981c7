//! `struct mmun_regcache`: a registration cache whose registrar is a struct of functions.

use crate::args::{self, Growing};
use crate::border::{Uncancelled, die, export, guarded};
use crate::error::{IN_CALLBACK, INVALID, Refused, fail, of_cache};
use crate::sources::{Mmun, code, share};
use ::regcache::{Cause, Device, Lease as Held, Merge, RegCache, Registrar};
use libc::{c_int, c_void};
use mmu_notifier::{Notifier, Registration, Va, VaRange};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

type Register =
    unsafe extern "C-unwind" fn(*mut c_void, *mut c_void, usize, *mut *mut c_void) -> c_int;
type Deregister = unsafe extern "C-unwind" fn(*mut c_void, *mut c_void, usize, *mut c_void);

/// `struct mmun_registrar`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Functions {
    size: usize,
    context: *mut c_void,
    register_region: Option<Register>,
    deregister_region: Option<Deregister>,
    flags: u64,
}

// SAFETY: The type is `repr(C)` and begins with a `usize`. Pointers and integers may have any bits.
// Each function is null or follows its prototype (crate docs, Callbacks).
unsafe impl Growing for Functions {
    const FIRST: usize = 40;
}

const IN_CALLBACKS: u64 = 1;

/// `struct mmun_regcache_options`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Options {
    size: usize,
    merge: u32,
    max_regions: u32,
    max_bytes: u64,
    max_region_bytes: u64,
}

// SAFETY: The type is `repr(C)`, begins with a `usize` and consists of integers.
unsafe impl Growing for Options {
    const FIRST: usize = 32;
}

impl Options {
    fn options(self, mmun: &Mmun) -> Result<::regcache::Options, c_int> {
        let merge = match self.merge {
            0 => Merge::Overlapping,
            1 => Merge::Never,
            2 => Merge::Adjacent,
            _ => {
                return Err(fail(
                    -libc::EINVAL,
                    c"mmun_regcache_open: the options have an unknown value of merge",
                ));
            }
        };
        let mut options = ::regcache::Options::new().merge(merge);
        if self.max_regions != 0 {
            options = options.max_regions(self.max_regions);
        }
        if self.max_bytes != 0 {
            options = options.max_bytes(self.max_bytes);
        }
        if self.max_region_bytes != 0 {
            options = options.max_region_bytes(self.max_region_bytes);
        }
        Ok(match &mmun.kernel {
            Some(kernel) => options.kernel(Arc::clone(kernel)),
            None => options,
        })
    }
}

/// `struct mmun_regcache_stats`: the fields of [`::regcache::Stats`], in their order.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Stats {
    size: usize,
    values: [u64; 16],
}

// SAFETY: The type is `repr(C)`, begins with a `usize` and consists of integers.
unsafe impl Growing for Stats {
    const FIRST: usize = 136;
}

/// A registrar that is written in C.
#[derive(Debug)]
struct Driver {
    context: *mut c_void,
    register_region: Register,
    deregister_region: Deregister,
    in_callbacks: bool,
}

// SAFETY: The functions may run on any thread, in parallel, with the context (crate docs,
// Callbacks).
unsafe impl Send for Driver {}
// SAFETY: As for `Send`.
unsafe impl Sync for Driver {}

/// The handle that the C registrar has stored for a region.
#[derive(Debug)]
struct Handle {
    value: *mut c_void,
    range: VaRange,
}

// SAFETY: This library never dereferences the pointer. It passes the pointer only to C code, whose
// functions accept it on any thread (crate docs, Callbacks).
unsafe impl Send for Handle {}
// SAFETY: As for `Send`.
unsafe impl Sync for Handle {}

fn start(range: VaRange) -> *mut c_void {
    ptr::without_provenance_mut(range.start().get() as usize)
}

/// Returns the length of a range in bytes. The range must not include the last address of the
/// address space.
fn length(range: VaRange) -> usize {
    (range.last().get() - range.start().get()) as usize + 1
}

impl Registrar for Driver {
    type Handle = Handle;
    type Error = Refused;

    fn register(&self, range: VaRange) -> Result<Handle, Refused> {
        let _whole = Uncancelled::enter();
        let mut value = ptr::null_mut();
        let mut register = || {
            // SAFETY: The function follows its prototype (crate docs, Callbacks), and gets the
            // context that the program has given with it.
            unsafe {
                (self.register_region)(self.context, start(range), length(range), &raw mut value)
            }
        };
        match guarded!("mmun_registrar.register_region", register()) {
            0 => Ok(Handle { value, range }),
            code @ -4095..0 => Err(Refused(code)),
            _ => Err(Refused(-libc::EIO)),
        }
    }

    fn deregister(&self, Handle { value, range }: Handle) {
        let _whole = Uncancelled::enter();
        let deregister = || {
            // SAFETY: The function follows its prototype (crate docs, Callbacks). It gets each
            // handle once, because `deregister` takes the `Handle` by value.
            unsafe { (self.deregister_region)(self.context, start(range), length(range), value) }
        };
        guarded!("mmun_registrar.deregister_region", deregister());
    }

    fn cause(&self, error: &Refused) -> Cause {
        match -error.0 {
            libc::ENOMEM | libc::EAGAIN | libc::ENOSPC => Cause::Limit,
            libc::EFAULT => Cause::NotMapped,
            _ => Cause::Other,
        }
    }

    fn deregisters_in_callbacks(&self) -> bool {
        self.in_callbacks
    }
}

/// `struct mmun_regcache`.
#[derive(Debug)]
pub struct Regcache {
    cache: RegCache<Driver>,
    device: Device<Driver>,
    mmun: Arc<Mmun>,
}

/// `struct mmun_lease`.
#[repr(C)]
#[derive(Debug)]
pub struct Lease {
    handle: *mut c_void,
    /// A [`Held`], or zeroes if there is no lease. In a lease the first word is not zero, because
    /// it is the address of the cache.
    held: MaybeUninit<[usize; LEASE_WORDS]>,
}

const LEASE_WORDS: usize = 2;
const _: () = assert!(size_of::<Held<'static, Driver>>() == LEASE_WORDS * size_of::<usize>());
const _: () = assert!(align_of::<Held<'static, Driver>>() <= align_of::<usize>());

impl Lease {
    const NONE: Self = Self {
        handle: ptr::null_mut(),
        held: MaybeUninit::new([0; LEASE_WORDS]),
    };

    fn is_held(&self) -> bool {
        // This reads only the first word. The two words were stored one by one, so a single load of
        // both words could not be forwarded from the store buffer, and would stall.
        // SAFETY: The word is initialised. `mmun_regcache_get` writes every lease, and C code
        // passes only leases that it has got or zeroed (crate docs, Objects).
        unsafe { self.held.as_ptr().cast::<usize>().read() != 0 }
    }

    /// Returns the lease in a struct, if there is one.
    ///
    /// # Safety
    /// `lease` must be null, or point to a lease that stays valid as long as the reference lives.
    unsafe fn held<'a>(lease: *const Self) -> Option<&'a Held<'static, Driver>> {
        // SAFETY: `lease` is null or points to a lease, as the caller promises.
        let lease = unsafe { lease.as_ref() }.filter(|lease| lease.is_held())?;
        // SAFETY: The words are not zero, so `mmun_regcache_get` has written a `Held` to them.
        Some(unsafe { &*lease.held.as_ptr().cast() })
    }
}

fn open(mmun: Arc<Mmun>, functions: &Functions, options: Options) -> Result<Regcache, c_int> {
    let (Some(register_region), Some(deregister_region)) =
        (functions.register_region, functions.deregister_region)
    else {
        return Err(fail(
            -libc::EINVAL,
            c"mmun_regcache_open: a function of the registrar is null",
        ));
    };
    if functions.flags & !IN_CALLBACKS != 0 {
        return Err(fail(
            -libc::EINVAL,
            c"mmun_regcache_open: the registrar has an unknown flag",
        ));
    }
    mmun.may_wait()?;
    let in_callbacks = functions.flags & IN_CALLBACKS != 0;
    let driver = Driver {
        context: functions.context,
        register_region,
        deregister_region,
        in_callbacks,
    };
    let device = Device::new(driver, options.options(&mmun)?);
    let cache = device.open(mmun.mm).map_err(|error| of_cache(&error))?;
    mmun.caches.fetch_add(1, Ordering::Relaxed);
    Ok(Regcache {
        cache,
        device,
        mmun,
    })
}

struct Silent;

impl Notifier for Silent {}

impl Regcache {
    /// Deregisters all regions. Fails if a region is leased. Then the cache can still be used.
    fn empty(&self) -> Result<(), c_int> {
        self.mmun.may_wait()?;
        // The caller calls `synchronize`, which waits for the callbacks of every address space.
        if mmu_notifier::raw::is_inside() {
            return Err(fail(-libc::EDEADLK, IN_CALLBACK));
        }
        self.cache.flush();
        if self.cache.stats().regions != 0 {
            // A callback may still be deregistering regions that it has removed from the look-up.
            // Registering a notifier waits for that callback.
            drop(Registration::new(self.mmun.mm, Silent));
            self.cache.flush();
        }
        if self.cache.stats().regions == 0 {
            return Ok(());
        }
        Err(fail(
            -libc::EBUSY,
            c"mmun_regcache_close: a lease has not been put",
        ))
    }
}

export! {
    /// Opens a cache.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_regcache_open(
        mmun: *const Mmun,
        registrar: *const Functions,
        options: *const Options,
        cache: *mut *mut Regcache,
    ) -> c_int {
        let _whole = Uncancelled::enter();
        code((|| {
            // SAFETY: `registrar` is null or begins with its size (crate docs, Pointers).
            let functions = unsafe { args::read(registrar) };
            let options = if options.is_null() {
                Ok(Options { size: 0, merge: 0, max_regions: 0, max_bytes: 0, max_region_bytes: 0 })
            } else {
                // SAFETY: `options` begins with its size (crate docs, Pointers).
                unsafe { args::read(options) }
            };
            // SAFETY: `cache` is null or a variable of the caller (crate docs, Pointers).
            let place = unsafe { args::result(cache) }?;
            let (functions, options) = (functions?, options?);
            // SAFETY: `mmun` is null or open (crate docs, Handles).
            let mmun = unsafe { share(mmun) }?;
            *place = Box::into_raw(Box::new(open(mmun, &functions, options)?));
            Ok(())
        })())
    }

    /// Closes a cache.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_regcache_close(cache: *mut Regcache) -> c_int {
        let _whole = Uncancelled::enter();
        // SAFETY: `cache` is null or open (crate docs, Handles).
        let Some(open) = (unsafe { cache.as_ref() }) else { return 0 };
        let is_inherited = open.mmun.mm.is_inherited();
        if !is_inherited {
            if let Err(code) = open.empty() {
                return code;
            }
        }
        // SAFETY: `from_raw` needs the unique pointer of a leaked box. `mmun_regcache_open` leaked
        // the box, and no other thread uses a handle that is being closed (crate docs, Handles).
        let Regcache { cache, device, mmun } = *unsafe { Box::from_raw(cache) };
        drop(cache);
        if !is_inherited && device.synchronize().is_err() {
            die("mmun_regcache_close", "the registrar has left an invalidation open on this thread");
        }
        mmun.caches.fetch_sub(1, Ordering::Relaxed);
        0
    }

    /// Leases a region.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_regcache_get(cache: *const Regcache, address: *mut c_void, length: usize, lease: *mut Lease) -> c_int {
        if !lease.is_aligned() {
            return fail(-libc::EINVAL, INVALID);
        }
        // SAFETY: `lease` is null or points to memory for a lease (crate docs, Pointers).
        let Some(place) = (unsafe { lease.as_mut() }) else { return fail(-libc::EINVAL, INVALID) };
        // SAFETY: `cache` is null or open (crate docs, Handles).
        let Some(open) = (unsafe { cache.as_ref() }) else {
            *place = Lease::NONE;
            return fail(-libc::EINVAL, INVALID);
        };
        let range = match VaRange::covering(Va::from_ptr(address), length as u64) {
            Ok(range) if range.last() != Va::new(u64::MAX) => range,
            _ => {
                *place = Lease::NONE;
                return fail(-libc::EINVAL, INVALID);
            }
        };
        match open.cache.get(range) {
            Ok(held) => {
                place.handle = held.handle().value;
                // SAFETY: The field `held` is large enough and aligned (asserted above). The cache
                // outlives the lease, because closing the cache fails while a region is leased.
                unsafe { place.held.as_mut_ptr().cast::<Held<'_, Driver>>().write(held) };
                0
            }
            Err(error) => {
                *place = Lease::NONE;
                of_cache(&error)
            }
        }
    }

    /// Ends a lease.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_regcache_put(lease: *mut Lease) {
        // SAFETY: `lease` is null or points to a lease (crate docs, Pointers).
        let Some(place) = (unsafe { lease.as_mut() }).filter(|lease| lease.is_held()) else {
            die("mmun_regcache_put", "the lease is null, or has been put already");
        };
        // SAFETY: `is_held` has just returned true, so `held` holds a lease. The next line clears
        // the field, so the lease is moved out only once.
        let held = unsafe { place.held.as_ptr().cast::<Held<'static, Driver>>().read() };
        place.held = Lease::NONE.held;
        drop(held);
    }

    /// Tells whether the registration still matches the memory at its addresses.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_lease_valid(lease: *const Lease) -> bool {
        // SAFETY: `lease` is null or points to a lease, which the caller does not put during the
        // call (crate docs, Objects).
        unsafe { Lease::held(lease) }.is_some_and(Held::is_current)
    }

    /// Returns the registered range.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_lease_range(lease: *const Lease, address: *mut *mut c_void, bytes: *mut usize) -> c_int {
        // SAFETY: `lease` is null or points to a lease, which the caller does not put during the
        // call (crate docs, Objects).
        let Some(held) = (unsafe { Lease::held(lease) }) else { return fail(-libc::EINVAL, INVALID) };
        // SAFETY: `address` is null or a variable of the caller (crate docs, Pointers).
        let Some(address) = (unsafe { address.as_mut() }) else { return fail(-libc::EINVAL, INVALID) };
        // SAFETY: `bytes` is null or a variable of the caller (crate docs, Pointers).
        let Some(bytes) = (unsafe { bytes.as_mut() }) else { return fail(-libc::EINVAL, INVALID) };
        (*address, *bytes) = (start(held.range()), length(held.range()));
        0
    }

    /// Flushes the cache.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_regcache_flush(cache: *const Regcache) -> u64 {
        // SAFETY: `cache` is null or open (crate docs, Handles).
        unsafe { cache.as_ref() }.map_or(0, |open| open.cache.flush())
    }

    /// Deregisters the regions that callbacks have removed from the look-up.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_regcache_reap(cache: *const Regcache) {
        // SAFETY: `cache` is null or open (crate docs, Handles).
        if let Some(open) = unsafe { cache.as_ref() } {
            open.cache.reap();
        }
    }

    /// Writes the statistics of the cache to `stats`.
    ///
    /// # Safety
    /// See mmun/mmun.h.
    fn mmun_regcache_stats(cache: *const Regcache, stats: *mut Stats) -> c_int {
        // SAFETY: `cache` is null or open (crate docs, Handles).
        let Some(open) = (unsafe { cache.as_ref() }) else { return fail(-libc::EINVAL, INVALID) };
        let values = open.cache.stats().metrics().map(|(_, value)| value);
        // SAFETY: `stats` is null or begins with its size, and is writable (crate docs, Pointers).
        code(unsafe { args::write(stats, &Stats { size: 0, values }) })
    }
}

#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<Functions>() == Functions::FIRST && size_of::<Options>() == Options::FIRST);
    assert!(size_of::<Stats>() == Stats::FIRST);
};

crate::layout::layout! {
    "mmun_registrar" = Functions { size, context, register_region, deregister_region, flags }
    "mmun_regcache_options" = Options { size, merge, max_regions, max_bytes, max_region_bytes }
    "mmun_lease" = Lease { handle, held as "mmun_private" }
    "mmun_regcache_stats" = Stats { size }
}
/// The layout of the statistics, which `Stats` holds as an array.
#[cfg(test)]
pub(crate) fn layout_of_stats() -> Vec<String> {
    let names = ::regcache::Stats::default()
        .metrics()
        .map(|(name, _)| name.trim_end_matches("_total"));
    let at = std::mem::offset_of!(Stats, values);
    names
        .iter()
        .zip(0..)
        .map(|(name, number)| format!("mmun_regcache_stats.{name} {}", at + 8 * number))
        .collect()
}
