//! Addresses and page ranges of an address space, which may be another process's.

use std::fmt;

/// The size of the smallest page of any supported machine, in bytes. A [`VaRange`] consists of such
/// pages. If the kernel's pages are larger (16 or 64 KiB on aarch64), each of them is a whole
/// number of such pages.
pub const PAGE_SIZE: u64 = 4096;

/// A virtual address, in bytes. The address may belong to another process, so it is never a
/// pointer.
///
/// # Examples
/// ```
/// use mmu_notifier::Va;
///
/// assert_eq!((Va::new(0x7000).get(), Va::new(0x7000).to_string().as_str()), (0x7000, "0x7000"));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Va(u64);

impl Va {
    /// Wraps a byte address.
    #[must_use]
    pub const fn new(address: u64) -> Self {
        Self(address)
    }

    /// Takes the address of a pointer of this process, without its tag on processors that have
    /// tags.
    #[must_use]
    pub fn from_ptr<T: ?Sized>(pointer: *const T) -> Self {
        Self::untagged(pointer.addr() as u64)
    }

    /// Wraps a byte address without its tag. The tag is the top byte, which an aarch64 processor
    /// ignores and `malloc` may use (memory tagging). Addresses that the kernel reports have no
    /// tag.
    ///
    /// # Source
    /// `untagged_addr`, arch/arm64/include/asm/uaccess.h.
    #[must_use]
    pub const fn untagged(address: u64) -> Self {
        // The shift copies bit 55 upwards, so kernel addresses keep their upper bits.
        if cfg!(target_arch = "aarch64") {
            Self(address & ((address << 8) as i64 >> 8) as u64)
        } else {
            Self(address)
        }
    }

    /// Returns the byte address.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Va {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Va {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A non-empty range of whole pages, half-open in bytes.
///
/// # Invariants
/// `first` and `last + 1` are multiples of [`PAGE_SIZE`], and `first < last`. If the range reaches
/// the last address, `last + 1` wraps to zero.
///
/// # Examples
/// ```
/// use mmu_notifier::{Va, VaRange};
///
/// let range = VaRange::new(Va::new(0x1000), Va::new(0x3000))?;
/// assert_eq!(range.pages(), 2);
/// assert!(VaRange::new(Va::new(0x1000), Va::new(0x1000)).is_err(), "an empty range cannot be made");
/// assert!(range.contains(Va::new(0x2fff)) && !range.contains(Va::new(0x3000)));
///
/// let other = VaRange::new(Va::new(0x2000), Va::new(0x5000))?;
/// assert_eq!(range.intersection(other).map(VaRange::pages), Some(1));
/// assert_eq!(range.hull(other).bytes(), 0x4000);
/// assert!(VaRange::ALL.covers(other) && VaRange::ALL.end().is_none());
/// # Ok::<(), mmu_notifier::InvalidRange>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VaRange {
    first: u64,
    last: u64,
}

impl VaRange {
    /// The whole of an address space, its last address included.
    pub const ALL: Self = Self {
        first: 0,
        last: u64::MAX,
    };

    /// Makes the range of bytes from `start` up to and without `end`.
    ///
    /// # Errors
    /// [`InvalidRange`] if the range is empty or reversed, or if either bound is not a multiple of
    /// [`PAGE_SIZE`].
    ///
    /// # Source
    /// `mmu_notifier_range_init`, include/linux/mmu_notifier.h. Differs: the kernel accepts an
    /// empty range; an empty range at address zero hits every interval of the address space.
    pub const fn new(start: Va, end: Va) -> Result<Self, InvalidRange> {
        if start.0 < end.0 && start.0 % PAGE_SIZE == 0 && end.0 % PAGE_SIZE == 0 {
            Ok(Self {
                first: start.0,
                last: end.0 - 1,
            })
        } else {
            Err(InvalidRange {
                start,
                last: Va(end.0.wrapping_sub(1)),
            })
        }
    }

    /// Makes the smallest range of whole pages that holds the `len` bytes from `start`.
    ///
    /// # Errors
    /// [`InvalidRange`] if `len` is zero or the bytes run past the last address.
    ///
    /// # Examples
    /// ```
    /// use mmu_notifier::{Va, VaRange};
    ///
    /// let range = VaRange::covering(Va::new(0x1fff), 2)?;
    /// assert_eq!(range.to_string(), "0x1000-0x3000");
    /// # Ok::<(), mmu_notifier::InvalidRange>(())
    /// ```
    pub const fn covering(start: Va, len: u64) -> Result<Self, InvalidRange> {
        if len == 0 {
            return Err(InvalidRange {
                start,
                last: Va(start.0.wrapping_sub(1)),
            });
        }
        match start.0.checked_add(len - 1) {
            Some(last) => Ok(Self {
                first: start.0 & !(PAGE_SIZE - 1),
                last: last | (PAGE_SIZE - 1),
            }),
            None => Err(InvalidRange {
                start,
                last: Va(u64::MAX),
            }),
        }
    }

