//! `struct mmu_notifier_range`: the argument of callbacks, and the brackets of event sources.
//!
//! # Safety
//! From `start` to `end`, the private words of a C range hold a [`PlacedBracket`]; then `state` is
//! [`OPEN`]. The bracket borrows the handle in the field `mm` of the same range. So C code must not
//! move the range between `start` and `end` (crate docs, Objects).

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

/// The state of a range that holds a bracket. Uninitialised memory is unlikely to have this value,
/// and C code may pass a range that it has not initialised.
const OPEN: usize = 0x6d6d_756e_6f70_656e;

const BLOCKABLE: c_uint = 1;

// The values of `enum mmu_notifier_event` from `MMU_NOTIFY_RELEASE` on.
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
        // `Event::Unmap`, and any event that this library does not know: `MMU_NOTIFY_UNMAP` is the
        // strongest event.
        _ => 0,
    }
}

#[inline(always)]
fn event(code: c_uint, owner: *mut c_void) -> Event {
    /// The events without an owner, by their values. An array needs a load instead of a jump.
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

/// Returns the bounds as a C range has them: the end is exclusive. A range that includes the last
/// address ends at `ULONG_MAX`.
#[inline(always)]
pub(crate) fn bounds(range: VaRange) -> (c_ulong, c_ulong) {
    (range.start().get(), range.last().get().saturating_add(1))
}

/// Returns the pages that contain the bytes from `start` up to and without `end`, without tags.
/// Returns `None` if there are no bytes.
#[inline(always)]
pub(crate) fn pages(start: c_ulong, end: c_ulong) -> Option<VaRange> {
    VaRange::covering(Va::untagged(start), end.checked_sub(start)?).ok()
}

impl Range {
    /// Returns whether callbacks may get this range itself, because its fields equal those that
    /// [`tell_translated`] would pass.
    #[inline(always)]
    fn is_as_told(&self, flags: c_uint) -> bool {
        (self.start | self.end) % PAGE_SIZE == 0
            && Va::untagged(self.start).get() == self.start
            && self.flags == flags
            && (self.owner.is_null() && self.event < RELEASE)
    }
}

/// Calls a C callback with the C range that the bracket was opened with. If there is no such range,
/// or the callback must not get it, calls the callback with a translation of `range`.
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

/// Opens a bracket with `open`, which stores the bracket in the range.
///
/// # Safety
/// `range` must be null or point to a C range with the bits of a counted handle, which must not
/// move before its end. If `open` succeeds, it must have written a bracket to its first argument.
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
    // SAFETY: `range` is null or points to a C range, as the caller promises.
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
    // The handle is not borrowed through `this`, because it must be borrowed as long as the bracket
    // lives.
    let place_of_mm = range.cast::<*mut MmStruct>();
    // SAFETY: `mm` is the first field of the range (asserted below). It holds the bits of a counted
    // handle and does not move before the end, as the caller promises.
    let mm: &'static Mm = unsafe { mm::borrow(place_of_mm) };
    // SAFETY: `range` points to a C range without a bracket, so no other code uses its private
    // words.
    open(unsafe { bracket(range) }, mm, pages, event, origin)?;
    // SAFETY: `range` points to a C range, as the caller promises.
    unsafe { (*range).state = OPEN };
    Ok(())
}

