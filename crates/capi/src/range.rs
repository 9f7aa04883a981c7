//! `struct mmu_notifier_range`: the argument of callbacks, and the brackets of event sources.
//!
//! # Safety
//! The private words of a range that C gives hold a [`PlacedBracket`] from `start` to `end`, as
//! [`OPEN`] says. It borrows the handle at `mm` of the same range: hence C must leave the range
//! where it is in between.

use crate::border::{die, export, warn_once};
use crate::mm::{self, MmStruct};
use libc::{c_int, c_uint, c_ulong, c_void};
use mmu_notifier::raw::{self, PlacedBracket};
use mmu_notifier::{
    Blocking, Event, InvalidateRange, Mm, Owner, PAGE_SIZE, Va, VaRange, WouldBlock,
};
use std::mem::MaybeUninit;
use std::ptr;

/// `struct mmu_notifier_range`.
#[repr(C)]
#[derive(Debug)]
pub struct Range {
    mm: *mut MmStruct,
    start: c_ulong,
    end: c_ulong,
    flags: c_uint,
    event: c_uint,
    owner: *mut c_void,
    /// [`OPEN`] while `bracket` holds a bracket.
    state: usize,
    bracket: MaybeUninit<[usize; BRACKET_WORDS]>,
}

type Bracket = PlacedBracket<'static>;
const BRACKET_WORDS: usize = 17;
const _: () = assert!(size_of::<Bracket>() <= BRACKET_WORDS * size_of::<usize>());
const _: () = assert!(align_of::<Bracket>() <= align_of::<usize>());

/// An unlikely value for uninitialised memory: C code need not have initialised the range.
const OPEN: usize = 0x6d6d_756e_6f70_656e;

const BLOCKABLE: c_uint = 1;

/// The events, in the order of `enum mmu_notifier_event`.
const RELEASE: c_uint = 5;
const MIGRATE: c_uint = 6;
const EXCLUSIVE: c_uint = 7;

pub(crate) fn code(event: Event) -> c_uint {
    match event {
        Event::Clear => 1,
        Event::ProtectionVma => 2,
        Event::ProtectionPage => 3,
        Event::SoftDirty => 4,
        Event::Release(_) => RELEASE,
        Event::Migrate { .. } => MIGRATE,
        Event::Exclusive { .. } => EXCLUSIVE,
        // An event that this library does not know is reported as `MMU_NOTIFY_UNMAP`, the
        // strongest.
        _ => 0,
    }
}

#[inline(always)]
fn event(code: c_uint, owner: *mut c_void) -> Event {
    /// A load in place of a jump.
    const PLAIN: [Event; 5] = [
        Event::Unmap,
        Event::Clear,
        Event::ProtectionVma,
        Event::ProtectionPage,
        Event::SoftDirty,
    ];
    match PLAIN.get(code as usize) {
        Some(plain) => *plain,
        None => event_with_owner(code, owner),
    }
}

#[cold]
fn event_with_owner(code: c_uint, owner: *mut c_void) -> Event {
    let owner = || Owner::at(Va::new(owner.addr() as u64));
    match code {
        MIGRATE => Event::Migrate { owner: owner() },
        EXCLUSIVE => Event::Exclusive { owner: owner() },
        _ => {
            warn_once!(
                "mmu_notifier_invalidate_range_start: not an event for sources: treated as MMU_NOTIFY_UNMAP"
            );
            Event::Unmap
        }
    }
}

/// Returns the bounds as C has them; a range that reaches the last address ends at `ULONG_MAX`.
#[inline(always)]
pub(crate) fn bounds(range: VaRange) -> (c_ulong, c_ulong) {
    (range.start().get(), range.last().get().saturating_add(1))
}

/// Returns the pages that the bytes from `start` up to and without `end` touch; none if there are
/// no bytes.
#[inline(always)]
pub(crate) fn pages(start: c_ulong, end: c_ulong) -> Option<VaRange> {
    VaRange::covering(Va::new(start), end.checked_sub(start)?).ok()
}

