//! `struct mmu_notifier`: get, put, register, unregister.

use crate::border::{die, export, guarded, warn_once};
use crate::mm::{self, MmStruct};
use crate::range::{self, Range};
use libc::{c_int, c_ulong};
use mmu_notifier::raw::{Embedded, Node, Notifiers, Sealed, SurplusPut, would_deadlock};
use mmu_notifier::{
    InvalidateRange, Mm, MmWithUser, Notifier, Overflow, SecondaryTlb, Va, VaRange, WouldBlock,
    WouldDeadlock,
};
use std::mem::{self, MaybeUninit};
use std::ptr::{self, NonNull};

/// `struct mmu_notifier`.
#[repr(C)]
#[derive(Debug)]
pub struct MmuNotifier {
    ops: *const Ops,
    mm: *mut MmStruct,
    node: MaybeUninit<[usize; NODE_WORDS]>,
}

const NODE_WORDS: usize = 14;
const _: () = assert!(size_of::<Node<Driver>>() <= NODE_WORDS * size_of::<usize>());
const _: () = assert!(align_of::<Node<Driver>>() <= align_of::<usize>());

/// `struct mmu_notifier_ops`. The callbacks are `C-unwind`, because a C++ exception may leave one.
/// Then `guarded` ends the process.
#[repr(C)]
#[derive(Debug)]
pub struct Ops {
    release: Option<unsafe extern "C-unwind" fn(*mut MmuNotifier, *mut MmStruct)>,
    clear_flush_young: Option<Young>,
    clear_young: Option<Young>,
    test_young: Option<TestYoung>,
    invalidate_range_start: Option<Start>,
    invalidate_range_end: Option<unsafe extern "C-unwind" fn(*mut MmuNotifier, *const Range)>,
    arch_invalidate_secondary_tlbs:
        Option<unsafe extern "C-unwind" fn(*mut MmuNotifier, *mut MmStruct, c_ulong, c_ulong)>,
    alloc_notifier: Option<unsafe extern "C-unwind" fn(*mut MmStruct) -> *mut MmuNotifier>,
    free_notifier: Option<unsafe extern "C-unwind" fn(*mut MmuNotifier)>,
}

type Start = unsafe extern "C-unwind" fn(*mut MmuNotifier, *const Range) -> c_int;
type Young =
    unsafe extern "C-unwind" fn(*mut MmuNotifier, *mut MmStruct, c_ulong, c_ulong) -> c_int;
type TestYoung = unsafe extern "C-unwind" fn(*mut MmuNotifier, *mut MmStruct, c_ulong) -> c_int;

/// The core's subscriber for a driver's notifier. It forwards each callback to `ops`.
///
/// # Invariants
/// `me` is the notifier whose node holds this value. `ops` is its table, which lives until the
/// notifier is freed.
struct Driver {
    me: NonNull<MmuNotifier>,
    ops: NonNull<Ops>,
}

// SAFETY: The callbacks may run on any thread, in parallel (crate docs, Callbacks).
unsafe impl Send for Driver {}
// SAFETY: As for `Send`.
unsafe impl Sync for Driver {}

static DRIVERS: Notifiers<Driver> = Notifiers::new();

impl Driver {
    #[inline(always)]
    fn ops(&self) -> &Ops {
        // SAFETY: A reference needs a live table. By the invariant the table lives until the
        // notifier is freed, and `self` is a part of the notifier.
        unsafe { self.ops.as_ref() }
    }

    #[inline(always)]
    fn start(&self, range: &InvalidateRange<'_>) -> c_int {
        // SAFETY: The function follows its prototype (crate docs, Callbacks). It gets the driver's
        // own notifier, which is live, because the core calls only registered notifiers.
        let call = |start: Start, told| unsafe { start(self.me.as_ptr(), told) };
        self.ops().invalidate_range_start.map_or(0, |start| {
            guarded!(
                "mmu_notifier_ops.invalidate_range_start",
                range::tell(range, |told| call(start, told))
            )
        })
    }
}

impl Notifier for Driver {
    fn release(&self, mm: &Mm) {
        if let Some(release) = self.ops().release {
            // SAFETY: The function follows its prototype (crate docs, Callbacks), and `me` is live,
            // because the core calls only registered notifiers.
            guarded!("mmu_notifier_ops.release", unsafe {
                release(self.me.as_ptr(), mm::bits(mm))
            });
        }
    }

