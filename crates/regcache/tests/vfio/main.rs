//! A device driven through VFIO. Run by `cargo xtask guest`, whose machine has an IOMMU and QEMU's
//! teaching device, which copies memory.
//!
//! # Safety
//! Each test maps its own memory and refers to it by address only. The test accesses the bytes by
//! volatile reads and writes, while they are mapped. The device accesses the same bytes as another
//! thread would, and the test waits until the device has finished.
#![expect(
    unsafe_code,
    reason = "maps, changes and unmaps raw memory; see the Safety section"
)]

mod edu;

use edu::Edu;
use mmu_notifier::{Va, VaRange};
use mmu_source::hook::Hook;
use mmu_source::kernel::Kernel;
use regcache::{Device, DmaAccess, Error, Options, RegCache, Vfio};
use rustix::param::page_size;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{null_mut, with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use testkit::{Cap, in_child, require};

const OLD: u8 = b'o';
const NEW: u8 = b'n';

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Nothing,
    Hook,
    Kernel,
}

/// A device, and a cache for it.
struct Lab {
    cache: RegCache<Vfio>,
    _device: Device<Vfio>,
    edu: Edu,
    /// The address of the page that the device copies to.
    sink: usize,
    _hook: Option<Hook>,
    /// The sources report to every cache of this process, and only one test can use the device. So
    /// the tests take turns.
    _alone: MutexGuard<'static, ()>,
}

/// To this address and those after it the devices send their interrupts, so the IOMMU leaves them
/// out.
const INTERRUPTS: u64 = if cfg!(target_arch = "aarch64") {
    0x800_0000
} else {
    0xfee0_0000
};

static ALONE: Mutex<()> = Mutex::new(());

impl Lab {
    /// Returns `None` and prints the reason on a machine without the device.
    fn new(source: Source) -> Option<Self> {
        // These addresses are the upper half of the device's 28-bit address space.
        Self::with(source, 0x800_0000..0x1000_0000, DmaAccess::ReadWrite)
    }

    fn with(source: Source, addresses: std::ops::Range<u64>, access: DmaAccess) -> Option<Self> {
        if !require(Cap::Vfio)
            || (source == Source::Kernel && (!require(Cap::Kvm) || !require(Cap::Bpf)))
        {
            return None;
        }
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let edu = Edu::open().unwrap();
        // SAFETY: the device uses an address only while its lease lasts, and a test accesses the
        // bytes only after it has waited for the device.
        let vfio = unsafe { Vfio::new(edu.container(), addresses, access) }.unwrap();
        let options = match source {
            Source::Kernel => Options::new().kernel(Kernel::start().unwrap()),
            _ => Options::new(),
        };
        let hook = (source == Source::Hook).then(|| Hook::install().unwrap());
        let device = Device::new(vfio, options);
        Some(Self {
            cache: device.open(&mmu_source::current()).unwrap(),
            _device: device,
            edu,
            sink: map(None, None),
            _hook: hook,
            _alone: alone,
        })
    }

    /// Returns the byte that the device reads at `address`, through a lease.
    fn byte(&self, address: usize) -> u8 {
        let from = self.cache.get(page(address)).unwrap();
        let to = self.cache.get(page(self.sink)).unwrap();
        poke(self.sink, 0);
        let place = |address: usize| Va::new(address as u64);
        self.edu.copy(
            from.handle().iova(place(address)).unwrap(),
            to.handle().iova(place(self.sink)).unwrap(),
        );
        peek(self.sink)
    }
}

fn page(address: usize) -> VaRange {
    VaRange::covering(Va::new(address as u64), page_size() as u64).unwrap()
}

/// Maps a new page, or replaces the page at an address. This function calls libc, because `hook`
/// sees only changes that go through libc.
fn map(over: Option<usize>, file: Option<&File>) -> usize {
    let at = over.map_or(null_mut(), with_exposed_provenance_mut);
    let mut flags = file.map_or(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, |_| {
        libc::MAP_SHARED
    });
    if over.is_some() {
        flags |= libc::MAP_FIXED;
    }
    let (access, file) = (
        libc::PROT_READ | libc::PROT_WRITE,
        file.map_or(-1, AsRawFd::as_raw_fd),
    );
    // SAFETY: a page that is replaced belongs to the test.
    let start = unsafe { libc::mmap(at, page_size(), access, flags, file, 0) };
    assert_ne!(
        start,
        libc::MAP_FAILED,
        "{}",
        std::io::Error::last_os_error()
    );
    start.expose_provenance()
}

