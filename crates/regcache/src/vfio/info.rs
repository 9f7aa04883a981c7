//! Asks a container about its IOMMU: `struct vfio_iommu_type1_info`.
//!
//! # Safety
//! The system call gets a buffer that outlives the call. The first word of the buffer is the
//! buffer's length in bytes.

use rustix::io::{self, Errno};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::OwnedFd;

/// The number of words of the structure without capabilities: length, flags, page sizes (two),
/// offset of the first capability, and padding.
const HEAD: usize = 6;
/// In the flags: the structure is followed by a chain of capabilities.
const CAPS: u32 = 2;
/// The kind of the capability that lists the addresses that the IOMMU translates. After the head of
/// the capability come a count, a reserved word, and pairs of a first and a last address.
const IOVA_RANGES: u32 = 1;

/// `VFIO_IOMMU_GET_INFO`, with the buffer that the kernel fills.
struct GetInfo<'a>(&'a mut [u32]);

// SAFETY: the call reads the first word of the buffer and writes at most that many bytes. The
// buffer has at least that length (see `ask`), and any bytes are valid words.
unsafe impl Ioctl for GetInfo<'_> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::none(b';', 112)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> io::Result<()> {
        Ok(())
    }
}

/// Returns the addresses that a container's IOMMU translates, or all addresses if the kernel does
/// not say.
pub(super) fn translated(container: &OwnedFd) -> io::Result<Vec<Range<u64>>> {
    ranges_of(|words| {
        // SAFETY: the call changes only the buffer, and `ranges_of` has written the buffer's length
        // to its first word.
        unsafe { ioctl(container, GetInfo(words)) }
    })
}

/// Calls `ask` with a buffer as long as the kernel needs. If a buffer is too short, the kernel
/// leaves the chain out and stores the needed length in the first word.
fn ranges_of(ask: impl Fn(&mut [u32]) -> io::Result<()>) -> io::Result<Vec<Range<u64>>> {
    let mut words = vec![0; HEAD];
    loop {
        let given = u32::try_from(4 * words.len()).map_err(|_| Errno::OVERFLOW)?;
        words[0] = given;
        ask(&mut words)?;
        let wanted = words[0];
        if wanted <= given {
            return Ok(parse(&words));
        }
        words.clear();
        words.resize(wanted.div_ceil(4) as usize, 0);
    }
}

fn parse(words: &[u32]) -> Vec<Range<u64>> {
    let everything = vec![0..u64::MAX; 1];
    if words[1] & CAPS == 0 {
        return everything;
    }
    // Offsets are relative to the structure's first byte.
    let word = |offset: usize| words.get(offset / 4).copied();
    let mut offset = words[4] as usize;
    // The kernel's chains lead forward. If a chain has more links than its buffer has room for, it
    // is circular.
    for _ in 0..words.len() {
        if offset < 4 * HEAD {
            break;
        }
        // Each capability begins with its kind and version (16 bits each), and the offset of the
        // next one.
        let (Some(kind), Some(next)) = (word(offset), word(offset + 4)) else {
            break;
        };
        if kind & 0xffff == IOVA_RANGES {
            let count = word(offset + 8).unwrap_or(0) as usize;
            let long = |at| Some(u64::from(word(at)?) | u64::from(word(at + 4)?) << 32);
            let pairs = (0..count).map_while(|number| {
                let at = offset + 16 + 16 * number;
                Some(long(at)?..long(at + 8)?.saturating_add(1))
            });
            return pairs.collect();
        }
        offset = next as usize;
    }
    everything
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds a kernel's answer: another capability, of which only the head is read, then the
    /// ranges.
    fn answer(ranges: &[(u64, u64)]) -> Vec<u32> {
        let mut words = vec![0, CAPS, 0, 0, 24, 0];
        words.extend([3 | 1 << 16, 40, 65_535, 0]);
        words.extend([1 | 1 << 16, 0, ranges.len() as u32, 0]);
        for value in ranges.iter().flat_map(|(first, last)| [*first, *last]) {
            words.extend([value as u32, (value >> 32) as u32]);
        }
        words[0] = 4 * words.len() as u32;
        words
    }

    /// Behaves as `vfio_iommu_type1` does, also for a buffer that is too short.
    fn kernel(answer: &[u32]) -> impl Fn(&mut [u32]) -> io::Result<()> {
        move |words| {
            assert_eq!(words[0] as usize, 4 * words.len());
            if words.len() < answer.len() {
                words.copy_from_slice(&answer[..words.len()]);
                // The chain is left out.
                words[4] = 0;
            } else {
                words[..answer.len()].copy_from_slice(answer);
            }
            Ok(())
        }
    }

    #[test]
    fn what_the_iommu_translates_is_read_from_the_chain() {
        let answer = answer(&[(0, 0xfedf_ffff), (0xfef0_0000, 0x7f_ffff_ffff)]);
        let expected = [0..0xfee0_0000, 0xfef0_0000..0x80_0000_0000];
        assert_eq!(ranges_of(kernel(&answer)).unwrap(), expected);
        let old = [24, 1, 0, 0, 0, 0];
        assert_eq!(ranges_of(kernel(&old)).unwrap(), vec![0..u64::MAX; 1]);
    }

    #[test]
    fn a_chain_of_any_length_is_read() {
        let all: Vec<(u64, u64)> = (0..1000_u64)
            .map(|number| (number << 20, (number << 20) + 0xffff))
            .collect();
        let ranges = ranges_of(kernel(&answer(&all))).unwrap();
        assert_eq!(ranges.len(), 1000);
        assert_eq!(ranges[999], 999 << 20..(999 << 20) + 0x1_0000);
    }

    #[test]
    fn a_chain_that_leads_nowhere_is_none() {
        let everything = vec![0..u64::MAX; 1];
        for next in [24, 4, 4_000_000] {
            // The first capability points at itself, into the head, or behind the end.
            let words = [40, CAPS, 0, 0, 24, 0, 3, next, 0, 0];
            assert_eq!(parse(&words), everything, "{next}");
        }
    }
}