impl Range {
    /// Returns whether callbacks may get this range itself: whether its fields equal those that
    /// [`tell_translated`] would pass.
    #[inline(always)]
    fn is_as_told(&self, flags: c_uint) -> bool {
        (self.start | self.end) % PAGE_SIZE == 0
            && self.flags == flags
            && (self.owner.is_null() && self.event < RELEASE)
    }
}

/// Calls a C callback with the C range that the bracket was opened with, or with a translation of
/// `range`.
#[inline(always)]
pub(crate) fn tell<R>(range: &InvalidateRange<'_>, callback: impl Fn(*const Range) -> R) -> R {
    match raw::origin(range) {
        0 => tell_translated(range, callback),
        origin => callback(ptr::with_exposed_provenance(origin)),
    }
}

#[cold]
#[inline(never)]
fn tell_translated<R>(range: &InvalidateRange<'_>, callback: impl Fn(*const Range) -> R) -> R {
    let (start, end) = bounds(range.range());
    let owner = range.event().owner().map_or(ptr::null_mut(), |owner| {
        ptr::without_provenance_mut(owner.get() as usize)
    });
    callback(&Range {
        mm: mm::bits(range.mm()),
        start,
        end,
        flags: if range.blocking() == Blocking::Allowed {
            BLOCKABLE
        } else {
            0
        },
        event: code(range.event()),
        owner,
        state: 0,
        bracket: MaybeUninit::uninit(),
    })
}

/// Opens a bracket as `open` does, and keeps it in the range.
///
/// # Safety
/// `range` must be a C range with the bits of a counted handle, and must not move before its end.
/// `open` must write a bracket to the place, or fail.
#[inline(always)]
unsafe fn start(
    function: &str,
    range: *mut Range,
    flags: c_uint,
    open: impl FnOnce(
        &mut MaybeUninit<Bracket>,
        &'static Mm,
        VaRange,
        Event,
        usize,
    ) -> Result<(), WouldBlock>,
) -> Result<(), WouldBlock> {
    // SAFETY: The place must be valid: the caller's duty.
    let Some(this) = (unsafe { range.as_mut() }) else {
        die(function, "the range is null")
    };
    if this.mm.is_null() {
        die(
            function,
            "the range has no address space: use mmu_notifier_range_init",
        );
    }
    if this.state == OPEN {
        die(function, "the range has been started and not ended");
    }
    this.state = 0;
    let Some(pages) = pages(this.start, this.end) else {
        return Ok(());
    };
    let event = event(this.event, this.owner);
    let origin = if this.is_as_told(flags) {
        range.expose_provenance()
    } else {
        0
    };
    // Not through `this`: the borrow of the handle must live as long as the bracket.
    let place_of_mm = range.cast::<*mut MmStruct>();
    // SAFETY: The place holds the bits of a counted handle and stays until the end: the caller's
    // duty.
    let mm: &'static Mm = unsafe { mm::borrow(place_of_mm) };
    // SAFETY: The caller's duty is passed on.
    open(unsafe { bracket(range) }, mm, pages, event, origin)?;
    // SAFETY: The place must be valid: the caller's duty.
    unsafe { (*range).state = OPEN };
    Ok(())
}

/// Returns the place of the bracket in a range, which is large enough and aligned (asserted above).
///
/// # Safety
/// `range` must point to a range whose private words no other code uses meanwhile. Callbacks may
/// read its other fields.
#[inline(always)]
unsafe fn bracket<'a>(range: *mut Range) -> &'a mut MaybeUninit<Bracket> {
    let place = range.wrapping_byte_add(std::mem::offset_of!(Range, bracket));
    // SAFETY: Valid, and used by no other code: the caller's duty.
    unsafe { &mut *place.cast() }
}

