//! The functions of `libucs` that this library defines.

#![allow(unsafe_code, reason = "calls UCX; see the crate's Safety section")]

use super::{IS_INLINED, UNSUPPORTED, ask, caches, fork, locks, note_version, report, settle};
use crate::found::{self, UCS};
use crate::say::complain;
use crate::{counts, late, space};
use std::ffi::{CStr, c_char, c_void};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

const OK: i8 = 0;

/// Finds the real functions for page tables before a cache's first look-up needs them. That look-up
/// may hold a lock of UCX, and the loader must not be called with such a lock held.
pub(super) fn prepare() {
    let _ = PGTABLE_LOOKUP.look_up();
    let _ = PGTABLE_INSERT.look_up();
}

/// Waits until the kernel source has reported all changes, then calls the real `ucs_rcache_get`.
///
/// The real function takes words as arguments, six up to UCX 1.13 and seven later. This function
/// always passes seven. If the caller has passed six, the real function ignores the seventh. On
/// x86-64 the seventh is a word of the caller's stack frame, which is readable; on aarch64 it is a
/// register.
///
/// # Safety
/// As for `ucs_rcache_get`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ucs_rcache_get(
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
    g: usize,
) -> i8 {
    // Fast path: no change is left to be reported. On x86-64 the compiler makes the call of the
    // real function a jump, because the arguments are the same.
    // ORDER(dropin-looked): Acquire, as in `ask`.
    if space::settled().is_some()
        && counts::LOOKED_UP.load(Ordering::Acquire)
        && !late::is_waiting()
        && !HAS_COPIES.load(Ordering::Relaxed)
    {
        if let Some(real) = RCACHE_GET.known() {
            // SAFETY: as in `ask_first`.
            let real = unsafe { std::mem::transmute::<NonNull<c_void>, RcacheGet>(real) };
            // SAFETY: the arguments are valid for `ucs_rcache_get`, because the caller promises so
            // (see # Safety).
            return found::returned(unsafe { real(a, b, c, d, e, f, g) });
        }
    }
    // SAFETY: the arguments are valid for `ucs_rcache_get`, because the caller promises so (see #
    // Safety).
    unsafe { ask_first(a, b, c, d, e, f, g) }
}

type RcacheGet = unsafe extern "C" fn(usize, usize, usize, usize, usize, usize, usize) -> i8;

/// A real function of `libucs`, looked up at its first use.
struct Real {
    name: &'static CStr,
    /// Null before the first use. Relaxed: the address is of code that stays loaded, and a thread
    /// that reads null looks the function up.
    address: AtomicPtr<c_void>,
}

impl Real {
    const fn new(name: &'static CStr) -> Real {
        Real {
            name,
            address: AtomicPtr::new(ptr::null_mut()),
        }
    }

    #[inline]
    fn known(&self) -> Option<NonNull<c_void>> {
        NonNull::new(self.address.load(Ordering::Relaxed))
    }

    /// Looks the function up, if that was not done before.
    fn look_up(&self) -> Option<NonNull<c_void>> {
        let found = self.known().or_else(|| found::function(UCS, self.name))?;
        self.address.store(found.as_ptr(), Ordering::Relaxed);
        Some(found)
    }

    #[cold]
    fn found(&self) -> Option<NonNull<c_void>> {
        let found = self.look_up();
        if found.is_none() {
            complain(&format!(
                "{}: no libucs is loaded",
                self.name.to_string_lossy()
            ));
        }
        found
    }
}

static RCACHE_GET: Real = Real::new(c"ucs_rcache_get");
static PGTABLE_LOOKUP: Real = Real::new(c"ucs_pgtable_lookup");
static PGTABLE_INSERT: Real = Real::new(c"ucs_pgtable_insert");

/// # Safety
/// As for `ucs_rcache_get`.
#[cold]
#[inline(never)]
unsafe extern "C" fn ask_first(
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
    g: usize,
) -> i8 {
    let entry = caches::entry(a);
    let own = entry.and_then(|entry| NonNull::new(entry.real().get.load(Ordering::Relaxed)));
    let Some(real) = own.or_else(|| RCACHE_GET.found()) else {
        return UNSUPPORTED;
    };
    if RCACHE_GET.known().is_none() {
        RCACHE_GET.address.store(real.as_ptr(), Ordering::Relaxed);
    }
    if entry.is_some_and(caches::Entry::has_locks) {
        fork::wait();
    }
    // In UCX 1.14 or later, the creation of a cache without an entry did not call this library, so
    // the cache's other look-ups do not call this library either. This call must not count as a
    // look-up: otherwise the report would claim that look-ups are checked. A look-up of imported
    // memory does not count either, because it is not checked.
    if entry.is_some_and(|entry| !entry.is_imported()) || !IS_INLINED.load(Ordering::Relaxed) {
        ask();
    } else if let Some(space) = space::current() {
        settle(space);
    }
    // SAFETY: the real function takes its arguments as words, in the same registers and stack
    // slots.
    let real = unsafe { std::mem::transmute::<NonNull<c_void>, RcacheGet>(real) };
    // SAFETY: the arguments are valid for `ucs_rcache_get`, because the caller promises so (see #
    // Safety).
    found::returned(unsafe { real(a, b, c, d, e, f, g) })
}

