//! A lease in one word, so that a `Lease` is two, which compilers keep in registers: three would go
//! through memory, and be read back in other pieces than they were written in, which costs a
//! processor more than the look-up.

use super::region::Region;
use super::threads::Slot;
use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;

/// A region that is leased: where that is written down.
///
/// # Invariants
/// The address of a `Slot`, or of a `Region` and one, which lives for `'a`.
pub(crate) struct Held<'a>(NonNull<()>, PhantomData<(&'a Slot, &'a Region)>);

/// The same, taken apart.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place<'a> {
    /// In this slot, which names the region.
    Slot(&'a Slot),
    /// In the region's own count.
    Region(&'a Region),
}

const IN_REGION: usize = 1;

// The lowest bit of both addresses is free.
const _: () = assert!(align_of::<Slot>() > IN_REGION && align_of::<Region>() > IN_REGION);

// SAFETY: It is a shared reference to one type or the other, and both may be shared.
unsafe impl Send for Held<'_>
where
    for<'a> &'a Slot: Send,
    for<'a> &'a Region: Send,
{
}
// SAFETY: As above.
unsafe impl Sync for Held<'_>
where
    for<'a> &'a Slot: Sync,
    for<'a> &'a Region: Sync,
{
}

impl<'a> Held<'a> {
    #[inline(always)]
    pub(crate) fn in_slot(slot: &'a Slot) -> Self {
        // INVARIANT: It is one, for as long.
        Self(NonNull::from(slot).cast(), PhantomData)
    }

    pub(crate) fn in_region(region: &'a Region) -> Self {
        // INVARIANT: It is one, for as long, and the bit says so.
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
            // SAFETY: A reference needs a live slot: type invariant.
            return Place::Slot(unsafe { self.0.cast().as_ref() });
        }
        let region = self
            .0
            .as_ptr()
            .map_addr(|address| address & !IN_REGION)
            .cast::<Region>();
        // SAFETY: A reference needs a live region: type invariant.
        Place::Region(unsafe { &*region })
    }
}

impl fmt::Debug for Held<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Held").field(&self.place()).finish()
    }
}
