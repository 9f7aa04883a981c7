//! A registrar for io_uring's fixed buffers.
//!
//! # Safety
//! The system calls get pointers to local variables that outlive the call, with their sizes. The
//! kernel checks the addresses of the buffers itself, and pins the pages.

use crate::{Cause, Lease, OwnedLease, Registrar};
use mmu_notifier::VaRange;
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::io_uring::{IoringRegisterOp, io_uring_register};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

/// Registers memory as fixed buffers of an io_uring, for `ReadFixed` and `WriteFixed`.
///
/// A `Uring` works with any ring, for example one of the `io-uring` crate (with its feature
/// `io_safety`, or by `BorrowedFd::borrow_raw`). A `Uring` keeps a descriptor of its own, and does
/// not touch the submission and completion queues. A `Uring` takes over the ring's table of
/// buffers: no other code may register buffers with the ring.
///
/// A lease must last until its requests have completed, because its slot in the table is reused for
/// another region afterwards. (The kernel itself keeps the pages of a request in progress.) A
/// `Uring` deregisters in callbacks.
///
/// # Limits
/// * A `Uring` needs one slot for each region, so limit the cache with
///   [`Options::max_regions`](crate::Options::max_regions).
/// * The kernel refuses a region of more than 1 GiB, and memory that it does not pin for long, such
///   as a shared mapping of a file on most file systems.
/// * A ring with `IORING_SETUP_SINGLE_ISSUER` lets only one thread change the table, so regions
///   that other threads invalidate stay registered.
/// * A `Uring` needs Linux 5.19.
///
/// If the program closes descriptors that it did not open (`close_range`, `dup2`), it also closes
/// the registrar's descriptor. From then on, registering fails with an error that names this cause.
/// If the descriptor's number now refers to another file, the registrar does not touch that file.
/// Regions stay registered until the ring ends.
///
/// # Examples
/// ```
/// use io_uring::{IoUring, opcode, types};
/// use regcache::{Device, Options, Uring};
/// use std::os::fd::AsRawFd;
///
/// let mut ring = IoUring::new(8)?;
/// let device = Device::new(Uring::new(&ring, 64)?, Options::new().max_regions(64));
/// let cache = device.open(&mmu_source::current())?;
///
/// let file = std::fs::File::open("/proc/self/exe")?;
/// let mut buffer = vec![0_u8; 4];
/// let lease = cache.get_for(&buffer)?;
/// let read = opcode::ReadFixed::new(types::Fd(file.as_raw_fd()), buffer.as_mut_ptr(), 4, lease.buf_index());
/// // SAFETY: The buffer and the lease live until the request has completed.
/// unsafe { ring.submission().push(&read.build())? };
/// ring.submit_and_wait(1)?;
/// assert_eq!(ring.completion().next().map(|entry| entry.result()), Some(4));
/// drop(lease);
/// assert_eq!(buffer, b"\x7fELF");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Uring {
    ring: Ring,
    /// The free slots. The vector has room for all of them, so neither taking nor returning a slot
    /// allocates.
    free: Mutex<Vec<u16>>,
}

/// A descriptor of the ring in the program's table, where the program can close or replace it. The
/// descriptor is not in a separate descriptor table: a ring may accept registrations from one
/// thread only, and callbacks must not wait for another thread.
#[derive(Debug)]
struct Ring {
    file: ManuallyDrop<File>,
    /// The device and the inode. Each ring has an inode of its own, so no other file has the same
    /// pair.
    identity: [u64; 2],
}

impl Ring {
    fn new(ring: impl AsFd) -> io::Result<Self> {
        let file = File::from(fcntl_dupfd_cloexec(ring, 0)?);
        let identity = Self::identity(&file)?;
        Ok(Self {
            file: ManuallyDrop::new(file),
            identity,
        })
    }

    fn identity(file: &File) -> io::Result<[u64; 2]> {
        file.metadata()
            .map(|metadata| [metadata.dev(), metadata.ino()])
    }

    /// Returns the descriptor if it still refers to the ring.
    fn get(&self) -> Option<&File> {
        let is_ours = Self::identity(&self.file).is_ok_and(|identity| identity == self.identity);
        is_ours.then_some(&self.file)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.get().is_some() {
            // SAFETY: the file must not be used afterwards. `self` owns the file and is being
            // dropped.
            unsafe { ManuallyDrop::drop(&mut self.file) }
        }
    }
}

/// The slot of a fixed buffer in its ring's table. From [`Uring`].
#[derive(Debug)]
pub struct FixedBuffer {
    index: u16,
}

impl FixedBuffer {
    /// Returns the `buf_index` for `ReadFixed` and `WriteFixed`.
    #[must_use]
    pub fn buf_index(&self) -> u16 {
        self.index
    }
}

impl Lease<'_, Uring> {
    /// Returns the `buf_index` for `ReadFixed` and `WriteFixed`. A request may use any addresses
    /// within the region.
    #[must_use]
    #[inline]
    pub fn buf_index(&self) -> u16 {
        self.handle().index
    }
}

impl OwnedLease<Uring> {
    /// Returns the `buf_index` for `ReadFixed` and `WriteFixed`.
    #[must_use]
    pub fn buf_index(&self) -> u16 {
        self.get().buf_index()
    }
}

