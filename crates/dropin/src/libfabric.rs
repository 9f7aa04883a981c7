//! libfabric: our memory monitor, imported before a provider opens a domain.
//!
//! libfabric chooses the default monitor when a program opens a domain, and a monitor can be
//! imported once `fi_getinfo` has initialised libfabric. So our `fi_getinfo` imports the monitor
//! after the real call. If a program has found the real `fi_getinfo` by another way, our
//! `fi_fabric` imports the monitor before the real call.

#![allow(
    unsafe_code,
    reason = "calls libfabric; see the crate's Safety section"
)]

pub(crate) mod abi;
mod monitor;

use crate::first::First;
use crate::found::{self, FABRIC};
use crate::say::complain;
use crate::{place, space, strict};
use abi::{FabricAttr, FiOpen, Fid, Ops, VERSION};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

/// The result of the import, once it was tried.
static IMPORTED: First<Result<(), String>> = First::new();

/// The id of the `Mm` of the process in which a thread imports right now; 0 if there is none. In
/// the child of a fork the id can be the parent's; the child does not have that thread.
static IMPORTING: AtomicU64 = AtomicU64::new(0);

/// `fi_open` of the libfabric with the monitor. Relaxed: the address of code that stays loaded.
static OPEN: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// Whether the program uses a second libfabric, which has no monitor of ours.
static HAS_SECOND: AtomicBool = AtomicBool::new(false);

/// The result of the import, for the report. `None` if the program did not use libfabric.
pub(crate) fn imported() -> Option<Result<(), &'static str>> {
    let result = IMPORTED.get()?;
    Some(match result {
        Ok(()) if HAS_SECOND.load(Ordering::Relaxed) => Err(
            "the program uses two copies of libfabric; the cache of the second one is not protected",
        ),
        Ok(()) => Ok(()),
        Err(reason) => Err(reason),
    })
}

/// Imports the monitor, unless that was tried before.
fn import() {
    if strict::is_off() {
        return;
    }
    let _whole = srcu::Uncancelled::enter();
    place::begin();
    import_once();
    strict::require(imported().unwrap_or(Ok(())));
}

/// The user's choice of a monitor, if libfabric would obey it: the value of `FI_MR_CACHE_MONITOR`.
fn wanted() -> Option<String> {
    std::env::var("FI_MR_CACHE_MONITOR").ok()
}

/// Whether the user has turned the caches off. The monitor is imported nevertheless, because a
/// program that imports one of its own, as Open MPI does, would turn them on. Our monitor does not
/// start.
pub(crate) fn is_disabled() -> bool {
    wanted().as_deref() == Some("disabled")
}

/// The reason to leave libfabric's own monitor in use: the user has chosen one that sees changes
/// which the `hook` source does not see, and the `kernel` source does not work.
fn better_monitor() -> Option<String> {
    let name =
        wanted().filter(|name| matches!(name.as_str(), "kdreg2" | "userfaultfd" | "uffd"))?;
    let is_better = !space::current_or_made().is_complete();
    is_better.then(|| {
        format!("FI_MR_CACHE_MONITOR={name} stays in use, because the kernel source does not work")
    })
}

fn import_once() {
    if IMPORTED.get().is_some() {
        note_second();
        return;
    }
    // Look the function up, and start the sources, before this thread claims `IMPORTING`: a thread
    // that waits for `IMPORTING` may hold the loader's lock.
    let open = found::for_caller(FABRIC, c"fi_open");
    let better_monitor = better_monitor();
    let own = mmu_source::current_ref().id();
    loop {
        if IMPORTED.get().is_some() {
            return;
        }
        let before = IMPORTING.load(Ordering::Relaxed);
        // ORDER(dropin-importing): Acquire: the thread that imported before has published
        // `IMPORTED`. Partner: the store below.
        if before != own
            && IMPORTING
                .compare_exchange(before, own, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        {
            break;
        }
        // Another thread is between `fi_open` and the end of `bind`.
        std::thread::yield_now();
    }
    IMPORTED.get_or_make(|| better_monitor.map_or_else(|| try_import(open), Err));
    // ORDER(dropin-importing): Release, after `IMPORTED`. Partner: the exchange above.
    IMPORTING.store(0, Ordering::Release);
}

/// Notes whether the caller uses another libfabric than the one with the monitor.
fn note_second() {
    let (first, open) = (OPEN.load(Ordering::Relaxed), c"fi_open");
    let second = found::has_copies(FABRIC) && !first.is_null();
    if second && found::for_caller(FABRIC, open).is_some_and(|open| open.as_ptr() != first) {
        HAS_SECOND.store(true, Ordering::Relaxed);
    }
}

fn try_import(open: Option<ptr::NonNull<c_void>>) -> Result<(), String> {
    let open = open.ok_or("it is older than 1.13 (no fi_open)")?;
    OPEN.store(open.as_ptr(), Ordering::Relaxed);
    // SAFETY: this is the type of `fi_open` in fi_open(3), since 1.5 of its ABI.
    let open = unsafe { std::mem::transmute::<ptr::NonNull<c_void>, FiOpen>(open) };
    let mut cache: *mut Fid = ptr::null_mut();
    // SAFETY: `open` gets a live name, no attribute, and room for the answer.
    let opened = unsafe {
        open(
            VERSION,
            c"mr_cache".as_ptr(),
            ptr::null_mut(),
            0,
            0,
            &raw mut cache,
            ptr::null_mut(),
        )
    };
    if opened != 0 || cache.is_null() {
        return Err(format!(
            "fi_open of \"mr_cache\" answered {}: older than 1.13",
            name(opened)
        ));
    }
    // SAFETY: libfabric has just made the object, and its first three words are a `fid`.
    let ops = unsafe { (*cache).ops }.cast::<Ops>();
    // SAFETY: the table of operations lives as long as the object, and begins with these three
    // words.
    let Ops { close, bind, .. } = unsafe { ops.read() };
    // SAFETY: the monitor is a static, and its layout is that of its class.
    let bound = unsafe { bind(cache, monitor::monitor().cast(), 0) };
    // SAFETY: `cache` is open, and closed once.
    unsafe { close(cache) };
    match -bound {
        0 => Ok(()),
        // A thread of the parent had imported the monitor when the parent forked, and had not
        // published that yet.
        libc::EBUSY if monitor::is_imported() => Ok(()),
        libc::EBUSY => {
            Err("another monitor was imported first (EBUSY), as Open MPI does; the caches use that monitor".to_owned())
        }
        _ => Err(format!("importing the monitor answered {}", name(bound))),
    }
}

fn name(error: c_int) -> String {
    std::io::Error::from_raw_os_error(-error).to_string()
}

/// Imports the monitor, for a program that looks libfabric's functions up by `dlsym`. The program
/// calls this after its first `fi_getinfo` and before `fi_domain`. Returns 0 or a negative error
/// code.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn mmun_dropin_attach() -> c_int {
    import();
    match imported() {
        Some(Ok(())) => 0,
        _ => -libc::ENODATA,
    }
}

