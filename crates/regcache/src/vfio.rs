//! A registrar for devices that the program drives itself through VFIO.
//!
//! # Safety
//! The system calls get pointers to local variables that outlive the call, with their sizes in
//! `argsz`. The kernel checks the addresses of the memory itself, and pins the pages.

mod gaps;
mod info;

use crate::{Cause, Registrar};
use gaps::Gaps;
use mmu_notifier::{Va, VaRange};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::param::page_size;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

/// Maps memory for the devices of a VFIO container, and chooses the I/O virtual addresses.
///
/// A device behind an IOMMU accesses memory by *I/O virtual addresses*. The handle of a region
/// gives the region's addresses: [`DmaMapping::iova`]. A `Vfio` works with any container of type 1,
/// for example a `VfioContainer` of the crate `vfio-ioctls` (by `BorrowedFd::borrow_raw`). A `Vfio`
/// keeps a descriptor of its own, and does not touch groups and devices.
///
/// A `Vfio` does not deregister in callbacks. So after an invalidation, a region without a lease
/// stays mapped until the next miss, `reap`, `flush` or end of a lease. Until then, a device that
/// still uses the region's addresses accesses the old, pinned pages. Afterwards the IOMMU blocks
/// the access, and the device reports a DMA error.
///
/// # Limits
/// * Mapped memory counts against `RLIMIT_MEMLOCK`, and a container has room for 65,535 regions
///   (`dma_entry_limit` of `vfio_iommu_type1`). At a limit the cache evicts regions without a
///   lease, and tries once more.
/// * A `Vfio` does not support `/dev/iommu`. A container of iommufd's compatibility mode
///   (`VFIO_CONTAINER`) works.
/// * A `Vfio` takes the first gap that fits, so a search takes time in proportion to the number
///   of gaps. Before Linux 5.4 the kernel does not report which addresses an IOMMU cannot
///   translate, so `addresses` must exclude them there.
#[derive(Debug)]
pub struct Vfio {
    container: OwnedFd,
    access: DmaAccess,
    free: Gaps,
}

/// What the devices of a [`Vfio`] may do with registered memory.
///
/// The access is a property of the whole cache, because a cache finds a region by its range alone.
/// So memory that devices must not write needs a [`Device`](crate::Device) of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DmaAccess {
    /// The devices may read the memory.
    Read,
    /// The devices may read and write the memory, so it must be mapped as writable.
    ReadWrite,
}

/// The I/O virtual addresses of a region. From [`Vfio`].
#[derive(Debug)]
pub struct DmaMapping {
    /// The addresses of the region, rounded outwards to whole kernel pages.
    memory: Range<u64>,
    /// The I/O virtual address of the region's first byte.
    iova: u64,
}

impl DmaMapping {
    /// Returns the I/O virtual address of a byte, or `None` if the byte is outside the region.
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

const MAP_DMA: Opcode = opcode::none(b';', 113);
const UNMAP_DMA: Opcode = opcode::none(b';', 114);

const READ: u32 = 1;
const WRITE: u32 = 2;

/// Makes an ioctl.
///
/// # Safety
/// `CALL` must take a pointer to a `T` with the length in its `argsz`. Any bytes that the kernel
/// writes must be a valid `T`. The effect of the call on memory must be allowed.
unsafe fn control<const CALL: Opcode, T>(
    container: &OwnedFd,
    argument: &mut T,
) -> Result<(), Errno> {
    // SAFETY: `CALL` takes a pointer to a `T`, because the caller promises so (see # Safety).
    let call = unsafe { Updater::<CALL, T>::new(argument) };
    // SAFETY: the call has no forbidden effect on memory, because the caller promises so.
    unsafe { ioctl(container, call) }
}

impl Vfio {
    /// Makes a registrar for the devices of `container`. The registrar uses I/O virtual addresses
    /// from `addresses`, except those that the IOMMU cannot translate.
    ///
    /// The devices must be able to emit `addresses`: many devices have 32 address bits or fewer. No
    /// other code may map anything at these addresses.
    ///
    /// # Safety
    /// A device reads and writes the memory of leased regions, and the compiler does not know of
    /// these accesses. The caller must ensure that a device uses an address only while the lease
    /// lasts, and only for bytes that no code in this process reads or writes at the same time. A
    /// transfer into the memory also needs bytes that may be written, so not those behind a shared
    /// reference.
    ///
    /// # Errors
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) if `addresses` is empty or does not consist of
    /// whole pages, or if the IOMMU translates none of them. `ENOTTY` or `EINVAL` if the descriptor
    /// is not a container of type 1, or has no group yet.
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
        let mut free: Vec<(u64, u64)> = info::translated(&container)?
            .into_iter()
            .filter_map(|range| {
                let (start, end) = (
                    range.start.max(addresses.start).next_multiple_of(size),
                    range.end.min(addresses.end) / size * size,
                );
                (start < end).then(|| (start, end - start))
            })
            .collect();
        free.sort_unstable();
        if free.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the IOMMU translates none of these addresses; /sys/kernel/iommu_groups/*/reserved_regions shows what it leaves out",
            ));
        }
        Ok(Self {
            container,
            access,
            free: Gaps::new(free),
        })
    }
}

impl Registrar for Vfio {
    type Handle = DmaMapping;
    type Error = io::Error;

    fn register(&self, range: VaRange) -> io::Result<DmaMapping> {
        let size = page_size() as u64;
        // The kernel's pages may be larger than the range's granules.
        let start = range.start().get() / size * size;
        // The end of a mapping must fit in 64 bits. So the last page of the address space, which
        // no program can map, is refused.
        let last = range.last().get() / size * size + (size - 1);
        let end = last.checked_add(1).ok_or(Errno::FAULT)?;
        let iova = self.free.take(end - start).ok_or(Errno::NOSPC)?;
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
        // SAFETY: the call reads a `struct vfio_iommu_type1_dma_map`. The kernel refuses memory
        // that is not mapped, or not writable if the devices may write, and pins the rest. The
        // caller of `new` promises how the devices use it.
        match unsafe { control::<MAP_DMA, _>(&self.container, &mut map) } {
            Ok(()) => Ok(mapping),
            Err(error) => {
                self.free.give(iova, mapping.size());
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
        // If the call succeeds, no device can use the addresses any more, so they may be reused. If
        // the call fails, the addresses are not reused, and the mapping ends with the container.
        if unmapped.is_ok() && unmap.size == size {
            self.free.give(mapping.iova, size);
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

    #[test]
    fn a_refused_registration_keeps_no_address() {
        // A file that is not a container returns `ENOTTY`.
        let vfio = Vfio {
            container: std::fs::File::open("/dev/null").unwrap().into(),
            access: DmaAccess::Read,
            free: Gaps::new(vec![(0, 0x1000); 1]),
        };
        let range = VaRange::covering(Va::new(0x7000), 1).unwrap();
        for _ in 0..3 {
            assert_eq!(
                vfio.register(range).unwrap_err().raw_os_error(),
                Some(Errno::NOTTY.raw_os_error())
            );
        }
        let error = vfio.register(VaRange::ALL).unwrap_err();
        assert_eq!(vfio.cause(&error), Cause::NotMapped);
        assert_eq!(vfio.free.take(0x1000), Some(0));
    }
}