/// `struct iovec`.
#[repr(C)]
struct Iovec {
    base: u64,
    len: u64,
}

/// `struct io_uring_rsrc_register`.
#[repr(C)]
#[derive(Default)]
struct Register {
    nr: u32,
    flags: u32,
    resv2: u64,
    data: u64,
    tags: u64,
}

/// `struct io_uring_rsrc_update2`.
#[repr(C)]
#[derive(Default)]
struct Update {
    offset: u32,
    resv: u32,
    data: u64,
    tags: u64,
    nr: u32,
    resv2: u32,
}

/// The message if the descriptor does not refer to the ring any more.
const LOST: &str = "the program has closed the descriptor that `Uring` keeps of the ring, or put another file in its place: \
    make a new `Uring`";

const SPARSE: u32 = 1;
const MOST_SLOTS: u16 = 1 << 14;
/// The size of the largest fixed buffer in bytes.
const LARGEST: u64 = 1 << 30;

/// Explains why the table could not be made.
fn not_made(error: Errno, slots: u16) -> io::Error {
    if error == Errno::INVAL && (1..=MOST_SLOTS).contains(&slots) {
        return io::Error::new(
            io::ErrorKind::Unsupported,
            "an empty table of buffers needs Linux 5.19",
        );
    }
    error.into()
}

impl Uring {
    /// Makes a registrar, and gives `ring` an empty table of `slots` buffers.
    ///
    /// # Errors
    /// The kernel's error: `EBUSY` if the ring already has a table, `EINVAL` for 0 slots or more
    /// than 2^14. [`Unsupported`](io::ErrorKind::Unsupported) before Linux 5.19.
    pub fn new(ring: impl AsFd, slots: u16) -> io::Result<Self> {
        let ring = Ring::new(ring)?;
        let table = Register {
            nr: slots.into(),
            flags: SPARSE,
            ..Register::default()
        };
        let (arg, size) = (
            (&raw const table).cast::<c_void>(),
            size_of::<Register>() as u32,
        );
        // SAFETY: the call reads a `struct io_uring_rsrc_register` of this size, which contains no
        // pointers.
        let made = unsafe {
            io_uring_register(&*ring.file, IoringRegisterOp::RegisterBuffers2, arg, size)
        };
        made.map_err(|error| not_made(error, slots))?;
        Ok(Self {
            ring,
            free: Mutex::new((0..slots).rev().collect()),
        })
    }

    /// Puts a buffer into a slot. An empty buffer empties the slot. Allocates nothing.
    fn update(&self, index: u16, buffer: &Iovec) -> io::Result<()> {
        let ring = self.ring.get().ok_or(Errno::BADF)?;
        let data = (&raw const *buffer).expose_provenance() as u64;
        let update = Update {
            offset: index.into(),
            data,
            nr: 1,
            ..Update::default()
        };
        let (arg, size) = (
            (&raw const update).cast::<c_void>(),
            size_of::<Update>() as u32,
        );
        // SAFETY: the call reads a `struct io_uring_rsrc_update2` of this size and one `struct
        // iovec`. Both are local variables that live until the call returns.
        unsafe { io_uring_register(ring, IoringRegisterOp::RegisterBuffersUpdate, arg, size) }?;
        Ok(())
    }

    /// Calls `f` with the list of free slots, under its lock. `f` only takes a slot or returns one:
    /// `deregister` runs in callbacks, which must not wait long for this lock.
    fn slots<T>(&self, f: impl FnOnce(&mut Vec<u16>) -> T) -> T {
        f(&mut self.free.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Registrar for Uring {
    type Handle = FixedBuffer;
    type Error = io::Error;

    fn register(&self, range: VaRange) -> io::Result<FixedBuffer> {
        let len = range.pages().saturating_mul(mmu_notifier::PAGE_SIZE);
        if len > LARGEST {
            return Err(Errno::TOOBIG.into());
        }
        let index = self.slots(Vec::pop).ok_or(Errno::NOBUFS)?;
        if let Err(error) = self.update(
            index,
            &Iovec {
                base: range.start().get(),
                len,
            },
        ) {
            self.slots(|free| free.push(index));
            return Err(if self.ring.get().is_none() {
                io::Error::other(LOST)
            } else {
                error
            });
        }
        Ok(FixedBuffer { index })
    }

    fn deregister(&self, buffer: FixedBuffer) {
        // If the kernel does not empty the slot, the slot is not used again, and its pages stay
        // pinned until the ring ends.
        if self
            .update(buffer.index, &Iovec { base: 0, len: 0 })
            .is_ok()
        {
            self.slots(|free| free.push(buffer.index));
        }
    }

    fn cause(&self, error: &io::Error) -> Cause {
        match Errno::from_io_error(error) {
            Some(Errno::NOMEM | Errno::NOBUFS) => Cause::Limit,
            Some(Errno::FAULT) => Cause::NotMapped,
            _ => Cause::Other,
        }
    }

    /// The system call takes no lock of this process, and the list of slots is locked only for a
    /// few instructions.
    fn deregisters_in_callbacks(&self) -> bool {
        true
    }
}
