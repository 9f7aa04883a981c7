//! Memory that changes while it is registered, and a device that reads it.
//!
//! # Safety
//! Each test maps its own memory, keeps only the address, and accesses the bytes by volatile
//! accesses while they are mapped. The device accesses the same bytes as another thread of the test
//! would.
#![expect(
    unsafe_code,
    reason = "maps, changes and unmaps raw memory; see the Safety section"
)]

use crate::endpoint::{Endpoint, Failure, Place, connected, open};
use mmu_notifier::{Va, VaRange};
use mmu_source::hook::Hook;
use mmu_source::kernel::Kernel;
use regcache::{Device, Options, RegCache};
use regcache_rdma::{Access, Rdma};
use sideway::ibverbs::device_context::DeviceContext;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::ptr::without_provenance_mut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use testkit::{Cap, require};

pub(crate) const PAGE: usize = 4096;

/// The source that reports changes to the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Nothing,
    Hook,
    Kernel,
}

/// A device, a cache over it, and a connection between two endpoints of this process.
pub(crate) struct Lab {
    pub(crate) context: Arc<DeviceContext>,
    pub(crate) device: Device<Rdma>,
    pub(crate) cache: RegCache<Rdma>,
    pub(crate) reader: Endpoint,
    _peer: Endpoint,
    /// The address of the page that the reader reads into.
    sink: usize,
    _hook: Option<Hook>,
    /// A source reports to every cache of this process. So a test without a source must not run at
    /// the same time as a test with one, and the tests take turns.
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Lab {
    /// Returns `None` and prints the reason on a machine without a device.
    pub(crate) fn new(source: Source) -> Option<Self> {
        Self::with(
            source,
            Access::LocalWrite | Access::RemoteRead | Access::RemoteWrite,
            Options::new(),
        )
    }

    pub(crate) fn with(source: Source, access: Access, options: Options) -> Option<Self> {
        if !require(Cap::Rdma)
            || (source == Source::Kernel && (!require(Cap::Kvm) || !require(Cap::Bpf)))
        {
            return None;
        }
        Some(Self::made(open().unwrap(), source, access, options))
    }

    /// Like [`new`](Self::new), over a given device.
    pub(crate) fn over(context: Arc<DeviceContext>, source: Source) -> Self {
        Self::made(
            context,
            source,
            Access::LocalWrite | Access::RemoteRead,
            Options::new(),
        )
    }

    fn made(context: Arc<DeviceContext>, source: Source, access: Access, options: Options) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let domain = context.alloc_pd().unwrap();
        let (reader, peer) = connected(&context, &domain).unwrap();
        // SAFETY: the tests use keys only for memory that they access by volatile accesses, and
        // wait for the device (see the module docs).
        let rdma = unsafe { Rdma::new(domain, access) }.unwrap();
        let options = match source {
            Source::Kernel => options.kernel(Kernel::start().unwrap()),
            _ => options,
        };
        let hook = (source == Source::Hook).then(|| Hook::install().unwrap());
        let device = Device::new(rdma, options);
        let cache = device.open(&mmu_source::current()).unwrap();
        let sink = map(1);
        Self {
            context,
            device,
            cache,
            reader,
            _peer: peer,
            sink,
            _hook: hook,
            _alone: alone,
        }
    }

    /// Returns the first byte at `address` as the device reads it, by the remote key of a new lease
    /// of `pages` pages.
    pub(crate) fn first_byte(&mut self, address: usize, pages: usize) -> Result<u8, Failure> {
        let lease = self.cache.get_owned(range(address, pages))?;
        let key = lease.get().handle().rkey();
        self.byte_by_key(address, key)
    }

    /// Returns the byte at `address` as the device reads it by a remote key.
    pub(crate) fn byte_by_key(&mut self, address: usize, key: u32) -> Result<u8, Failure> {
        let sink = self.cache.get(range(self.sink, 1))?;
        poke(self.sink, 0);
        let to = Place {
            address: self.sink as u64,
            key: sink.handle().lkey(),
        };
        // SAFETY: the sink belongs to this test, which waits in `read` for the transfer.
        unsafe {
            self.reader.read(
                to,
                Place {
                    address: address as u64,
                    key,
                },
                1,
            )
        }?;
        Ok(peek(self.sink))
    }
}