fn unmap(address: usize) {
    // SAFETY: the page belongs to the test.
    let result = unsafe { libc::munmap(with_exposed_provenance_mut(address), page_size()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn poke(address: usize, value: u8) {
    // SAFETY: the byte belongs to the test's own memory, which is mapped.
    unsafe { with_exposed_provenance_mut::<u8>(address).write_volatile(value) };
}

fn peek(address: usize) -> u8 {
    // SAFETY: the byte belongs to the test's own memory, which is mapped.
    unsafe { with_exposed_provenance::<u8>(address).read_volatile() }
}

/// Makes a file of one page in memory.
fn file() -> File {
    // SAFETY: the call takes a C string and flags.
    let number = unsafe { libc::memfd_create(c"vfio".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(number >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and has no other owner.
    let file = unsafe { File::from_raw_fd(number) };
    file.set_len(page_size() as u64).unwrap();
    file
}

/// The device reads a page that holds `OLD`. Then the page changes to `NEW`, and the device reads
/// again.
///
/// Since Linux 7.0 the kernel can skip the program of the source `kernel`. The source reports that
/// as a loss within a second, and the device reads once more then.
fn seen(source: Source, make: impl Fn() -> (usize, Box<dyn FnOnce()>)) -> Option<u8> {
    let lab = Lab::new(source)?;
    let (address, change) = make();
    poke(address, OLD);
    assert_eq!(lab.byte(address), OLD);
    let lost = lab.cache.stats().lost;
    change();
    poke(address, NEW);
    let found = lab.byte(address);
    let may_skip = source == Source::Kernel && mmu_source::kernel::probe().unwrap().may_skip;
    if found == NEW || !may_skip {
        return Some(found);
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while lab.cache.stats().lost == lost {
        assert!(Instant::now() < deadline, "stale, and no loss is reported");
        std::thread::sleep(Duration::from_millis(10));
    }
    Some(lab.byte(address))
}

#[test]
fn without_a_source_the_device_reads_stale_pages_and_with_one_it_does_not() {
    let mapped_anew = || -> (usize, Box<dyn FnOnce()>) {
        let address = map(None, None);
        let change = move || {
            unmap(address);
            map(Some(address), None);
        };
        (address, Box::new(change))
    };
    let truncated = || -> (usize, Box<dyn FnOnce()>) {
        let file = file();
        let address = map(None, Some(&file));
        let change = move || {
            assert!(in_child(|| file.set_len(0).is_ok()));
            file.set_len(page_size() as u64).unwrap();
        };
        (address, Box::new(change))
    };
    let all = [Source::Nothing, Source::Hook, Source::Kernel];
    for (source, expected) in all.into_iter().zip([OLD, NEW, NEW]) {
        let Some(found) = seen(source, mapped_anew) else {
            return;
        };
        assert_eq!(found, expected, "mapped anew, {source:?}");
    }
    // A change by another process does not go through the libc of this one.
    for (source, expected) in all.into_iter().zip([OLD, OLD, NEW]) {
        let Some(found) = seen(source, truncated) else {
            return;
        };
        assert_eq!(found, expected, "truncated by another process, {source:?}");
    }
}

#[test]
fn addresses_that_are_all_given_out_are_a_limit_and_come_back() {
    // Room for the sink and one more page.
    let two = 0xc00_0000..0xc00_0000 + 2 * page_size() as u64;
    let Some(lab) = Lab::with(Source::Nothing, two, DmaAccess::ReadWrite) else {
        return;
    };
    let (one, other) = (map(None, None), map(None, None));
    for (address, value) in [(one, b'1'), (other, b'2'), (one, b'3')] {
        poke(address, value);
        assert_eq!(lab.byte(address), value);
    }
    assert!(lab.cache.stats().evicted >= 2, "{}", lab.cache.stats());
    let held = [one, other].map(|address| lab.cache.get_owned(page(address)).unwrap());
    let error = lab.cache.get(page(lab.sink)).unwrap_err();
    assert!(matches!(error, Error::LimitReached { .. }), "{error:?}");
    drop(held);
    assert_eq!(lab.byte(one), b'3');
}

#[test]
fn memory_that_is_not_mapped_or_not_for_writing_is_named() {
    let Some(lab) = Lab::new(Source::Nothing) else {
        return;
    };
    let gone = map(None, None);
    unmap(gone);
    let error = lab.cache.get(page(gone)).unwrap_err();
    assert!(matches!(error, Error::NotMapped { .. }), "{error:?}");
    // The program's own code, which is not writable.
    let code = page(page as *const () as usize & !(page_size() - 1));
    let error = lab.cache.get(code).unwrap_err();
    assert!(matches!(error, Error::NotMapped { .. }), "{error:?}");
    // The code can be registered for devices that only read. That needs another registrar, which
    // uses the same container.
    let addresses = 0x400_0000..0x800_0000;
    // SAFETY: the device does not use this registrar's addresses.
    let reading = unsafe { Vfio::new(lab.edu.container(), addresses, DmaAccess::Read) }.unwrap();
    let device = Device::new(reading, Options::new());
    let cache = device.open(&mmu_source::current()).unwrap();
    let lease = cache.get(code).unwrap();
    let first = Va::new(code.start().get());
    assert_eq!(lease.handle().iova(first), Some(0x400_0000));
    assert_eq!(lease.handle().iova(Va::new(first.get() - 1)), None);
}

#[test]
fn addresses_that_the_iommu_leaves_out_are_refused() {
    let Some(lab) = Lab::new(Source::Nothing) else {
        return;
    };
    let interrupts = INTERRUPTS..INTERRUPTS + page_size() as u64;
    // SAFETY: no region is registered, so the device uses no address of this registrar.
    let refused = unsafe { Vfio::new(lab.edu.container(), interrupts, DmaAccess::Read) };
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("reserved_regions")
    );
    // SAFETY: no region is registered, so the device uses no address of this registrar.
    let odd = unsafe { Vfio::new(lab.edu.container(), 1..0x1000, DmaAccess::Read) };
    assert_eq!(odd.unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
}
