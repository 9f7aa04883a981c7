//! A lease in one word. So a `Lease` has two words, which compilers return in registers. Compilers
//! would return three words in memory, and read them back in other sizes than they were written in.
//! A processor cannot forward such stores to the loads, and the stall would cost more than the
//! look-up.

use super::region::Region;
use super::threads::Slot;
use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;

/// The place that records a lease: a slot of a thread, or the count of the region.
///
/// # Invariants
/// Contains the address of a `Slot`, or the address of a `Region` plus one. The target lives for
/// `'a`.
pub(crate) struct Held<'a>(NonNull<()>, PhantomData<(&'a Slot, &'a Region)>);

/// A `Held` taken apart.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place<'a> {
    /// The lease is in this slot, which names the region.
    Slot(&'a Slot),
    /// The lease is in the region's own count.
    Region(&'a Region),
}

const IN_REGION: usize = 1;

// The lowest bit of both kinds of addresses is free.
const _: () = assert!(align_of::<Slot>() > IN_REGION && align_of::<Region>() > IN_REGION);

// SAFETY: a `Held` is a shared reference to either type, and both types may be shared.
unsafe impl Send for Held<'_>
where
    for<'a> &'a Slot: Send,
    for<'a> &'a Region: Send,
{
}
// SAFETY: a `Held` is a shared reference to either type, and both types may be shared.
unsafe impl Sync for Held<'_>
where
    for<'a> &'a Slot: Sync,
    for<'a> &'a Region: Sync,
{
}

impl<'a> Held<'a> {
    #[inline(always)]
    pub(crate) fn in_slot(slot: &'a Slot) -> Self {
        // INVARIANT: this is the address of a slot that lives for `'a`.
        Self(NonNull::from(slot).cast(), PhantomData)
    }

    pub(crate) fn in_region(region: &'a Region) -> Self {
        // INVARIANT: this is the address of a region that lives for `'a`, plus one.
        Self(
            NonNull::from(region)
                .cast()
                .map_addr(|address| address | IN_REGION),
            PhantomData,
        )
    }

    #[inline(always)]
    pub(crate) fn place(&self) -> Place<'a> {
        if self.0.addr().get() & IN_REGION == 0 {
            // SAFETY: a reference needs a live slot, which the type's invariant guarantees.
            return Place::Slot(unsafe { self.0.cast().as_ref() });
        }
        let region = self
            .0
            .as_ptr()
            .map_addr(|address| address & !IN_REGION)
            .cast::<Region>();
        // SAFETY: a reference needs a live region, which the type's invariant guarantees.
        Place::Region(unsafe { &*region })
    }
}

impl fmt::Debug for Held<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Held").field(&self.place()).finish()
    }
}