/// The real `fi_getinfo`, then the import.
///
/// # Safety
/// As for `fi_getinfo`, which gets all arguments.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fi_getinfo(
    version: u32,
    node: *const c_char,
    service: *const c_char,
    flags: u64,
    hints: *const c_void,
    info: *mut *mut c_void,
) -> c_int {
    type Real = unsafe extern "C" fn(
        u32,
        *const c_char,
        *const c_char,
        u64,
        *const c_void,
        *mut *mut c_void,
    ) -> c_int;
    let Some(real) = real(c"fi_getinfo") else {
        return -libc::ENOSYS;
    };
    // SAFETY: this is the type of `fi_getinfo` in fi_getinfo(3).
    let real = unsafe { std::mem::transmute::<ptr::NonNull<c_void>, Real>(real) };
    // SAFETY: the arguments are valid for `fi_getinfo`, because the caller promises so (see #
    // Safety).
    let result = unsafe { real(version, node, service, flags, hints, info) };
    import();
    result
}

/// The import, then the real `fi_fabric`.
///
/// # Safety
/// As for `fi_fabric`, which gets all arguments.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fi_fabric(
    attr: *mut c_void,
    fabric: *mut *mut c_void,
    context: *mut c_void,
) -> c_int {
    type Real = unsafe extern "C" fn(*mut c_void, *mut *mut c_void, *mut c_void) -> c_int;
    let Some(real) = real(c"fi_fabric") else {
        return -libc::ENOSYS;
    };
    import();
    // The program is about to open a domain. The sources start here, because libfabric calls
    // `start` with a lock held: another thread may wait for that lock with the loader's lock held,
    // in a library's constructor, and the start needs the loader.
    if matches!(imported(), Some(Ok(()))) && !is_disabled() {
        let _whole = srcu::Uncancelled::enter();
        space::current_or_made();
    }
    note_provider(attr.cast());
    // SAFETY: this is the type of `fi_fabric` in fi_fabric(3).
    let real = unsafe { std::mem::transmute::<ptr::NonNull<c_void>, Real>(real) };
    // SAFETY: the arguments are valid for `fi_fabric`, because the caller promises so (see #
    // Safety).
    found::returned(unsafe { real(attr, fabric, context) })
}

/// Whether the program has opened the provider OPX of a libfabric before 2.6. From 1.20 to 2.5 that
/// provider finds its registrations without asking the monitor whether they are valid. Versions
/// before 1.20 are treated like these.
static HAS_OPX: AtomicBool = AtomicBool::new(false);

/// Why a hit may find a registration that a change has made stale. `None` if each hit is checked.
pub(crate) fn late_changes() -> Option<&'static str> {
    HAS_OPX.load(Ordering::Relaxed).then_some(
        "the provider opx of libfabric before 2.6 does not check its registrations: it receives each change some milliseconds late",
    )
}

/// Notes a provider that does not ask the monitor.
fn note_provider(attr: *const FabricAttr) {
    // SAFETY: `attr` is null or points to live attributes, as `fi_fabric` requires of its caller.
    let Some(attr) = (unsafe { attr.as_ref() }) else {
        return;
    };
    if attr.provider.is_null() {
        return;
    }
    // SAFETY: the name of a provider is not null (see above), and is a string that lives as long as
    // the attributes.
    let provider = unsafe { CStr::from_ptr(attr.provider) };
    if provider.to_bytes() != b"opx" {
        return;
    }
    let Some(version) = found::for_caller(FABRIC, c"fi_version") else {
        return;
    };
    // SAFETY: this is the type of `fi_version` in fi_version(3).
    let version =
        unsafe { std::mem::transmute::<ptr::NonNull<c_void>, extern "C" fn() -> u32>(version) }();
    if version < (2 << 16 | 6) && imported() == Some(Ok(())) {
        HAS_OPX.store(true, Ordering::Relaxed);
        strict::require(late_changes().map_or(Ok(()), Err));
    }
}

fn real(symbol: &CStr) -> Option<ptr::NonNull<c_void>> {
    let real = found::for_caller(FABRIC, symbol);
    if real.is_none() {
        complain(&format!(
            "{}: no libfabric is loaded",
            symbol.to_string_lossy()
        ));
    }
    real
}

/// Tells whether libfabric has started the monitor, in this process or before the fork that made
/// it. False if this process has no space of its own yet.
pub(crate) fn is_started() -> bool {
    crate::counts::STARTS.get() != 0 && space::current().is_some()
}
