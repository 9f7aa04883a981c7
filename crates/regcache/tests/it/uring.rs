//! The io_uring registrar, with transfers.

use io_uring::{IoUring, opcode, types};
use mmu_notifier::{Event, Va, VaRange};
use regcache::{Device, Error, Options, RegCache, Uring};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use testkit::{Cap, require};

const PAGE: usize = 4096;

/// A mapping that this value owns.
struct Pages(*mut u8, usize);

impl Pages {
    fn new(pages: usize) -> Self {
        let (access, kind) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: the kernel chooses an address where nothing is mapped.
        let place = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, access, kind, -1, 0) };
        assert_ne!(place, libc::MAP_FAILED);
        Self(place.cast(), pages)
    }

    fn range(&self) -> VaRange {
        VaRange::covering(Va::new(self.0.addr() as u64), (self.1 * PAGE) as u64).unwrap()
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: this value owns the mapping, whose pages the kernel has zeroed. `replace` and the
        // transfers run only while no slice of these bytes is in use.
        unsafe { std::slice::from_raw_parts(self.0, self.1 * PAGE) }
    }

    /// Replaces the memory by new zeroed memory.
    fn replace(&self) {
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: this value owns the range, and no code has a reference to it.
        let place = unsafe {
            libc::mmap(
                self.0.cast(),
                self.1 * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                kind,
                -1,
                0,
            )
        };
        assert_eq!(place.cast(), self.0);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping.
        unsafe { libc::munmap(self.0.cast(), self.1 * PAGE) };
    }
}

fn ring() -> (IoUring, Device<Uring>, RegCache<Uring>) {
    let ring = IoUring::new(8).unwrap();
    let device = Device::new(Uring::new(&ring, 8).unwrap(), Options::new().max_regions(8));
    let cache = device.open(&mmu_source::current()).unwrap();
    (ring, device, cache)
}

/// Makes a file of `pages` pages filled with `byte`.
fn file(pages: usize, byte: u8) -> File {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"uring".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the descriptor is new and has no other owner.
    let mut file: File = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) };
    file.write_all(&vec![byte; pages * PAGE]).unwrap();
    file
}

/// Reads into a buffer, through a lease.
fn read(ring: &mut IoUring, cache: &RegCache<Uring>, file: &File, buffer: &Pages) -> i32 {
    let lease = cache.get(buffer.range()).unwrap();
    let len = (buffer.1 * PAGE) as u32;
    let read = opcode::ReadFixed::new(
        types::Fd(file.as_raw_fd()),
        buffer.0,
        len,
        lease.buf_index(),
    )
    .offset(0);
    // SAFETY: the buffer and the lease live until the request has completed, below.
    unsafe { ring.submission().push(&read.build()).unwrap() };
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().unwrap().result()
}

#[test]
fn transfers_go_through_the_slot_of_the_lease() {
    if !require(Cap::IoUring) {
        return;
    }
    let (mut ring, device, cache) = ring();
    let buffers = [Pages::new(1), Pages::new(3), Pages::new(32)];
    for round in 1..4 {
        for buffer in &buffers {
            assert_eq!(
                read(&mut ring, &cache, &file(32, round), buffer),
                (buffer.1 * PAGE) as i32
            );
            assert!(buffer.bytes().iter().all(|byte| *byte == round));
        }
    }
    assert_eq!((cache.stats().registered, cache.stats().hits), (3, 6));
    drop(cache);
    device.synchronize().unwrap();
}

#[test]
fn what_was_remapped_is_registered_afresh() {
    if !require(Cap::IoUring) {
        return;
    }
    let (mut ring, _device, cache) = ring();
    let buffer = Pages::new(4);
    read(&mut ring, &cache, &file(4, 7), &buffer);
    mmu_source::current().with_invalidation(buffer.range(), Event::Unmap, |_| {
        assert_eq!(
            cache.stats().regions,
            0,
            "deregistered before the memory goes away"
        );
        buffer.replace();
    });
    assert_eq!(buffer.bytes()[0], 0);
    read(&mut ring, &cache, &file(4, 8), &buffer);
    assert!(
        buffer.bytes().iter().all(|byte| *byte == 8),
        "the data went to the new pages"
    );
}