    #[inline]
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        if self.start(range) != 0 {
            warn_once!(
                "invalidate_range_start returned an error for a blockable range: it was ignored"
            );
        }
    }

    fn try_invalidate_range_start(&self, range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        let result = self.start(range);
        if result != 0 && result != -libc::EAGAIN {
            warn_once!(
                "invalidate_range_start returned an error other than -EAGAIN: treated as -EAGAIN"
            );
        }
        if result == 0 { Ok(()) } else { Err(WouldBlock) }
    }

    #[inline]
    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        if let Some(end) = self.ops().invalidate_range_end {
            // SAFETY: The function follows its prototype (crate docs, Callbacks), and `me` is live,
            // because the core calls only registered notifiers.
            let call = |told| unsafe { end(self.me.as_ptr(), told) };
            guarded!(
                "mmu_notifier_ops.invalidate_range_end",
                range::tell(range, call)
            );
        }
    }

    fn clear_flush_young(&self, mm: &Mm, range: VaRange) -> bool {
        let (start, end) = range::bounds(range);
        // SAFETY: The function follows its prototype (crate docs, Callbacks), and `me` is live,
        // because the core calls only registered notifiers.
        let call = |f: Young| unsafe { f(self.me.as_ptr(), mm::bits(mm), start, end) } != 0;
        self.ops()
            .clear_flush_young
            .is_some_and(|f| guarded!("mmu_notifier_ops.clear_flush_young", call(f)))
    }

    fn clear_young(&self, mm: &Mm, range: VaRange) -> bool {
        let (start, end) = range::bounds(range);
        // SAFETY: The function follows its prototype (crate docs, Callbacks), and `me` is live,
        // because the core calls only registered notifiers.
        let call = |f: Young| unsafe { f(self.me.as_ptr(), mm::bits(mm), start, end) } != 0;
        self.ops()
            .clear_young
            .is_some_and(|f| guarded!("mmu_notifier_ops.clear_young", call(f)))
    }

    fn test_young(&self, mm: &Mm, address: Va) -> bool {
        // SAFETY: The function follows its prototype (crate docs, Callbacks), and `me` is live,
        // because the core calls only registered notifiers.
        let call = |f: TestYoung| unsafe { f(self.me.as_ptr(), mm::bits(mm), address.get()) } != 0;
        self.ops()
            .test_young
            .is_some_and(|f| guarded!("mmu_notifier_ops.test_young", call(f)))
    }

    fn secondary_tlb(&self, _: Sealed) -> Option<&dyn SecondaryTlb> {
        self.ops()
            .arch_invalidate_secondary_tlbs
            .is_some()
            .then_some(self)
    }
}

impl SecondaryTlb for Driver {
    fn invalidate_secondary_tlbs(&self, mm: &Mm, range: VaRange) {
        if let Some(flush) = self.ops().arch_invalidate_secondary_tlbs {
            let (start, end) = range::bounds(range);
            // SAFETY: The function follows its prototype (crate docs, Callbacks), and `me` is live,
            // because the core calls only registered notifiers.
            let call = || unsafe { flush(self.me.as_ptr(), mm::bits(mm), start, end) };
            guarded!("mmu_notifier_ops.arch_invalidate_secondary_tlbs", call());
        }
    }
}

// SAFETY: A node must stay at its place until it is disposed of or unregistered. The header demands
// that the driver keeps a notifier until `free_notifier` runs or `mmu_notifier_unregister` returns.
unsafe impl Embedded for Driver {
    unsafe fn dispose(node: NonNull<Node<Self>>) {
        // SAFETY: The core, which is the caller, promises that the node is live and has its value.
        let &Driver { me, ops } = unsafe { node.as_ref() }.value();
        // SAFETY: By the invariant the table lives until the notifier is freed, below.
        if let Some(free) = unsafe { ops.as_ref() }.free_notifier {
            // SAFETY: The function follows its prototype (crate docs, Callbacks). The core calls
            // `dispose` once for each notifier, when no code uses the notifier any more.
            guarded!("mmu_notifier_ops.free_notifier", unsafe {
                free(me.as_ptr())
            });
        }
    }
}

/// Returns the node of a notifier.
///
/// # Safety
/// `notifier` must point to memory for an `MmuNotifier`.
#[inline(always)]
unsafe fn node(notifier: NonNull<MmuNotifier>) -> NonNull<Node<Driver>> {
    // SAFETY: The field must be inside one allocation. `notifier` points to memory for the whole
    // struct, as the caller promises.
    let node = unsafe { &raw mut (*notifier.as_ptr()).node };
    NonNull::new(node.cast()).expect("the address of a field is not null")
}

