//! Memory for devices that the program drives itself, through VFIO.
//!
//! # Safety
//! The system calls get pointers to locals that outlive the call, with their lengths in `argsz`.
//! The kernel checks the user's addresses itself, and pins pages rather than trusting them to stay.

use crate::{Cause, Registrar};
use mmu_notifier::{Va, VaRange};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::param::page_size;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// Maps memory for the devices of a VFIO container, at addresses that it chooses.
///
/// A device behind an IOMMU reaches memory by *I/O virtual addresses*. The handle of a region says
/// which ones are the region's: [`DmaMapping::iova`]. Works with any container of type 1, among
/// them `VfioContainer` of the crate `vfio-ioctls` (by `BorrowedFd::borrow_raw`): it keeps a
/// descriptor of its own and leaves groups and devices alone.
///
/// It does not deregister in callbacks. Until the next miss, `reap`, `flush` or end of a lease, a
/// device that still uses the addresses of a region that is not leased reaches the old, pinned
/// pages; afterwards the IOMMU refuses the device, which calls that a DMA error.
///
/// # Limits
/// * Mapped memory counts against `RLIMIT_MEMLOCK`; a container has room for 65,535 regions
///   (`dma_entry_limit` of `vfio_iommu_type1`). The cache evicts what is not leased, and tries once
///   more.
/// * `/dev/iommu` is not spoken to; a container of its compatibility mode (`VFIO_CONTAINER` of
///   iommufd) is served like any other.
/// * The first fit is taken, so a search takes time in the number of gaps. Linux before 5.4 does
///   not say which addresses an IOMMU cannot translate: there, `addresses` must leave them out.
#[derive(Debug)]
pub struct Vfio {
    container: OwnedFd,
    access: DmaAccess,
    /// The gaps: first address, and the length.
    free: Mutex<BTreeMap<u64, u64>>,
}

/// What the devices of a [`Vfio`] may do with registered memory.
///
/// Part of the cache's identity, because a region is found by its range alone: memory that devices
/// must not write needs a [`Device`](crate::Device) of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DmaAccess {
    /// They read it.
    Read,
    /// They read and write it: it must be mapped for writing.
    ReadWrite,
}

/// Where the devices find a region. From [`Vfio`].
#[derive(Debug)]
pub struct DmaMapping {
    /// The region, in the kernel's pages.
    memory: Range<u64>,
    /// Where it begins for the devices.
    iova: u64,
}

impl DmaMapping {
    /// Returns the I/O virtual address of a byte, or `None` if the region does not have it.
    #[must_use]
    pub fn iova(&self, address: Va) -> Option<u64> {
        let is_inside = self.memory.contains(&address.get());
        is_inside.then(|| self.iova + (address.get() - self.memory.start))
    }

    fn size(&self) -> u64 {
        self.memory.end - self.memory.start
    }
}

