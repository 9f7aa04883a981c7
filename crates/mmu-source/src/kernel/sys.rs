//! The system calls of the source: KVM, BPF, and the memory that is shared with the BPF program.
//!
//! # Safety
//! Of this source only this module, its submodules and the broker's `sys.rs` have unsafe code,
//! besides tests. The calls take integers, C strings, and pointers to memory of this module
//! together with the size of that memory. [`Shared`] owns a mapping until it is dropped. The words
//! of the mapping are available only as atomics, with a bounds check, because the BPF program may
//! write them at any time.

#![allow(
    unsafe_code,
    reason = "the one module of this source that makes raw system calls; see its Safety section"
)]

#[cfg(target_arch = "aarch64")]
#[path = "sys/aarch64.rs"]
mod machine;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[path = "sys/elsewhere.rs"]
mod machine;
#[cfg(target_arch = "x86_64")]
#[path = "sys/x86_64.rs"]
mod machine;

use crate::page;
use std::ffi::{CStr, c_ulong};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

mod bpf;

pub(super) use bpf::{
    Kind, Map, Object, attach, create_map, exists, load_program, missed_runs, number, run_program,
};

/// The tracepoint that KVM passes before it invalidates a range.
pub(super) const TRACEPOINT: &CStr = c"kvm_unmap_hva_range";

/// `_IO(KVMIO, 0x01)`.
const KVM_CREATE_VM: c_ulong = 0xae01;

/// The type of virtual machine. On aarch64 this is the number of bits of the guest's addresses: 0
/// stands for 40, which some processors do not have. Each has 32 (`KVM_VM_TYPE_ARM_IPA_SIZE`, Linux
/// 4.20).
const TYPE: usize = if cfg!(target_arch = "aarch64") { 32 } else { 0 };

/// Opens `/dev/kvm`.
pub(super) fn open_kvm() -> io::Result<OwnedFd> {
    // SAFETY: the path ends in a zero byte. The call returns a descriptor without an owner, or -1.
    owned(unsafe { libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) })
}

/// Makes a virtual machine of this process, which registers another MMU notifier on its address
/// space.
pub(super) fn create_vm(kvm: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the request takes an integer, the type of machine, and returns a new close-on-exec
    // descriptor, or -1.
    uninterrupted(|| owned(unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, TYPE) }))
}

/// Makes a system call that may fail with `EINTR`. If it does, blocks the thread's signals and
/// makes the call again, up to 1,000 times. Otherwise a timer with a period shorter than the call
/// would interrupt it each time.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let is_interrupted = |result: &io::Result<T>| {
        result
            .as_ref()
            .is_err_and(|error: &io::Error| error.kind() == io::ErrorKind::Interrupted)
    };
    let mut result = call();
    if !is_interrupted(&result) {
        return result;
    }
    srcu::without_signals(|| {
        // Work that the kernel queues for this thread, for example for io_uring, also interrupts
        // the call.
        for _ in 0..1000 {
            result = call();
            if !is_interrupted(&result) {
                break;
            }
        }
    });
    result
}

fn owned(descriptor: i32) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `from_raw_fd` needs an open descriptor without another owner. The kernel has just
    // made this one.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Discards `scratch`, a page without content, so that the kernel passes the tracepoint. The call
/// does not go through libc, because `hook` would report it to subscribers.
pub(super) fn ask(scratch: &Scratch) {
    // SAFETY: discards the content of a page that this source owns and no code reads or writes.
    let advise = |advice: i32| unsafe { machine::madvise(scratch.0.as_ptr(), page::size() as usize, advice) } == 0;
    // If the program has locked its memory, the kernel refuses `MADV_DONTNEED`.
    if !advise(libc::MADV_DONTNEED) {
        advise(MADV_DONTNEED_LOCKED);
    }
}

const MADV_DONTNEED_LOCKED: i32 = 24;

