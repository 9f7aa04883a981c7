//! The device: QEMU's `edu` (docs/specs/edu.txt of QEMU's sources). The device copies bytes from
//! memory into its own buffer and back. A copy takes 100 ms.
//!
//! # Safety
//! The ioctls get integers, open descriptors, and pointers to local variables that outlive the
//! call.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// `_IO(';', 100 + number)`.
const fn call(number: libc::c_ulong) -> libc::c_ulong {
    0x3b64 + number
}

const SET_IOMMU: libc::c_ulong = call(2);
const GROUP_SET_CONTAINER: libc::c_ulong = call(4);
const GROUP_GET_DEVICE: libc::c_ulong = call(6);
const REGION_INFO: libc::c_ulong = call(8);
const TYPE1_V2: libc::c_ulong = 3;

/// The regions of a PCI device: its registers and its configuration.
const REGISTERS: u32 = 0;
const CONFIGURATION: u32 = 7;

/// `struct vfio_region_info`.
#[repr(C)]
#[derive(Default)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

fn checked(answer: libc::c_int) -> io::Result<libc::c_int> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}

fn open(path: impl AsRef<Path>) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

pub(crate) struct Edu {
    // The fields are dropped in this order, because a container must outlive its devices.
    device: File,
    _group: File,
    container: File,
    registers: u64,
}

impl Edu {
    pub(crate) fn open() -> io::Result<Self> {
        let folder = testkit::edu().map_err(io::Error::other)?;
        let group = fs::canonicalize(folder.join("iommu_group"))?;
        let number = group.file_name().expect("a group has a number");
        let container = open("/dev/vfio/vfio")?;
        let group = open(Path::new("/dev/vfio").join(number))?;
        let descriptor = container.as_raw_fd();
        // SAFETY: the call reads one descriptor.
        checked(unsafe {
            libc::ioctl(
                group.as_raw_fd(),
                GROUP_SET_CONTAINER,
                &raw const descriptor,
            )
        })?;
        // SAFETY: the call takes an integer.
        checked(unsafe { libc::ioctl(container.as_raw_fd(), SET_IOMMU, TYPE1_V2) })?;
        let name = folder.file_name().expect("a device has a name");
        let name = std::ffi::CString::new(name.as_bytes())?;
        // SAFETY: the call reads a C string, and returns a descriptor.
        let device =
            checked(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE, name.as_ptr()) })?;
        // SAFETY: the descriptor is new and has no other owner.
        let device = unsafe { File::from_raw_fd(device) };
        let (registers, configuration) =
            (region(&device, REGISTERS)?, region(&device, CONFIGURATION)?);
        // Allow the device to respond, and to begin transfers itself.
        device.write_all_at(&6_u16.to_le_bytes(), configuration + 4)?;
        Ok(Self {
            device,
            _group: group,
            container,
            registers,
        })
    }

    pub(crate) fn container(&self) -> BorrowedFd<'_> {
        self.container.as_fd()
    }

    /// Makes the device copy one byte between two I/O virtual addresses, and waits until the device
    /// has done so.
    pub(crate) fn copy(&self, from: u64, to: u64) {
        const BUFFER: u64 = 0x40000;
        const RUN: u32 = 1;
        const TO_MEMORY: u32 = 2;
        self.transfer(from, BUFFER, RUN);
        self.transfer(BUFFER, to, RUN | TO_MEMORY);
    }

    fn transfer(&self, from: u64, to: u64, command: u32) {
        let (source, target, count, control) = (0x80, 0x88, 0x90, 0x98);
        for (register, value) in [
            (source, from as u32),
            (target, to as u32),
            (count, 1),
            (control, command),
        ] {
            let at = self.registers + register;
            self.device.write_all_at(&value.to_le_bytes(), at).unwrap();
        }
        let begin = Instant::now();
        let mut value = [0; 4];
        loop {
            let at = self.registers + control;
            self.device.read_exact_at(&mut value, at).unwrap();
            if u32::from_le_bytes(value) & 1 == 0 {
                return;
            }
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "the device hangs"
            );
            thread::yield_now();
        }
    }
}

/// Returns the offset of a region in the device's descriptor.
fn region(device: &File, index: u32) -> io::Result<u64> {
    let mut info = RegionInfo {
        argsz: size_of::<RegionInfo>() as u32,
        index,
        ..RegionInfo::default()
    };
    // SAFETY: the call writes a `struct vfio_region_info`.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), REGION_INFO, &raw mut info) })?;
    Ok(info.offset)
}