const _: () = assert!(std::mem::offset_of!(Range, mm) == 0);

export! {
    /// Opens a bracket.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_invalidate_range_start(range: *mut Range) {
        let open = |place: &mut MaybeUninit<Bracket>, mm, pages, event, origin| {
            // SAFETY: `origin` is 0 or `range`, which the caller keeps until the end.
            unsafe { PlacedBracket::start(place, mm, pages, event, origin) };
            Ok(())
        };
        // SAFETY: The caller's duty is passed on.
        let started = unsafe { start("mmu_notifier_invalidate_range_start", range, BLOCKABLE, open) };
        debug_assert!(started.is_ok(), "no subscriber can refuse where sleeping is allowed");
    }

    /// Opens a bracket whose callbacks must not sleep.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_invalidate_range_start_nonblock(range: *mut Range) -> c_int {
        let open = |place: &mut MaybeUninit<Bracket>, mm, pages, event, origin| {
            // SAFETY: `origin` is 0 or `range`, which the caller keeps until the end.
            unsafe { PlacedBracket::try_start(place, mm, pages, event, origin) }
        };
        // SAFETY: The caller's duty is passed on.
        match unsafe { start("mmu_notifier_invalidate_range_start_nonblock", range, 0, open) } {
            Ok(()) => 0,
            Err(WouldBlock) => -libc::EAGAIN,
        }
    }

    /// Closes the bracket.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_invalidate_range_end(range: *mut Range) {
        // SAFETY: The place must be null or valid: the caller's duty.
        let Some(this) = (unsafe { range.as_mut() }) else { die("mmu_notifier_invalidate_range_end", "the range is null") };
        if this.state != OPEN {
            return;
        }
        this.state = 0;
        // SAFETY: The place is valid, and the thread that started the range ends it: the header
        // demands that.
        let bracket = unsafe { bracket(range) };
        // SAFETY: `state` says that the place holds a bracket; it is dropped once.
        unsafe { bracket.assume_init_drop() };
    }

    /// Tells secondary TLBs to flush.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_arch_invalidate_secondary_tlbs(mm: *mut MmStruct, start: c_ulong, end: c_ulong) {
        if mm.is_null() {
            die("mmu_notifier_arch_invalidate_secondary_tlbs", "the address space is null");
        }
        if let Some(pages) = pages(start, end) {
            // SAFETY: The caller has a handle.
            unsafe { mm::borrow(&raw const mm) }.invalidate_secondary_tlbs(pages);
        }
    }

    /// Clears accessed bits and flushes.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_clear_flush_young(mm: *mut MmStruct, start: c_ulong, end: c_ulong) -> c_int {
        // SAFETY: The caller has a handle.
        let mm = (!mm.is_null()).then(|| unsafe { mm::borrow(&raw const mm) });
        c_int::from(mm.zip(pages(start, end)).is_some_and(|(mm, pages)| mm.clear_flush_young(pages)))
    }

    /// Clears accessed bits.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_clear_young(mm: *mut MmStruct, start: c_ulong, end: c_ulong) -> c_int {
        // SAFETY: The caller has a handle.
        let mm = (!mm.is_null()).then(|| unsafe { mm::borrow(&raw const mm) });
        c_int::from(mm.zip(pages(start, end)).is_some_and(|(mm, pages)| mm.clear_young(pages)))
    }

    /// Returns whether the accessed bit is set.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_test_young(mm: *mut MmStruct, address: c_ulong) -> c_int {
        // SAFETY: The caller has a handle.
        let mm = (!mm.is_null()).then(|| unsafe { mm::borrow(&raw const mm) });
        c_int::from(mm.is_some_and(|mm| mm.test_young(Va::new(address))))
    }
}

crate::layout::layout! {
    "mmu_notifier_range" = Range {
        mm, start, end, flags, event, owner, state as "mmun_state", bracket as "mmun_private",
    }
}