pub(crate) fn range(address: usize, pages: usize) -> VaRange {
    VaRange::covering(Va::new(address as u64), (pages * PAGE) as u64).unwrap()
}

/// Maps new pages at any address. They stay mapped until the test changes them.
pub(crate) fn map(pages: usize) -> usize {
    new_map(0, pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
}

/// Maps new pages over those at `address`.
pub(crate) fn map_over(address: usize, pages: usize) {
    new_map(
        address,
        pages,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
        -1,
    );
}

/// Maps the first pages of a file, shared.
pub(crate) fn map_file(file: &File, pages: usize) -> usize {
    new_map(0, pages, libc::MAP_SHARED, file.as_raw_fd())
}

/// Maps pages through libc, because `hook` sees only changes that go through libc.
fn new_map(address: usize, pages: usize, flags: i32, file: i32) -> usize {
    let (access, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        flags | libc::MAP_POPULATE,
    );
    // SAFETY: the test owns the pages that the mapping replaces, if any.
    let start = unsafe {
        libc::mmap(
            without_provenance_mut(address),
            pages * PAGE,
            access,
            flags,
            file,
            0,
        )
    };
    assert_ne!(
        start,
        libc::MAP_FAILED,
        "{}",
        std::io::Error::last_os_error()
    );
    start.expose_provenance()
}

pub(crate) fn unmap(address: usize, pages: usize) {
    // SAFETY: the pages belong to the test, which does not access them any more.
    let result =
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(address), pages * PAGE) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

pub(crate) fn advise(address: usize, pages: usize, advice: i32) {
    // SAFETY: the test owns the pages and uses only volatile accesses.
    let result = unsafe {
        libc::madvise(
            std::ptr::with_exposed_provenance_mut(address),
            pages * PAGE,
            advice,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Moves the pages at `from` over those at `to`.
pub(crate) fn move_over(from: usize, to: usize, pages: usize) {
    let (flags, len) = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, pages * PAGE);
    let (from, to) = (
        std::ptr::with_exposed_provenance_mut::<libc::c_void>(from),
        without_provenance_mut::<libc::c_void>(to),
    );
    // SAFETY: the test owns both ranges.
    let moved = unsafe { libc::mremap(from, len, len, flags, to) };
    assert_ne!(
        moved,
        libc::MAP_FAILED,
        "{}",
        std::io::Error::last_os_error()
    );
}

pub(crate) fn poke(address: usize, value: u8) {
    // SAFETY: the byte is in the test's own memory, which is mapped.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(address).write_volatile(value) };
}

pub(crate) fn peek(address: usize) -> u8 {
    // SAFETY: the byte is in the test's own memory, which is mapped.
    unsafe { std::ptr::with_exposed_provenance::<u8>(address).read_volatile() }
}

/// Runs `act` while a child of this process shares all its pages.
pub(crate) fn with_child(act: impl FnOnce()) {
    // SAFETY: the child of `fork` only waits, in a system call, until it is killed.
    let child = unsafe { libc::fork() };
    assert_ne!(child, -1);
    if child == 0 {
        loop {
            // SAFETY: the call has no preconditions.
            unsafe { libc::pause() };
        }
    }
    act();
    // SAFETY: the child is not reaped yet.
    assert_eq!(unsafe { libc::kill(child, libc::SIGKILL) }, 0);
    // SAFETY: the status pointer may be null.
    let reaped = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    assert_eq!(reaped, child);
}

/// Returns a command that runs one test of this program in a new process. A forked child could
/// hang, because at the fork a thread of another test may hold a lock of libibverbs.
pub(crate) fn child(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "");
    command
}

/// Tells whether this process was started by the command of [`child`].
pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

const CHILD: &str = "REGCACHE_RDMA_CHILD";