/// Maps a page of anonymous memory.
fn new_page(protection: i32) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses the address of the new mapping, so no existing memory changes.
    let base = unsafe {
        libc::mmap(
            ptr::null_mut(),
            page::size() as usize,
            protection,
            flags,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(NonNull::new(base.cast()).expect("mmap does not return null"))
}

/// The page that `ask` discards. No code reads or writes it.
#[derive(Debug)]
pub(super) struct Scratch(NonNull<u8>);

// SAFETY: no code reads or writes the page.
unsafe impl Send for Scratch {}
// SAFETY: no code reads or writes the page.
unsafe impl Sync for Scratch {}

impl Scratch {
    pub(super) fn map() -> io::Result<Self> {
        new_page(libc::PROT_NONE).map(Self)
    }

    pub(super) fn address(&self) -> u64 {
        self.0.addr().get() as u64
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: this value owns the page, and no reference points into it.
        unsafe { libc::munmap(self.0.as_ptr().cast(), page::size() as usize) };
    }
}

/// The content of one of the kernel's files. The file is mapped if the kernel supports that (Linux
/// 6.16), because a mapping is far faster, and read otherwise.
#[derive(Debug)]
pub(super) enum Whole {
    Mapped { base: NonNull<u8>, bytes: usize },
    Read(Vec<u8>),
}

impl Whole {
    pub(super) fn of(path: &str) -> io::Result<Self> {
        let file = std::fs::File::open(path)?;
        let bytes = file.metadata()?.len() as usize;
        // SAFETY: the kernel chooses the address of the new mapping, so no existing memory changes.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => {
                Ok(Self::Mapped { base, bytes })
            }
            _ => std::fs::read(path).map(Self::Read),
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            // SAFETY: a slice needs readable memory that does not change. The mapping has this
            // length, lives as long as `self`, and shows data that the kernel never changes.
            Self::Mapped { base, bytes } => unsafe {
                std::slice::from_raw_parts(base.as_ptr(), *bytes)
            },
            Self::Read(bytes) => bytes,
        }
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        if let Self::Mapped { base, bytes } = self {
            // SAFETY: this value owns the whole mapping, and no slice of it outlives `self`.
            unsafe { libc::munmap(base.as_ptr().cast(), *bytes) };
        }
    }
}

