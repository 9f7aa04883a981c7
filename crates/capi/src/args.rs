//! C structs that grow: their first field, `size`, tells the library which fields the caller has.
//!
//! A caller that was compiled with an older header passes a smaller `size`; the library reads its
//! missing fields as zero. A caller that was compiled with a newer header passes a larger `size`.
//! The fields that this library does not know must be zero: the call fails with `E2BIG` instead of
//! ignoring a field.

use crate::error::{INVALID, TOO_NEW, fail};
use libc::c_int;
use std::mem;
use std::ptr;

/// A struct of C whose first field is `size`.
///
/// # Safety
/// The type must be `repr(C)` and begin with a `usize`, and every bit pattern must be a valid value
/// of it.
pub(crate) unsafe trait Growing: Sized {
    /// The size that the struct had in its first version.
    const FIRST: usize;
}

/// Same limit as the kernel's for extensible structs.
const LARGEST: usize = 4096;

/// Returns the size that the caller's struct has.
///
/// # Safety
/// `place` must be null, or begin with a `usize` that says how many bytes are there.
unsafe fn size<T: Growing>(place: *const T) -> Result<usize, c_int> {
    const { assert!(size_of::<T>() <= LARGEST && T::FIRST <= size_of::<T>()) };
    if place.is_null() || !place.is_aligned() {
        return Err(fail(-libc::EINVAL, INVALID));
    }
    // SAFETY: The place begins with a `usize`: the caller's duty.
    let size = unsafe { place.cast::<usize>().read() };
    if size < T::FIRST {
        return Err(fail(
            -libc::EINVAL,
            c"the field `size` of a struct is not sizeof() of it",
        ));
    }
    if size > LARGEST {
        Err(fail(-libc::E2BIG, TOO_NEW))
    } else {
        Ok(size)
    }
}

/// Reads the caller's struct.
///
/// # Safety
/// As for [`size`].
pub(crate) unsafe fn read<T: Growing>(place: *const T) -> Result<T, c_int> {
    // SAFETY: The caller's duty is passed on.
    let size = unsafe { size(place) }?;
    let known = size.min(size_of::<T>());
    for at in known..size {
        // SAFETY: `size` bytes are there: the caller's duty.
        if unsafe { place.cast::<u8>().wrapping_add(at).read() } != 0 {
            return Err(fail(-libc::E2BIG, TOO_NEW));
        }
    }
    // SAFETY: All zeroes is a valid value, as every bit pattern is (`Growing`).
    let mut value: T = unsafe { mem::zeroed() };
    // SAFETY: `known` bytes are there on both sides, and `value` is new.
    unsafe { ptr::copy_nonoverlapping(place.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
    Ok(value)
}

/// Writes all fields but `size` into the caller's struct, and zeroes the fields that this library
/// does not know.
///
/// # Safety
/// As for [`size`], and the bytes must be the caller's to be written.
pub(crate) unsafe fn write<T: Growing>(place: *mut T, value: &T) -> Result<(), c_int> {
    // SAFETY: The caller's duty is passed on.
    let size = unsafe { size(place) }?;
    let known = size.min(size_of::<T>());
    let header = size_of::<usize>();
    let (from, to) = (ptr::from_ref(value).cast::<u8>(), place.cast::<u8>());
    let (behind_size, into) = (from.wrapping_add(header), to.wrapping_add(header));
    // SAFETY: `known` bytes are there on both sides, and `value` is the library's own.
    unsafe { ptr::copy_nonoverlapping(behind_size, into, known - header) };
    // SAFETY: `size` bytes are there: the caller's duty.
    unsafe { ptr::write_bytes(to.wrapping_add(known), 0, size - known) };
    Ok(())
}

/// Returns the place for a result, set to null.
///
/// # Safety
/// `place` must be null or valid for writes.
pub(crate) unsafe fn result<'a, T>(place: *mut *mut T) -> Result<&'a mut *mut T, c_int> {
    let invalid = || {
        fail(
            -libc::EINVAL,
            c"the place for the result, the last argument, is null or misaligned",
        )
    };
    if !place.is_aligned() {
        return Err(invalid());
    }
    // SAFETY: Null or valid: the caller's duty.
    let place = unsafe { place.as_mut() }.ok_or_else(invalid)?;
    *place = ptr::null_mut();
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The second version of a struct whose first one had no `added`.
    #[repr(C)]
    #[derive(Debug, Clone, Copy, PartialEq)]
    struct Versioned {
        size: usize,
        first: u64,
        added: u64,
    }

    // SAFETY: Three words.
    unsafe impl Growing for Versioned {
        const FIRST: usize = 16;
    }

    #[repr(C)]
    struct Future {
        known: Versioned,
        unknown: u64,
    }

    #[test]
    fn a_field_that_an_older_caller_lacks_is_read_as_zero() {
        let old = Versioned {
            size: 16,
            first: 1,
            added: 7,
        };
        // SAFETY: 16 bytes are there.
        let read = unsafe { read(&raw const old) };
        assert_eq!(
            read,
            Ok(Versioned {
                size: 16,
                first: 1,
                added: 0
            })
        );
    }

    #[test]
    fn a_field_that_an_older_caller_lacks_is_not_written() {
        let mut old = Versioned {
            size: 16,
            first: 1,
            added: 7,
        };
        // SAFETY: 16 bytes are there.
        unsafe {
            write(
                &raw mut old,
                &Versioned {
                    size: 0,
                    first: 2,
                    added: 3,
                },
            )
        }
        .expect("a good size");
        assert_eq!(
            old,
            Versioned {
                size: 16,
                first: 2,
                added: 7
            }
        );
    }

    #[test]
    fn a_field_that_only_a_newer_caller_has_must_be_zero() {
        let known = Versioned {
            size: 32,
            first: 1,
            added: 2,
        };
        for (unknown, expected) in [(0, Ok(known)), (1 << 63, Err(-libc::E2BIG))] {
            let future = Future { known, unknown };
            assert_eq!(
                // SAFETY: 32 bytes are there.
                unsafe { read((&raw const future).cast::<Versioned>()) },
                expected
            );
        }
        let mut future = Future { known, unknown: 9 };
        // SAFETY: 32 bytes are there.
        unsafe { write((&raw mut future).cast::<Versioned>(), &known) }.expect("a good size");
        assert_eq!(future.unknown, 0);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for (size, code) in [
            (0, -libc::EINVAL),
            (15, -libc::EINVAL),
            (4097, -libc::E2BIG),
            (usize::MAX, -libc::E2BIG),
        ] {
            let value = Versioned {
                size,
                first: 0,
                added: 0,
            };
            // SAFETY: A size that is refused is not followed.
            assert_eq!(unsafe { read(&raw const value) }, Err(code), "{size}");
        }
    }
}
