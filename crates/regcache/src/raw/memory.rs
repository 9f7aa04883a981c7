//! Large arrays that start as zeroes, of which the kernel backs only what is touched.

use std::ops::Deref;
use std::ptr::NonNull;

/// Types for which all bits zero is a value.
///
/// # Safety
/// That must be so, and they must need no drop.
pub(crate) unsafe trait Zero {
    /// The same value, for models, whose atomics are not plain memory.
    #[cfg_attr(not(mmun_loom), expect(dead_code, reason = "models only"))]
    fn zero() -> Self;
}

// SAFETY: An integer.
unsafe impl Zero for u32 {
    fn zero() -> Self {
        0
    }
}

/// An array of zeroes, in huge pages if it is longer than one: look-ups go to random places in it,
/// and a table walk for each is what they would wait for.
///
/// # Invariants
/// `elements` are live, and freed with this. They are a mapping of their own if `mapped` says
/// where, and a box if not.
#[derive(Debug)]
pub(crate) struct Array<T> {
    elements: NonNull<[T]>,
    mapped: Option<(NonNull<u8>, usize)>,
}

// SAFETY: It owns its elements.
unsafe impl<T: Send> Send for Array<T> {}
// SAFETY: As above.
unsafe impl<T: Sync> Sync for Array<T> {}

#[cfg(not(mmun_loom))]
const HUGE: usize = 2 << 20;

impl<T: Zero> Array<T> {
    /// An array of `len` zeroes.
    pub(crate) fn zeroes(len: usize) -> Self {
        #[cfg(not(mmun_loom))]
        if size_of::<T>() * len >= HUGE {
            if let Some(huge) = Self::huge(len) {
                return huge;
            }
        }
        // INVARIANT: It was just leaked.
        Self {
            elements: NonNull::from(Box::leak(boxed(len))),
            mapped: None,
        }
    }

    /// A mapping that begins where a huge page does.
    #[cfg(not(mmun_loom))]
    fn huge(len: usize) -> Option<Self> {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
        let size = size_of::<T>() * len + HUGE;
        let (access, kind) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        );
        // SAFETY: The kernel chooses a place where nothing is.
        let place = unsafe { mmap_anonymous(std::ptr::null_mut(), size, access, kind) }.ok()?;
        let place = NonNull::new(place.cast::<u8>())?;
        let offset = place.as_ptr().addr().next_multiple_of(HUGE) - place.as_ptr().addr();
        // SAFETY: The result must lie in the allocation, which is larger than the array by the most
        // that the offset can be.
        let first = unsafe { place.add(offset) };
        // A kernel that has no huge pages does without.
        // SAFETY: The memory is ours, and the advice does not change what is in it.
        let _ = unsafe { madvise(first.as_ptr().cast(), size - HUGE, Advice::LinuxHugepage) };
        // INVARIANT: It was just mapped, zeroed.
        Some(Self {
            elements: NonNull::slice_from_raw_parts(first.cast(), len),
            mapped: Some((place, size)),
        })
    }
}

/// A box of `len` zeroes.
#[cfg(not(mmun_loom))]
pub(super) fn boxed<T: Zero>(len: usize) -> Box<[T]> {
    use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
    let layout = Layout::array::<T>(len).expect("an array fits in the address space");
    if layout.size() == 0 {
        return Box::new([]);
    }
    // SAFETY: The size must not be zero: checked.
    let zeroes = unsafe { alloc_zeroed(layout) }.cast::<T>();
    if zeroes.is_null() {
        handle_alloc_error(layout);
    }
    // SAFETY: The box must own an allocation with the layout of `len` valid elements: it was just
    // made with that layout, and their type says that zeroes are valid.
    unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(zeroes, len)) }
}

#[cfg(mmun_loom)]
pub(super) fn boxed<T: Zero>(len: usize) -> Box<[T]> {
    (0..len).map(|_| T::zero()).collect()
}

impl<T> Deref for Array<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: A reference needs live, valid elements: type invariant.
        unsafe { self.elements.as_ref() }
    }
}

impl<T> std::ops::DerefMut for Array<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: As in `deref`; they are borrowed with the array, so no other code can use them.
        unsafe { self.elements.as_mut() }
    }
}

impl<T> Drop for Array<T> {
    fn drop(&mut self) {
        match self.mapped {
            #[cfg(not(mmun_loom))]
            Some((place, size)) => {
                // SAFETY: The mapping is ours, and its owner is being dropped. A failure leaks it,
                // which is all one can do.
                let _ = unsafe { rustix::mm::munmap(place.as_ptr().cast(), size) };
            }
            _ => {
                // SAFETY: A box needs the unique pointer that came from one: type invariant.
                drop(unsafe { Box::from_raw(self.elements.as_ptr()) });
            }
        }
    }
}

#[cfg(all(test, not(mmun_loom)))]
mod tests {
    use super::*;

    #[test]
    fn arrays_are_zero_whether_large_or_small() {
        for len in [0, 1, 1000, HUGE / 4, HUGE] {
            let mut array = Array::<u32>::zeroes(len);
            assert_eq!(
                (array.len(), array.mapped.is_some()),
                (len, len * 4 >= HUGE)
            );
            assert!(array.iter().all(|element| *element == 0));
            if let Some(last) = array.last_mut() {
                *last = 7;
                assert_eq!(array[len - 1], 7);
            }
        }
    }
}