    /// Makes the smallest range of whole pages that holds the memory of `buffer`, in this process.
    ///
    /// # Errors
    /// [`InvalidRange`] if `buffer` has no bytes.
    ///
    /// # Examples
    /// ```
    /// use mmu_notifier::{Va, VaRange};
    ///
    /// let buffer = vec![0_u8; 10_000];
    /// let range = VaRange::of(&buffer)?;
    /// assert!(range.contains(Va::from_ptr(&buffer[9_999])));
    /// assert!(VaRange::of::<u8>(&[]).is_err(), "there is nothing to make a range of");
    /// # Ok::<(), mmu_notifier::InvalidRange>(())
    /// ```
    pub fn of<T>(buffer: &[T]) -> Result<Self, InvalidRange> {
        Self::covering(Va::from_ptr(buffer.as_ptr()), size_of_val(buffer) as u64)
    }

    /// Returns the first byte.
    #[must_use]
    pub const fn start(self) -> Va {
        Va(self.first)
    }

    /// Returns the last byte, which belongs to the range.
    #[must_use]
    pub const fn last(self) -> Va {
        Va(self.last)
    }

    /// Returns the first byte after the range, or `None` if the range reaches the last address.
    #[must_use]
    pub const fn end(self) -> Option<Va> {
        match self.last.checked_add(1) {
            Some(end) => Some(Va(end)),
            None => None,
        }
    }

    /// Returns the number of pages of [`PAGE_SIZE`] bytes.
    #[must_use]
    pub const fn pages(self) -> u64 {
        (self.last - self.first) / PAGE_SIZE + 1
    }

    /// Returns the number of bytes. For [`ALL`](Self::ALL), whose 2^64 bytes do not fit into a
    /// `u64`, returns `u64::MAX`.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        (self.last - self.first).saturating_add(1)
    }

    /// Tells whether `address` lies in the range.
    #[must_use]
    pub const fn contains(self, address: Va) -> bool {
        self.first <= address.0 && address.0 <= self.last
    }

    /// Tells whether all of `other` lies in the range.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// Tells whether the two ranges share a page.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Returns the pages that are in both ranges, if there are any.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        self.overlaps(other).then(|| Self {
            first: self.first.max(other.first),
            last: self.last.min(other.last),
        })
    }

    /// Returns the smallest range that holds both.
    #[must_use]
    pub fn hull(self, other: Self) -> Self {
        Self {
            first: self.first.min(other.first),
            last: self.last.max(other.last),
        }
    }
}

impl fmt::Display for VaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.first, u128::from(self.last) + 1)
    }
}

impl fmt::Debug for VaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The error for bounds that make no [`VaRange`]: an empty or reversed range, a range past the last
/// address, or bounds that are not multiples of the page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct InvalidRange {
    /// The first byte of the refused range.
    pub start: Va,
    /// The last byte of the refused range.
    pub last: Va,
}

impl fmt::Display for InvalidRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no range of whole pages from {} to {} inclusive: it must be non-empty and bounded by multiples of {PAGE_SIZE}",
            self.start, self.last
        )
    }
}

impl std::error::Error for InvalidRange {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_may_reach_the_last_address() {
        let top = VaRange::covering(Va::new(u64::MAX), 1).unwrap();
        assert_eq!(
            (top.pages(), top.end(), top.last()),
            (1, None, Va::new(u64::MAX))
        );
        assert_eq!(VaRange::ALL.pages(), 1 << 52);
        assert_eq!(top.to_string(), "0xfffffffffffff000-0x10000000000000000");
    }

    #[test]
    fn the_address_of_a_pointer_is_that_of_its_first_byte() {
        let words = [0_u64; 4];
        let first = words.as_ptr().addr() as u64;
        assert_eq!(Va::from_ptr(&words[3]), Va::new(first + 24));
        assert_eq!(
            Va::from_ptr(&words[1..]),
            Va::new(first + 8),
            "a slice's, without its length"
        );
    }

    #[test]
    fn covering_rounds_outwards_and_refuses_overflow() {
        let range = VaRange::covering(Va::new(0x1fff), 2).unwrap();
        assert_eq!(
            range,
            VaRange::new(Va::new(0x1000), Va::new(0x3000)).unwrap()
        );
        assert!(VaRange::covering(Va::new(u64::MAX), 2).is_err());
        assert!(VaRange::covering(Va::new(0), 0).is_err());
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let low = VaRange::covering(Va::new(0), PAGE_SIZE).unwrap();
        let high = VaRange::covering(Va::new(PAGE_SIZE), PAGE_SIZE).unwrap();
        assert!(!low.overlaps(high) && low.intersection(high).is_none());
        assert_eq!(VaRange::ALL.intersection(high), Some(high));
        assert_eq!(low.hull(high).bytes(), 2 * PAGE_SIZE);
        assert!(low.hull(high).covers(high) && !high.covers(low) && high.covers(high));
        assert_eq!(
            (VaRange::ALL.bytes(), VaRange::ALL.hull(low)),
            (u64::MAX, VaRange::ALL)
        );
        assert!(high.contains(Va::new(PAGE_SIZE)) && !low.contains(Va::new(PAGE_SIZE)));
    }
}