/// The reason why no notifier was registered or found, as a negative error number.
type Refused = c_int;

const DEADLOCK: Refused = -libc::EDEADLK;

/// Returns the address space if it is alive and belongs to this process.
///
/// # Safety
/// As for [`mm::borrow_user`], except that the bits may be null.
#[inline(always)]
unsafe fn alive<'a>(place: *const *mut MmStruct) -> Result<&'a MmWithUser, Refused> {
    // SAFETY: `place` is readable, because the caller promises that it holds a handle's bits.
    if unsafe { *place }.is_null() {
        return Err(-libc::EINVAL);
    }
    // SAFETY: The caller makes the promise of `borrow_user` for `place`.
    unsafe { mm::borrow_user(place) }
        .filter(|mm| !mm.is_inherited())
        .ok_or(-libc::ESRCH)
}

/// Finds the newest notifier of `ops` and takes a reference to it.
#[inline(always)]
fn find(mm: &MmWithUser, ops: NonNull<Ops>) -> Result<Option<NonNull<MmuNotifier>>, Refused> {
    match DRIVERS.find(mm, |driver| driver.ops == ops) {
        // SAFETY: `find` has just counted a reference to the node, so the node is live.
        Ok(Some(node)) => Ok(Some(unsafe { node.as_ref() }.value().me)),
        Ok(None) => Ok(None),
        Err(Overflow) => Err(-libc::EOVERFLOW),
    }
}

/// Registers `notifier`, whose `ops` is set, under the write lock that this thread holds.
///
/// # Safety
/// `notifier` must point to a notifier that is not registered. Its `ops` must be null or point to a
/// table that lives until the notifier is freed. `mm` must be the bits of a user.
unsafe fn register(
    function: &str,
    notifier: NonNull<MmuNotifier>,
    mm: *mut MmStruct,
) -> Result<(), Refused> {
    // SAFETY: `notifier` points to a notifier, as the caller promises.
    let Some(ops) = NonNull::new(unsafe { (*notifier.as_ptr()).ops }.cast_mut()) else {
        return Err(-libc::EINVAL);
    };
    // SAFETY: `ops` is not null, so it points to a live table, as the caller promises.
    let table = unsafe { ops.as_ref() };
    if table.arch_invalidate_secondary_tlbs.is_some()
        && (table.invalidate_range_start.is_some() || table.invalidate_range_end.is_some())
    {
        warn_once!(
            function,
            ": ops with arch_invalidate_secondary_tlbs must have no start and no end: refused"
        );
        return Err(-libc::EINVAL);
    }
    let Some(guard) = mm::held(mm) else {
        warn_once!(
            function,
            ": this thread does not hold the write lock of the address space: refused"
        );
        return Err(-libc::EINVAL);
    };
    // SAFETY: `held` returns an initialised guard of this thread. No other code of this thread uses
    // the guard before `register` returns, because no callback runs there.
    let guard = unsafe { &mut *guard };
    // SAFETY: `notifier` points to a notifier that is not registered, as the caller promises. So no
    // other code uses its field `mm`.
    let place_of_mm = unsafe { &mut (*notifier.as_ptr()).mm };
    // As in the kernel, `mm` is set before a callback can read it.
    let before = mem::replace(place_of_mm, mm);
    // SAFETY: `notifier` points to memory for a notifier, as the caller promises.
    let place = unsafe { node(notifier) };
    if let Err(WouldDeadlock) =
        // INVARIANT: `me` is the notifier whose node gets this value, and `ops` is its table.
        // SAFETY: The field is large enough and aligned (asserted above). The driver keeps it at
        // its place until the notifier is freed (crate docs, Objects).
        unsafe { DRIVERS.register(place, Driver { me: notifier, ops }, guard) }
    {
        // SAFETY: The registration has failed, so still no other code uses the field `mm`.
        unsafe { (*notifier.as_ptr()).mm = before };
        return Err(DEADLOCK);
    }
    Ok(())
}