/// `struct vfio_iommu_type1_dma_map`.
#[repr(C)]
struct Map {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// `struct vfio_iommu_type1_dma_unmap`.
#[repr(C)]
struct Unmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// `struct vfio_iommu_type1_info`, with room for its chain of capabilities.
#[repr(C)]
struct Info {
    argsz: u32,
    flags: u32,
    iova_pgsizes: u64,
    cap_offset: u32,
    pad: u32,
    /// Each begins with its kind and version (16 bits each), and the offset of the next.
    caps: [u32; 1024],
}

const GET_INFO: Opcode = opcode::none(b';', 112);
const MAP_DMA: Opcode = opcode::none(b';', 113);
const UNMAP_DMA: Opcode = opcode::none(b';', 114);

const READ: u32 = 1;
const WRITE: u32 = 2;
/// Whether there is a chain of capabilities.
const INFO_CAPS: u32 = 2;
/// The capability that lists what the IOMMU translates: a count, a reserved word, and pairs of the
/// first address and the last.
const CAP_IOVA_RANGES: u32 = 1;

/// Makes a control call.
///
/// # Safety
/// `CALL` must take a pointer to a `T`, with the length in its `argsz`, of which any bytes that the
/// kernel writes are a value. What it does to memory must be allowed.
unsafe fn control<const CALL: Opcode, T>(
    container: &OwnedFd,
    argument: &mut T,
) -> Result<(), Errno> {
    // SAFETY: the caller's duty.
    let call = unsafe { Updater::<CALL, T>::new(argument) };
    // SAFETY: the caller's duty.
    unsafe { ioctl(container, call) }
}

impl Vfio {
    /// A registrar for the devices of `container`, which uses I/O virtual addresses out of
    /// `addresses`, except those that the IOMMU cannot translate.
    ///
    /// The devices must be able to send `addresses`: many know 32 bits or fewer. No other code may
    /// map anything there.
    ///
    /// # Safety
    /// A device reads and writes the memory of leased regions behind the compiler's back. The
    /// caller must have it use an address only while the lease lasts, and only for bytes that
    /// nothing in this process reads or writes at the same time. A transfer into the memory needs
    /// bytes that may be written: not those behind a shared reference.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) if `addresses` is empty or not of whole pages,
    /// or if the IOMMU translates none of them. `ENOTTY` or `EINVAL` for a descriptor that is no
    /// container of type 1, or has no group yet.
    ///
    /// # Source
    /// `VFIO_IOMMU_MAP_DMA`, include/uapi/linux/vfio.h.
    pub unsafe fn new(
        container: impl AsFd,
        addresses: Range<u64>,
        access: DmaAccess,
    ) -> io::Result<Self> {
        let size = page_size() as u64;
        if addresses.is_empty() || addresses.start % size != 0 || addresses.end % size != 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "I/O virtual addresses must be whole pages, and one at least",
            ));
        }
        let container = container.as_fd().try_clone_to_owned()?;
        let mut info = Info {
            argsz: size_of::<Info>() as u32,
            flags: 0,
            iova_pgsizes: 0,
            cap_offset: 0,
            pad: 0,
            caps: [0; 1024],
        };
        // SAFETY: the call fills in as much of a `struct vfio_iommu_type1_info` as `argsz` says,
        // and any bytes are a value of it.
        unsafe { control::<GET_INFO, _>(&container, &mut info) }?;
        let free: BTreeMap<u64, u64> = info
            .translated()
            .into_iter()
            .filter_map(|range| {
                let (start, end) = (
                    range.start.max(addresses.start).next_multiple_of(size),
                    range.end.min(addresses.end) / size * size,
                );
                (start < end).then(|| (start, end - start))
            })
            .collect();
        if free.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the IOMMU translates none of these addresses; /sys/kernel/iommu_groups/*/reserved_regions shows what it leaves out",
            ));
        }
        Ok(Self {
            container,
            access,
            free: Mutex::new(free),
        })
    }

    /// Takes the first gap that is large enough, or its beginning.
    fn take(&self, size: u64) -> Option<u64> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (&start, &length) = free.iter().find(|(_, length)| **length >= size)?;
        free.remove(&start);
        if length > size {
            free.insert(start + size, length - size);
        }
        Some(start)
    }

    /// Gives addresses back, and joins what touches.
    fn give(&self, mut start: u64, mut size: u64) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(length) = free.remove(&(start + size)) {
            size += length;
        }
        let before = free.range(..start).next_back();
        let touches = before.filter(|(first, length)| **first + **length == start);
        if let Some((&first, &length)) = touches {
            (start, size) = (first, length + size);
        }
        free.insert(start, size);
    }
}

impl Info {
    /// The addresses that the IOMMU translates: all, if the kernel does not say.
    fn translated(&self) -> Vec<Range<u64>> {
        let everything = vec![0..u64::MAX; 1];
        if self.flags & INFO_CAPS == 0 {
            return everything;
        }
        // Offsets count from the structure's first byte.
        let word = |offset: usize| {
            let at = offset.checked_sub(std::mem::offset_of!(Self, caps))? / 4;
            self.caps.get(at).copied()
        };
        let mut offset = self.cap_offset as usize;
        // The kernel's chain leads forward; a longer one than there is room for is none.
        for _ in 0..self.caps.len() {
            let (Some(head), Some(next)) = (word(offset), word(offset + 4)) else {
                break;
            };
            if head & 0xffff == CAP_IOVA_RANGES {
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
}

impl Registrar for Vfio {
    type Handle = DmaMapping;
    type Error = io::Error;

    fn register(&self, range: VaRange) -> io::Result<DmaMapping> {
        let size = page_size() as u64;
        // The kernel's pages may be larger than a range's granules.
        let start = range.start().get() / size * size;
        // No mapping has the last address of all.
        let last = range.last().get() / size * size + (size - 1);
        let end = last.checked_add(1).ok_or(Errno::FAULT)?;
        let iova = self.take(end - start).ok_or(Errno::NOSPC)?;
        let mapping = DmaMapping {
            memory: start..end,
            iova,
        };
        let mut map = Map {
            argsz: size_of::<Map>() as u32,
            flags: match self.access {
                DmaAccess::Read => READ,
                DmaAccess::ReadWrite => READ | WRITE,
            },
            vaddr: start,
            iova,
            size: mapping.size(),
        };
        // SAFETY: the call reads a `struct vfio_iommu_type1_dma_map`; the kernel refuses memory
        // that is not mapped, or not for writing if the devices are to write, and pins the rest.
        // What the devices do with it is the duty of `new`'s caller.
        match unsafe { control::<MAP_DMA, _>(&self.container, &mut map) } {
            Ok(()) => Ok(mapping),
            Err(error) => {
                self.give(iova, mapping.size());
                Err(error.into())
            }
        }
    }

    fn deregister(&self, mapping: DmaMapping) {
        let size = mapping.size();
        let mut unmap = Unmap {
            argsz: size_of::<Unmap>() as u32,
            flags: 0,
            iova: mapping.iova,
            size,
        };
        // SAFETY: the call reads and writes a `struct vfio_iommu_type1_dma_unmap`.
        let unmapped = unsafe { control::<UNMAP_DMA, _>(&self.container, &mut unmap) };
        // When it returns, no device can use the addresses any more: they may be given out anew.
        // Where it fails they are not used again, and the mapping goes with the container.
        if unmapped.is_ok() && unmap.size == size {
            self.give(mapping.iova, size);
        }
    }

    fn cause(&self, error: &io::Error) -> Cause {
        match Errno::from_io_error(error) {
            Some(Errno::NOMEM | Errno::NOSPC) => Cause::Limit,
            Some(Errno::FAULT) => Cause::NotMapped,
            _ => Cause::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(gaps: &[(u64, u64)]) -> Vfio {
        Vfio {
            container: std::fs::File::open("/dev/null").unwrap().into(),
            access: DmaAccess::Read,
            free: Mutex::new(gaps.iter().copied().collect()),
        }
    }

    #[test]
    fn addresses_are_given_out_once_and_gaps_are_joined() {
        let vfio = over(&[(0x1000, 0x3000), (0x8000, 0x2000)]);
        let (one, two) = (vfio.take(0x1000), vfio.take(0x2000));
        assert_eq!((one, two), (Some(0x1000), Some(0x2000)));
        assert_eq!(vfio.take(0x4000), None);
        assert_eq!(vfio.take(0x2000), Some(0x8000));
        vfio.give(0x1000, 0x1000);
        vfio.give(0x8000, 0x2000);
        vfio.give(0x2000, 0x2000);
        let gaps: Vec<_> = vfio.free.lock().unwrap().clone().into_iter().collect();
        assert_eq!(gaps, [(0x1000, 0x3000), (0x8000, 0x2000)]);
    }

    #[test]
    fn a_refused_registration_keeps_no_address() {
        // What is no container says `ENOTTY`.
        let vfio = over(&[(0, 0x1000)]);
        let range = VaRange::covering(Va::new(0x7000), 1).unwrap();
        for _ in 0..3 {
            assert_eq!(
                vfio.register(range).unwrap_err().raw_os_error(),
                Some(Errno::NOTTY.raw_os_error())
            );
        }
        let error = vfio.register(VaRange::ALL).unwrap_err();
        assert_eq!(vfio.cause(&error), Cause::NotMapped);
        assert_eq!(vfio.take(0x1000), Some(0));
    }

    #[test]
    fn what_the_iommu_translates_is_read_from_the_chain() {
        let mut info = Info {
            argsz: 0,
            flags: INFO_CAPS,
            iova_pgsizes: 0,
            cap_offset: 24,
            pad: 0,
            caps: [0; 1024],
        };
        // Another capability, of which only the head is read; then two ranges.
        info.caps[..3].copy_from_slice(&[3 | 1 << 16, 40, 65_535]);
        info.caps[4..8].copy_from_slice(&[1 | 1 << 16, 0, 2, 0]);
        info.caps[8..12].copy_from_slice(&[0, 0, 0xfedf_ffff, 0]);
        info.caps[12..16].copy_from_slice(&[0xfef0_0000, 0, u32::MAX, 0x7f]);
        let expected = [0..0xfee0_0000, 0xfef0_0000..0x80_0000_0000];
        assert_eq!(info.translated(), expected);
        info.flags = 0;
        let all = 0..u64::MAX;
        assert_eq!(info.translated(), vec![all; 1]);
    }
}
