//! Large arrays of zeroes. The kernel allocates memory only for the parts that are touched.

use std::io;
use std::ops::Deref;
use std::ptr::NonNull;

/// A type for which all bits zero are a valid value.
///
/// # Safety
/// All bits zero must be a valid value of the type, and the type must need no drop.
pub(crate) unsafe trait Zero {
    /// Makes the zero value for models, whose atomics are not plain memory.
    #[cfg_attr(not(mmun_loom), expect(dead_code, reason = "models only"))]
    fn zero() -> Self;
}

// SAFETY: zero is a valid integer.
unsafe impl Zero for u32 {
    fn zero() -> Self {
        0
    }
}

/// An array of zeroes. An array of at least the size of a huge page uses huge pages: look-ups
/// access random places in it, and with small pages each access would wait for a page table walk.
///
/// # Invariants
/// `elements` are live, and freed with the array. If `mapped` is set, the elements are in that
/// mapping, which the array owns. Otherwise the elements are a leaked box.
#[derive(Debug)]
pub(crate) struct Array<T> {
    elements: NonNull<[T]>,
    mapped: Option<(NonNull<u8>, usize)>,
}

// SAFETY: the array owns its elements.
unsafe impl<T: Send> Send for Array<T> {}
// SAFETY: the array owns its elements, and a shared array gives only shared references to them.
unsafe impl<T: Sync> Sync for Array<T> {}

#[cfg(not(mmun_loom))]
const HUGE: usize = 2 << 20;

impl<T: Zero> Array<T> {
    /// Makes an array of `len` zeroes. Fails with `OutOfMemory`.
    pub(crate) fn zeroes(len: usize) -> io::Result<Self> {
        #[cfg(not(mmun_loom))]
        if size_of::<T>() * len >= HUGE {
            if let Some(huge) = Self::huge(len) {
                return Ok(huge);
            }
        }
        // INVARIANT: the box was just leaked.
        Ok(Self {
            elements: NonNull::from(Box::leak(boxed(len)?)),
            mapped: None,
        })
    }

    /// Makes an array in a mapping of its own, aligned to a huge page.
    #[cfg(not(mmun_loom))]
    fn huge(len: usize) -> Option<Self> {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
        let size = size_of::<T>() * len + HUGE;
        let (access, kind) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        );
        // SAFETY: the kernel chooses an address where nothing is mapped.
        let place = unsafe { mmap_anonymous(std::ptr::null_mut(), size, access, kind) }.ok()?;
        let place = NonNull::new(place.cast::<u8>())?;
        let offset = place.as_ptr().addr().next_multiple_of(HUGE) - place.as_ptr().addr();
        // SAFETY: the result must be inside the allocation. The mapping is larger than the array by
        // `HUGE`, and the offset is less than that.
        let first = unsafe { place.add(offset) };
        // If the kernel has no huge pages, the advice fails, which does no harm.
        // SAFETY: the array owns the memory, and the advice does not change its content.
        let _ = unsafe { madvise(first.as_ptr().cast(), size - HUGE, Advice::LinuxHugepage) };
        // INVARIANT: the memory was just mapped and is zeroed.
        Some(Self {
            elements: NonNull::slice_from_raw_parts(first.cast(), len),
            mapped: Some((place, size)),
        })
    }
}

/// Makes a box of `len` zeroes. Fails with `OutOfMemory`.
#[cfg(not(mmun_loom))]
pub(super) fn boxed<T: Zero>(len: usize) -> io::Result<Box<[T]>> {
    use std::alloc::{Layout, alloc_zeroed};
    let layout = Layout::array::<T>(len).expect("an array fits in the address space");
    if layout.size() == 0 {
        return Ok(Box::new([]));
    }
    // SAFETY: the size must not be zero, which was checked above.
    let zeroes = unsafe { alloc_zeroed(layout) }.cast::<T>();
    if zeroes.is_null() {
        // The error of the system call, so that it has a number.
        return Err(rustix::io::Errno::NOMEM.into());
    }
    // SAFETY: the box must own an allocation with the layout of `len` valid elements. The
    // allocation was just made with that layout, and `T: Zero` says that zeroes are valid.
    Ok(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(zeroes, len)) })
}

#[cfg(mmun_loom)]
pub(super) fn boxed<T: Zero>(len: usize) -> io::Result<Box<[T]>> {
    Ok((0..len).map(|_| T::zero()).collect())
}

impl<T> Deref for Array<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: a reference needs live, valid elements, which the type's invariant guarantees.
        unsafe { self.elements.as_ref() }
    }
}

impl<T> std::ops::DerefMut for Array<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`. The elements are borrowed together with the array, so no other
        // code uses them.
        unsafe { self.elements.as_mut() }
    }
}

impl<T> Drop for Array<T> {
    fn drop(&mut self) {
        match self.mapped {
            #[cfg(not(mmun_loom))]
            Some((place, size)) => {
                // SAFETY: this value owns the mapping and is being dropped. If the call fails, the
                // mapping is leaked.
                let _ = unsafe { rustix::mm::munmap(place.as_ptr().cast(), size) };
            }
            _ => {
                // SAFETY: `from_raw` needs the unique pointer of a leaked box, which the type's
                // invariant guarantees.
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
            let mut array = Array::<u32>::zeroes(len).expect("there is memory");
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