/// Finds or makes the notifier of `ops` under the write lock.
///
/// # Safety
/// `mm` must be null or the bits of a user. `ops` must point to a table that lives until every
/// notifier of it is freed.
unsafe fn get_locked(
    function: &str,
    ops: NonNull<Ops>,
    mm: *mut MmStruct,
) -> Result<NonNull<MmuNotifier>, Refused> {
    // SAFETY: The local variable holds null or the bits of a user, as the caller promises.
    let user = unsafe { alive(&raw const mm) }?;
    if let Some(found) = find(user, ops)? {
        return Ok(found);
    }
    if mm::held(mm).is_none() {
        warn_once!(
            function,
            ": this thread does not hold the write lock of the address space: refused"
        );
        return Err(-libc::EINVAL);
    }
    // `register` would return the same error, but only after a needless `alloc_notifier`.
    if would_deadlock(user) {
        return Err(DEADLOCK);
    }
    // SAFETY: `ops` points to a live table, as the caller promises.
    let Some(alloc) = unsafe { ops.as_ref() }.alloc_notifier else {
        return Err(-libc::EINVAL);
    };
    // SAFETY: The function follows its prototype (crate docs, Callbacks). This thread holds the
    // write lock, as the header promises to the function.
    let call = || unsafe { alloc(mm) };
    let made = guarded!("mmu_notifier_ops.alloc_notifier", call());
    let Some(notifier) = NonNull::new(made) else {
        return Err(-libc::ENOMEM);
    };
    if is_error(made) {
        return Err(c_int::try_from(made.addr() as isize).expect("an error number is small"));
    }
    // SAFETY: `made` is neither null nor an error, so it points to a notifier that the driver has
    // just made, and that no other code uses.
    unsafe { (*made).ops = ops.as_ptr() };
    // SAFETY: The new notifier is not registered, its table lives, and the caller has a user.
    unsafe { register(function, notifier, mm) }
        .map(|()| notifier)
        .inspect_err(|_| {
            // SAFETY: `ops` points to a live table, as the caller promises.
            if let Some(free) = unsafe { ops.as_ref() }.free_notifier {
                // SAFETY: The function follows its prototype (crate docs, Callbacks). It gets the
                // notifier that the driver has just made, and that was not registered.
                guarded!("mmu_notifier_ops.free_notifier", unsafe { free(made) });
            }
        })
}

/// Returns the notifier, or the error as an `ERR_PTR`, which a driver detects with `IS_ERR`.
fn pointer(result: Result<NonNull<MmuNotifier>, Refused>) -> *mut MmuNotifier {
    result.map_or_else(
        |error| ptr::without_provenance_mut(error as isize as usize),
        NonNull::as_ptr,
    )
}

/// `IS_ERR`.
fn is_error(pointer: *mut MmuNotifier) -> bool {
    pointer.addr() >= -4095_isize as usize
}

/// Runs `f` under the write lock.
///
/// # Safety
/// `mm` must be the bits of a handle that stays counted until this function returns.
unsafe fn locking<R>(
    mm: *mut MmStruct,
    f: impl FnOnce() -> Result<R, Refused>,
) -> Result<R, Refused> {
    // SAFETY: The caller makes the promise of `lock` for `mm`, and this function unlocks below.
    unsafe { mm::lock(mm) }.map_err(|WouldDeadlock| DEADLOCK)?;
    let result = f();
    mm::unlock(mm);
    result
}

/// The slow path of `mmun_get`: takes the write lock and makes the notifier.
///
/// # Safety
/// As for `get_locked`, and `mm` must not be null.
#[cold]
unsafe fn get_slowly(
    ops: NonNull<Ops>,
    mm: *mut MmStruct,
) -> Result<NonNull<MmuNotifier>, Refused> {
    // SAFETY: The caller makes the promises of `get_locked`.
    let get = || unsafe { get_locked("mmu_notifier_get", ops, mm) };
    // SAFETY: `mm` is the bits of a user, which the caller keeps until this function returns.
    unsafe { locking(mm, get) }
}

fn code(result: Result<(), Refused>) -> c_int {
    result.map_or_else(|error| error, |()| 0)
}