/// Creates a cache with the real function, and notes the cache.
///
/// # Safety
/// As for `ucs_rcache_create`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ucs_rcache_create(
    params: *const c_void,
    name: *const c_char,
    parent: *mut c_void,
    cache: *mut *mut c_void,
) -> i8 {
    type Create =
        unsafe extern "C" fn(*const c_void, *const c_char, *mut c_void, *mut *mut c_void) -> i8;
    let Some(real) = found::for_caller(UCS, c"ucs_rcache_create") else {
        complain("ucs_rcache_create: no libucs is loaded");
        return UNSUPPORTED;
    };
    let version = note_version();
    // SAFETY: this is the function's type from UCX 1.12 to 1.22.
    let real = unsafe { std::mem::transmute::<NonNull<c_void>, Create>(real) };
    // SAFETY: the arguments are valid for `ucs_rcache_create`, because the caller promises so (see
    // # Safety).
    let status = unsafe { real(params, name, parent, cache) };
    if status == OK {
        let pointer = cache.expose_provenance();
        // SAFETY: the caller has passed room for the cache, which the real function has written.
        let cache = unsafe { *cache };
        let function = |name| {
            found::for_caller(UCS, name)
                .map_or_else(AtomicPtr::default, |found| AtomicPtr::new(found.as_ptr()))
        };
        let real = caches::Functions {
            get: function(c"ucs_rcache_get"),
            destroy: function(c"ucs_rcache_destroy"),
        };
        // Set the flag before the cache is added, because the cache's look-ups must not call the
        // function of another `libucs`.
        if found::has_copies(UCS) {
            HAS_COPIES.store(true, Ordering::Relaxed);
        }
        // SAFETY: `name` is a string that is alive during this call: the real function, which has
        // the same contract, needs such a string.
        let name = unsafe { CStr::from_ptr(name) };
        let has_context = name == OF_CONTEXT && version.is_some_and(|version| version >= (1, 14));
        let kind = caches::Kind {
            has_locks: version.is_some_and(locks::are_known),
            is_imported: name.to_bytes().starts_with(IMPORTED),
            pointer: if has_context { pointer } else { 0 },
        };
        caches::add(cache.addr(), real, kind);
    }
    status
}

/// How the names of UCP's caches of imported memory begin. Memory of another process is registered
/// there, so changes of this process's memory do not concern them ([`caches`]).
const IMPORTED: &[u8] = b"ucp_import_rcache";
/// The name of the one cache that a UCP context points to.
const OF_CONTEXT: &CStr = c"ucp_rcache";

/// Destroys a cache with the real function.
///
/// # Safety
/// As for `ucs_rcache_destroy`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ucs_rcache_destroy(cache: *mut c_void) {
    let own = caches::entry(cache.addr())
        .and_then(|entry| NonNull::new(entry.real().destroy.load(Ordering::Relaxed)));
    let Some(real) = own.or_else(|| found::for_caller(UCS, c"ucs_rcache_destroy")) else {
        complain("ucs_rcache_destroy: no libucs is loaded");
        return;
    };
    if caches::entry(cache.addr()).is_some_and(|entry| !entry.is_imported()) {
        // A thread that forks holds the locks of the cache or of its context.
        fork::enter_after_fork();
        caches::remove(cache.addr());
        fork::leave();
    } else {
        // UCP destroys a cache of imported memory with the context's lock held, for which a thread
        // that forks waits. The thread that forks does not use this cache.
        caches::remove(cache.addr());
    }
    // SAFETY: this is the function's type from UCX 1.12 to 1.22.
    let real =
        unsafe { std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn(*mut c_void)>(real) };
    // SAFETY: `cache` is valid for `ucs_rcache_destroy`, because the caller promises so (see #
    // Safety).
    unsafe { real(cache) };
    found::returned(());
}

/// Whether several `libucs` are loaded. Then each look-up calls the `ucs_rcache_get` of the cache's
/// own `libucs`. `ucs_pgtable_lookup` and `ucs_pgtable_insert` do the same in all versions, so any
/// copy of them will do.
static HAS_COPIES: AtomicBool = AtomicBool::new(false);

