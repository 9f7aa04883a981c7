//! C structs that grow: their first field, `size`, tells the library which fields the caller has.
//!
//! A caller that was compiled with an older header passes a smaller `size`, and the library reads
//! the missing fields as zero. A caller that was compiled with a newer header passes a larger
//! `size`. The fields that this library does not know must be zero. Otherwise the function fails
//! with `E2BIG`, because ignoring such a field could be wrong.

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

/// The largest size of a caller's struct: one page, as in the kernel.
const LARGEST: usize = 4096;

/// Returns the size that the caller's struct has.
///
/// # Safety
/// `place` must be null, or point to a `usize` that is the size of the struct that it begins. That
/// many bytes must be readable.
unsafe fn size<T: Growing>(place: *const T) -> Result<usize, c_int> {
    const { assert!(size_of::<T>() <= LARGEST && T::FIRST <= size_of::<T>()) };
    if place.is_null() || !place.is_aligned() {
        return Err(fail(-libc::EINVAL, INVALID));
    }
    // SAFETY: `place` is aligned and not null, as just checked, and so points to a readable
    // `usize`, as the caller promises.
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
    // SAFETY: The caller makes the promise of `size` for `place`.
    let size = unsafe { size(place) }?;
    let known = size.min(size_of::<T>());
    for at in known..size {
        // SAFETY: `at` is less than `size`, and the caller promises that `size` bytes are readable.
        if unsafe { place.cast::<u8>().wrapping_add(at).read() } != 0 {
            return Err(fail(-libc::E2BIG, TOO_NEW));
        }
    }
    // SAFETY: Every bit pattern is a valid `T` (see `Growing`), so all zeroes are.
    let mut value: T = unsafe { mem::zeroed() };
    // SAFETY: `known` is at most the size of `T` and at most the readable `size` bytes. `value` is
    // a new local variable, so the two do not overlap.
    unsafe { ptr::copy_nonoverlapping(place.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
    Ok(value)
}

/// Writes all fields except `size` into the caller's struct, and zeroes the fields that this
/// library does not know.
///
/// # Safety
/// As for [`size`], and the bytes must be writable as well.
pub(crate) unsafe fn write<T: Growing>(place: *mut T, value: &T) -> Result<(), c_int> {
    // SAFETY: The caller makes the promise of `size` for `place`.
    let size = unsafe { size(place) }?;
    let known = size.min(size_of::<T>());
    let header = size_of::<usize>();
    let (from, to) = (ptr::from_ref(value).cast::<u8>(), place.cast::<u8>());
    let (behind_size, into) = (from.wrapping_add(header), to.wrapping_add(header));
    // SAFETY: `known` is at most the size of `T` and at most the writable `size` bytes. `value` is
    // memory of the library, so it does not overlap the caller's struct.
    unsafe { ptr::copy_nonoverlapping(behind_size, into, known - header) };
    // SAFETY: The caller promises that `size` bytes are writable, and `known` is at most `size`.
    unsafe { ptr::write_bytes(to.wrapping_add(known), 0, size - known) };
    Ok(())
}

/// Stores null in the caller's variable for a result, and returns that variable.
///
/// # Safety
/// `place` must be null, or valid for writes as long as the reference lives.
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
    // SAFETY: `place` is aligned, as just checked, and null or valid, as the caller promises.
    let place = unsafe { place.as_mut() }.ok_or_else(invalid)?;
    *place = ptr::null_mut();
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The second version of a struct. Its first version had no field `added`.
    #[repr(C)]
    #[derive(Debug, Clone, Copy, PartialEq)]
    struct Versioned {
        size: usize,
        first: u64,
        added: u64,
    }

    // SAFETY: The type is `repr(C)`, begins with a `usize` and consists of integers.
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
        // SAFETY: `size` is 16, and `old` has more bytes.
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
        // SAFETY: `size` is 16, and `old` has more bytes, which this test owns.
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
                // SAFETY: `size` is 32, the size of `future`.
                unsafe { read((&raw const future).cast::<Versioned>()) },
                expected
            );
        }
        let mut future = Future { known, unknown: 9 };
        // SAFETY: `size` is 32, the size of `future`, which this test owns.
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
            // SAFETY: `read` refuses these sizes, and then reads no byte after `size`.
            assert_eq!(unsafe { read(&raw const value) }, Err(code), "{size}");
        }
    }
}