export! {
    /// Returns the notifier of `ops` on `mm`, with one more reference.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_get(ops: *const Ops, mm: *mut MmStruct) -> *mut MmuNotifier {
        pointer((|| {
            let ops = NonNull::new(ops.cast_mut()).ok_or(-libc::EINVAL)?;
            // SAFETY: The local variable holds null or the bits of a user (crate docs, Address
            // spaces).
            let user = unsafe { alive(&raw const mm) }?;
            match find(user, ops)? {
                Some(found) => Ok(found),
                // SAFETY: `mm` is a user, which `alive` has found not null, and `ops` is a table
                // that outlives its notifiers (crate docs, Pointers and Objects).
                None => unsafe { get_slowly(ops, mm) },
            }
        })())
    }

    /// Like `mmun_get`, for a caller that holds the write lock.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_get_locked(ops: *const Ops, mm: *mut MmStruct) -> *mut MmuNotifier {
        // SAFETY: `mm` is null or a user, and `ops` is a table that outlives its notifiers (crate
        // docs, Address spaces and Objects).
        let get = |ops| unsafe { get_locked("mmu_notifier_get_locked", ops, mm) };
        pointer(NonNull::new(ops.cast_mut()).ok_or(-libc::EINVAL).and_then(get))
    }

    /// Drops a reference.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_put(notifier: *mut MmuNotifier) {
        let Some(notifier) = NonNull::new(notifier) else { die("mmu_notifier_put", "the notifier is null") };
        // SAFETY: The notifier is live (crate docs, Objects), so the pointer points to a whole
        // struct.
        let node = unsafe { node(notifier) };
        // SAFETY: The notifier was registered and is not freed (crate docs, Objects).
        if let Err(SurplusPut) = unsafe { Node::put(node) } {
            warn_once!("mmu_notifier_put: the notifier was put more often than it was got");
        }
    }

    /// Registers a notifier.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_register(notifier: *mut MmuNotifier, mm: *mut MmStruct) -> c_int {
        let Some(notifier) = NonNull::new(notifier) else { return -libc::EINVAL };
        // SAFETY: The local variable holds null or the bits of a user (crate docs, Address spaces).
        if let Err(error) = unsafe { alive(&raw const mm) } {
            return error;
        }
        // SAFETY: `mm` is a user, and the notifier is not registered and has a table that outlives
        // it (crate docs, Objects).
        let register = || unsafe { register("mmu_notifier_register", notifier, mm) };
        // SAFETY: `mm` is a user, which the caller keeps until this function returns.
        code(unsafe { locking(mm, register) })
    }

    /// Like `mmun_register`, for a caller that holds the write lock.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_register_locked(notifier: *mut MmuNotifier, mm: *mut MmStruct) -> c_int {
        let Some(notifier) = NonNull::new(notifier) else { return -libc::EINVAL };
        // SAFETY: The local variable holds null or the bits of a user (crate docs, Address spaces).
        if let Err(error) = unsafe { alive(&raw const mm) } {
            return error;
        }
        // SAFETY: `mm` is a user, and the notifier is not registered and has a table that outlives
        // it (crate docs, Objects).
        code(unsafe { register("__mmu_notifier_register", notifier, mm) })
    }

    /// Unregisters a notifier.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_unregister(notifier: *mut MmuNotifier, mm: *mut MmStruct) {
        const NAME: &str = "mmu_notifier_unregister";
        let Some(notifier) = NonNull::new(notifier) else { die(NAME, "the notifier is null") };
        // SAFETY: The notifier is live (crate docs, Objects).
        if unsafe { (*notifier.as_ptr()).mm } != mm || mm.is_null() {
            die(NAME, "the notifier is not registered on this address space");
        }
        // SAFETY: `mm` is the address space of a registered notifier, which holds a handle of it.
        if unsafe { mm::borrow(&raw const mm) }.is_inherited() {
            // The notifier belongs to the parent; no bracket of the child calls it.
            return;
        }
        // SAFETY: The notifier is live (crate docs, Objects), so the pointer points to a whole
        // struct.
        let node = unsafe { node(notifier) };
        // SAFETY: The notifier is registered, and only this thread uses it (crate docs, Objects).
        mm::must_not_wait(NAME, unsafe { Node::unregister(node) });
    }

    /// Waits for the queued frees.
    ///
    /// # Safety
    /// Has no preconditions.
    fn mmun_synchronize() {
        mm::must_not_wait("mmu_notifier_synchronize", DRIVERS.synchronize());
    }
}

crate::layout::layout! {
    "mmu_notifier" = MmuNotifier { ops, mm, node as "mmun_private" }
    "mmu_notifier_ops" = Ops {
        release, clear_flush_young, clear_young, test_young, invalidate_range_start, invalidate_range_end,
        arch_invalidate_secondary_tlbs, alloc_notifier, free_notifier,
    }
}