/// Memory shared with the BPF program.
#[derive(Debug)]
pub(super) struct Shared {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: all access to the memory is through atomics.
unsafe impl Send for Shared {}
// SAFETY: all access to the memory is through atomics.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps `bytes` bytes of a BPF map, starting at `offset`.
    pub(super) fn map(
        map: BorrowedFd<'_>,
        offset: usize,
        bytes: usize,
        writable: bool,
    ) -> io::Result<Self> {
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let descriptor = map.as_raw_fd();
        // SAFETY: the kernel chooses the address of the new mapping, so no existing memory changes.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                protection,
                libc::MAP_SHARED,
                descriptor,
                offset as libc::off_t,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            base: NonNull::new(base.cast()).expect("mmap does not return null"),
            bytes,
        })
    }

    /// Unmaps the memory of a value that may be leaked and never dropped.
    ///
    /// # Safety
    /// The caller must not use or drop `self` afterwards.
    pub(super) unsafe fn unmap(&self) {
        // SAFETY: this value owns the whole mapping. The caller does not use it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }

    #[inline]
    pub(super) fn u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: the pointer comes from `place`, so it is aligned and inside the mapping, which
        // lives as long as `self`. The words of a read-only mapping are only loaded, by `ring`.
        unsafe { AtomicU64::from_ptr(self.place(offset, 8).cast().as_ptr()) }
    }

    #[inline]
    pub(super) fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: the pointer comes from `place`, so it is aligned and inside the mapping, which
        // lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.place(offset, 4).cast().as_ptr()) }
    }

    #[inline]
    pub(super) fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: the pointer comes from `place`, so it is aligned and inside the mapping, which
        // lives as long as `self`.
        unsafe { AtomicU16::from_ptr(self.place(offset, 2).cast().as_ptr()) }
    }

    #[inline]
    fn place(&self, offset: usize, size: usize) -> NonNull<u8> {
        assert!(
            offset % size == 0 && offset + size <= self.bytes,
            "inside of the mapping, and aligned"
        );
        // SAFETY: the offset was checked to be inside the mapping, which is one allocation.
        unsafe { self.base.add(offset) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: this value owns the whole mapping, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

impl super::Inner {
    /// Unmaps the memory shared with the program, in the child of a fork that drops its last
    /// handle. The ring stays mapped if a thread of the parent held its lock during the fork. In
    /// the child this value is never dropped: threads that exist only in the parent hold references
    /// to it.
    pub(super) fn leave_to_parent(&self) {
        let intake = self.intake.try_lock();
        let ring = intake.iter().flat_map(|intake| intake.ring.mappings());
        for mapping in [&self.header, &self.tables.sum, &self.tables.own]
            .into_iter()
            .chain(ring)
        {
            // SAFETY: the mapping must not be used again. The last handle is being dropped, and all
            // threads of the source exist only in the parent. For the same reason `self`, and with
            // it the mapping, is never dropped here.
            unsafe { mapping.unmap() };
        }
    }
}

/// The words that a watch reads.
#[derive(Debug)]
pub(super) struct Glance {
    generation: NonNull<AtomicU64>,
    progress: NonNull<Progress>,
    records: NonNull<u8>,
    /// The size of the record area, a power of two, minus one.
    mask: usize,
}

// SAFETY: the words are atomics that any thread may load.
unsafe impl Send for Glance {}
// SAFETY: the words are atomics that any thread may load.
unsafe impl Sync for Glance {}

impl Glance {
    /// All arguments must belong to one source, and the owner of the result must keep that source
    /// alive. The records are `bytes` bytes of `ring`, starting at its second page.
    pub(super) fn new(header: &Shared, progress: &Progress, ring: &Shared, bytes: usize) -> Self {
        let first = page::size() as usize;
        assert!(
            bytes.is_power_of_two() && bytes >= 8 && first + bytes <= ring.bytes,
            "inside of the mapping"
        );
        let generation = NonNull::from(header.u64(super::layout::header::GENERATION));
        Self {
            generation,
            progress: NonNull::from(progress),
            records: ring.place(first, 8),
            mask: bytes - 1,
        }
    }

    /// Tells whether all events so far have been taken in.
    #[inline]
    pub(super) fn is_current(&self) -> bool {
        let now = self.generation();
        // ORDER(source-marked): Acquire, for the word of the watch. Partner: the store in
        // `Intake::publish`.
        self.progress().marked.load(Ordering::Acquire) >= now
    }

    #[inline]
    pub(super) fn generation(&self) -> u64 {
        // SAFETY: a dereference needs a live word. `Watching` also owns the source, which owns the
        // mapping.
        let generation = unsafe { self.generation.as_ref() };
        // ORDER(source-generation): Acquire, like every load of the generation.
        generation.load(Ordering::Acquire)
    }

    #[inline]
    pub(super) fn progress(&self) -> &Progress {
        // SAFETY: a dereference needs a live `Progress`. `Watching` also owns the source, which
        // owns the page.
        unsafe { self.progress.as_ref() }
    }

    /// Returns the word at a position of the ring.
    #[inline]
    pub(super) fn record(&self, at: u64) -> &AtomicU64 {
        let offset = at as usize & self.mask & !7;
        // SAFETY: the offset is below `mask + 1`, the size of the record area of the mapping.
        let word = unsafe { self.records.add(offset) };
        // SAFETY: `word` is inside the record area. It is aligned, because the offset is a multiple
        // of eight and the record area is page-aligned. Callers only load from the word.
        unsafe { AtomicU64::from_ptr(word.cast().as_ptr()) }
    }
}

/// How far events have been taken in and passed on. All words are zero in the child of a fork, and
/// the generation is never zero. So in the child no event counts as taken in.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Progress {
    /// All generations up to this one have been taken in.
    pub(super) marked: AtomicU64,
    /// All generations up to this one have been passed to subscribers.
    pub(super) handled: AtomicU64,
    /// The position of the oldest record in the ring.
    pub(super) position: AtomicU64,
}

/// The page that holds a [`Progress`].
#[derive(Debug)]
pub(super) struct ProgressPage(NonNull<Progress>);

// SAFETY: all access to the page is through atomics.
unsafe impl Send for ProgressPage {}
// SAFETY: all access to the page is through atomics.
unsafe impl Sync for ProgressPage {}

impl ProgressPage {
    pub(super) fn map(from: u64) -> io::Result<Self> {
        let page = Self(new_page(libc::PROT_READ | libc::PROT_WRITE)?.cast());
        // SAFETY: the advice changes only how a fork copies the page mapped above.
        if unsafe {
            libc::madvise(
                page.0.as_ptr().cast(),
                page::size() as usize,
                libc::MADV_WIPEONFORK,
            )
        } != 0
        {
            return Err(io::Error::last_os_error());
        }
        page.marked.store(from, Ordering::Relaxed);
        page.handled.store(from, Ordering::Relaxed);
        Ok(page)
    }
}

impl std::ops::Deref for ProgressPage {
    type Target = Progress;

    #[inline]
    fn deref(&self) -> &Progress {
        // SAFETY: a dereference needs a live, initialised `Progress`. The page is mapped as long as
        // `self` lives and is aligned for any type, and zeroes are a valid `Progress`.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for ProgressPage {
    fn drop(&mut self) {
        // SAFETY: this value owns the page, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.0.as_ptr().cast(), page::size() as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::MaybeUninit;

    fn is_usr1_held() -> bool {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: the call only writes the current mask to a local.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, ptr::null(), set.as_mut_ptr()) };
        // SAFETY: the call above has initialised the set.
        unsafe { libc::sigismember(set.as_ptr(), libc::SIGUSR1) == 1 }
    }

    #[test]
    fn a_call_that_was_interrupted_is_made_again_without_signals_and_not_for_ever() {
        let interrupted = || io::Error::from(io::ErrorKind::Interrupted);
        let mut seen = Vec::new();
        let result = uninterrupted(|| {
            seen.push(is_usr1_held());
            if seen.len() < 3 {
                Err(interrupted())
            } else {
                Ok(seen.len())
            }
        });
        assert_eq!((result.ok(), seen), (Some(3), vec![false, true, true]));
        assert!(!is_usr1_held(), "the mask is put back");
        assert!(uninterrupted(|| Err::<(), _>(interrupted())).is_err());
    }
}