type Lookup = unsafe extern "C" fn(*const c_void, usize) -> *mut c_void;

/// Searches a page table. If the table is of a noted cache, first waits until the kernel source has
/// reported all changes. Then, if the cache has not seen all reports, returns null, which makes the
/// look-up take the slow path ([`caches`]). Otherwise, and for all other page tables, calls the
/// real function.
///
/// # Safety
/// As for `ucs_pgtable_lookup`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ucs_pgtable_lookup(
    table: *const c_void,
    address: usize,
) -> *mut c_void {
    // Fast path: no change is left to be reported, and the cache has seen the reports. A change
    // that was put off counts as a report before UCX learns of it.
    // ORDER(dropin-looked): Acquire, as in `ask`.
    if space::settled().is_some()
        && counts::LOOKED_UP.load(Ordering::Acquire)
        && !late::is_waiting()
        && caches::with_table(table.addr()).is_some_and(caches::Entry::has_seen_all)
    {
        if let Some(real) = PGTABLE_LOOKUP.known() {
            // SAFETY: this is the function's type from UCX 1.12 to 1.22.
            let real = unsafe { std::mem::transmute::<NonNull<c_void>, Lookup>(real) };
            // SAFETY: the arguments are valid for `ucs_pgtable_lookup`, because the caller promises
            // so (see # Safety).
            return found::returned(unsafe { real(table, address) });
        }
    }
    // SAFETY: the arguments are valid for `ucs_pgtable_lookup`, because the caller promises so (see
    // # Safety).
    unsafe { look_up_slowly(table, address) }
}

/// # Safety
/// As for `ucs_pgtable_lookup`.
#[cold]
#[inline(never)]
unsafe extern "C" fn look_up_slowly(table: *const c_void, address: usize) -> *mut c_void {
    let Some(real) = PGTABLE_LOOKUP.found() else {
        return ptr::null_mut();
    };
    if let Some(cache) = caches::with_table(table.addr()) {
        // UCX 1.12 and 1.13 call this function inside of `ucs_rcache_get`, which has asked. Here
        // the look-up holds a lock, for which a thread that forks may wait.
        let has_asked = cache.has_locks();
        if !has_asked {
            cache.find_lock();
            ask();
        }
        if !cache.sees_all() && !has_asked {
            return ptr::null_mut();
        }
    }
    // SAFETY: this is the function's type from UCX 1.12 to 1.22.
    let real = unsafe { std::mem::transmute::<NonNull<c_void>, Lookup>(real) };
    // SAFETY: the arguments are valid for `ucs_pgtable_lookup`, because the caller promises so (see
    // # Safety).
    found::returned(unsafe { real(table, address) })
}

/// What a page table holds: the first words of a registration.
#[repr(C)]
pub(crate) struct Region {
    start: usize,
    end: usize,
}

/// Inserts a region into a page table with the real function. A noted cache does so at each miss,
/// and then registers the region's memory. So this function waits until the changes under way are
/// over ([`caches`]).
///
/// # Safety
/// As for `ucs_pgtable_insert`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ucs_pgtable_insert(
    table: *mut c_void,
    region: *const Region,
) -> i8 {
    type Insert = unsafe extern "C" fn(*mut c_void, *const Region) -> i8;
    let Some(real) = PGTABLE_INSERT.known().or_else(|| PGTABLE_INSERT.found()) else {
        return UNSUPPORTED;
    };
    // SAFETY: this is the function's type from UCX 1.12 to 1.22.
    let real = unsafe { std::mem::transmute::<NonNull<c_void>, Insert>(real) };
    // SAFETY: the arguments are valid for `ucs_pgtable_insert`, because the caller promises so (see
    // # Safety).
    let status = unsafe { real(table, region) };
    let cache = caches::with_table(table.addr());
    if let Some(cache) = cache.filter(|_| status == OK) {
        cache.note_table(table.expose_provenance());
        let _whole = srcu::Uncancelled::enter();
        let is_over = |space: &space::Space| {
            // While a thread forks, does not wait with UCX's locks held.
            fork::enter() && {
                let is_over = space.wait_for_changes();
                fork::leave();
                is_over
            }
        };
        if space::current().is_some_and(|space| space.kernel().is_ok() && !is_over(space)) {
            // SAFETY: the region is alive during this call, because the real function, which has
            // the same contract, needs that.
            let Region { start, end } = unsafe { region.read() };
            // The cache's lock is held, so UCX queues the range, and drops the region at the next
            // look-up. While a thread forks, the next look-up makes the report.
            report(start, end - start);
        }
    }
    status
}