#[test]
fn a_slot_is_not_used_again_while_its_lease_lasts() {
    if !require(Cap::IoUring) {
        return;
    }
    let (_ring, _device, cache) = ring();
    let buffers: Vec<_> = (0..9).map(|_| Pages::new(1)).collect();
    let leases: Vec<_> = buffers[..8]
        .iter()
        .map(|buffer| cache.get(buffer.range()).unwrap())
        .collect();
    cache.flush();
    let mut slots: Vec<_> = leases.iter().map(|lease| lease.buf_index()).collect();
    slots.sort_unstable();
    assert_eq!(slots, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert!(matches!(
        cache.get(buffers[8].range()),
        Err(Error::Full { regions: 8, .. })
    ));
    let mut leases = leases.into_iter();
    let freed = leases.next().map(|lease| lease.buf_index());
    assert_eq!(
        cache
            .get_owned(buffers[8].range())
            .ok()
            .map(|lease| lease.buf_index()),
        freed
    );
}

#[test]
fn errors_say_what_is_wrong_with_the_range() {
    if !require(Cap::IoUring) {
        return;
    }
    let (_ring, _device, cache) = ring();
    // Neither the kernel by itself nor another test maps memory at this address.
    let unmapped = VaRange::covering(Va::new(0x1000_0000_0000), 2).unwrap();
    assert!(matches!(cache.get(unmapped), Err(Error::NotMapped { .. })));
    let huge = VaRange::covering(Va::new(0x1000_0000_0000), (1 << 30) + 1).unwrap();
    assert!(matches!(cache.get(huge), Err(Error::Registrar { .. })));
    assert_eq!(cache.stats().regions, 0);
}

/// Returns the descriptors of rings that this process has open.
fn rings() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let is_ring = |entry: &std::fs::DirEntry| {
        std::fs::read_link(entry.path()).is_ok_and(|to| to.ends_with("anon_inode:[io_uring]"))
    };
    entries
        .filter(is_ring)
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Replaces the registrar's descriptor by `other`, or closes it if `other` is negative. Tells
/// whether the registrar notices that and does not touch `other`.
fn leaves_alone(other: i32) -> bool {
    let before = rings();
    let (_ring, device, cache) = ring();
    let kept: Vec<i32> = rings()
        .into_iter()
        .filter(|number| !before.contains(number))
        .collect();
    let ours = kept.into_iter().max().unwrap();
    let (old, new) = (Pages::new(1), Pages::new(1));
    let lease = cache.get(old.range()).unwrap();
    if other < 0 {
        // SAFETY: the call takes an integer. It simulates a program that closes descriptors that
        // the program did not open, and `Uring` is made for that.
        unsafe { libc::close(ours) };
    } else {
        // SAFETY: the call takes integers. It simulates such a program too.
        assert_eq!(unsafe { libc::dup2(other, ours) }, ours);
    }
    let refused = cache
        .get(new.range())
        .expect_err("it is not the ring's any more");
    let refused = std::error::Error::source(&refused)
        .map(ToString::to_string)
        .unwrap_or_default();
    // No look-up may find the old registration, although the ring still has it.
    drop(mmu_source::current().invalidate(old.range(), Event::Unmap));
    let is_stale = lease.is_current() || cache.get(old.range()).is_ok();
    drop(lease);
    drop(cache);
    device.synchronize().unwrap();
    drop(device);
    // SAFETY: the call takes integers and has no preconditions.
    let is_open = unsafe { libc::fcntl(ours, libc::F_GETFD) } >= 0;
    refused.contains("make a new `Uring`") && !is_stale && is_open == (other >= 0)
}

#[test]
fn a_descriptor_that_is_not_the_rings_any_more_is_left_alone() {
    if !require(Cap::IoUring) {
        return;
    }
    // Each check runs in a child, because here the rings of other tests come and go.
    assert!(testkit::in_child(|| leaves_alone(-1)));
    assert!(testkit::in_child(|| leaves_alone(
        file(1, b'x').as_raw_fd()
    )));
    assert!(testkit::in_child(|| {
        let other = IoUring::new(8).unwrap();
        // If a buffer had been registered with the other ring, this call would be refused.
        leaves_alone(other.as_raw_fd()) && other.submitter().register_buffers_sparse(1).is_ok()
    }));
}