/// Returns the private words of a range, in which the bracket is stored. They are large enough and
/// aligned for a bracket (asserted above).
///
/// # Safety
/// `range` must point to a range whose private words no other code uses as long as the reference
/// lives. Callbacks may read the other fields of the range.
#[inline(always)]
unsafe fn bracket<'a>(range: *mut Range) -> &'a mut MaybeUninit<Bracket> {
    let place = range.wrapping_byte_add(std::mem::offset_of!(Range, bracket));
    // SAFETY: The private words are valid and used by no other code, as the caller promises.
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
            // SAFETY: `origin` is 0 or the address of `range`, which the caller keeps at its place
            // until the end (crate docs, Objects).
            unsafe { PlacedBracket::start(place, mm, pages, event, origin) };
            Ok(())
        };
        // SAFETY: `range` is null or a C range with a handle of the caller, which does not move
        // before its end (crate docs, Pointers and Objects). `open` writes a bracket or fails.
        let started = unsafe { start("mmu_notifier_invalidate_range_start", range, BLOCKABLE, open) };
        debug_assert!(started.is_ok(), "no subscriber can refuse where sleeping is allowed");
    }

    /// Opens a bracket whose callbacks must not sleep.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_invalidate_range_start_nonblock(range: *mut Range) -> c_int {
        let open = |place: &mut MaybeUninit<Bracket>, mm, pages, event, origin| {
            // SAFETY: `origin` is 0 or the address of `range`, which the caller keeps at its place
            // until the end (crate docs, Objects).
            unsafe { PlacedBracket::try_start(place, mm, pages, event, origin) }
        };
        // SAFETY: `range` is null or a C range with a handle of the caller, which does not move
        // before its end (crate docs, Pointers and Objects). `open` writes a bracket or fails.
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
        // SAFETY: `range` is null or points to a C range (crate docs, Pointers).
        let Some(this) = (unsafe { range.as_mut() }) else { die("mmu_notifier_invalidate_range_end", "the range is null") };
        if this.state != OPEN {
            return;
        }
        this.state = 0;
        // SAFETY: Only the thread that started the range uses its private words, and that thread
        // ends the range (crate docs, Objects).
        let bracket = unsafe { bracket(range) };
        // SAFETY: `state` was `OPEN`, so `bracket` holds a bracket. `state` is now 0, so the
        // bracket is dropped only once.
        unsafe { bracket.assume_init_drop() };
    }

    /// Flushes secondary TLBs.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_arch_invalidate_secondary_tlbs(mm: *mut MmStruct, start: c_ulong, end: c_ulong) {
        if mm.is_null() {
            die("mmu_notifier_arch_invalidate_secondary_tlbs", "the address space is null");
        }
        if let Some(pages) = pages(start, end) {
            // SAFETY: `mm` is the bits of a handle of the caller (crate docs, Address spaces).
            unsafe { mm::borrow(&raw const mm) }.invalidate_secondary_tlbs(pages);
        }
    }

    /// Clears accessed bits and flushes.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_clear_flush_young(mm: *mut MmStruct, start: c_ulong, end: c_ulong) -> c_int {
        // SAFETY: `mm` is null or the bits of a handle of the caller (crate docs, Address spaces).
        let mm = (!mm.is_null()).then(|| unsafe { mm::borrow(&raw const mm) });
        c_int::from(mm.zip(pages(start, end)).is_some_and(|(mm, pages)| mm.clear_flush_young(pages)))
    }

    /// Clears accessed bits.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_clear_young(mm: *mut MmStruct, start: c_ulong, end: c_ulong) -> c_int {
        // SAFETY: `mm` is null or the bits of a handle of the caller (crate docs, Address spaces).
        let mm = (!mm.is_null()).then(|| unsafe { mm::borrow(&raw const mm) });
        c_int::from(mm.zip(pages(start, end)).is_some_and(|(mm, pages)| mm.clear_young(pages)))
    }

    /// Returns whether the accessed bit is set.
    ///
    /// # Safety
    /// See mmun/mmu_notifier.h.
    fn mmun_test_young(mm: *mut MmStruct, address: c_ulong) -> c_int {
        // SAFETY: `mm` is null or the bits of a handle of the caller (crate docs, Address spaces).
        let mm = (!mm.is_null()).then(|| unsafe { mm::borrow(&raw const mm) });
        c_int::from(mm.is_some_and(|mm| mm.test_young(Va::untagged(address))))
    }
}

crate::layout::layout! {
    "mmu_notifier_range" = Range {
        mm, start, end, flags, event, owner, state as "mmun_state", bracket as "mmun_private",
    }
}
