//! System calls without libc. The hook's own calls must not reach the hook again, and must not
//! change `errno`.

#![allow(unsafe_code, reason = "makes raw system calls")]

use crate::ranges;
#[cfg(target_arch = "aarch64")]
#[path = "raw/aarch64.rs"]
mod machine;
#[cfg(target_arch = "x86_64")]
#[path = "raw/x86_64.rs"]
mod machine;

pub(super) use machine::syscall;

/// Turns a raw result into the value or the errno.
pub(super) fn check(result: u64) -> Result<u64, i32> {
    const MIN_ERRNO: i64 = -4095;
    match result as i64 {
        error @ MIN_ERRNO..0 => Err(-error as i32),
        _ => Ok(result),
    }
}

/// Maps memory. If `hint` is free, the kernel maps it there.
pub(super) fn mmap(hint: u64, length: u64, protection: i32, flags: i32) -> Result<u64, i32> {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    assert_eq!(
        flags & libc::MAP_FIXED,
        0,
        "it would replace what is mapped there"
    );
    let args = [hint, length, protection as u64, flags as u64, u64::MAX, 0];
    // SAFETY: without `MAP_FIXED`, which was checked above, a new mapping replaces no other one.
    check(unsafe { syscall(libc::SYS_mmap as u64, args) })
}

/// # Safety
/// No code uses the range any more.
pub(super) unsafe fn munmap(address: u64, length: u64) -> Result<(), i32> {
    // SAFETY: the caller promises that no code uses the range.
    check(unsafe { syscall(libc::SYS_munmap as u64, [address, length, 0, 0, 0, 0]) }).map(drop)
}

/// # Safety
/// No code uses the range in a way that `protection` forbids.
pub(super) unsafe fn mprotect(address: u64, length: u64, protection: i32) -> Result<(), i32> {
    // SAFETY: the caller promises that no code uses the range in a forbidden way.
    check(unsafe {
        syscall(
            libc::SYS_mprotect as u64,
            [address, length, protection as u64, 0, 0, 0],
        )
    })
    .map(drop)
}

/// Moves a mapping over another one.
///
/// # Safety
/// No code uses `from` any more, and all code that uses `to` works with the content of `from`.
pub(super) unsafe fn move_over(from: u64, length: u64, to: u64) -> Result<(), i32> {
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    // SAFETY: the caller promises that no code uses `from` any more, and that all code that uses
    // `to` works with the content of `from`.
    check(unsafe {
        syscall(
            libc::SYS_mremap as u64,
            [from, length, length, flags, to, 0],
        )
    })
    .map(drop)
}

pub(super) fn membarrier(command: i32) -> Result<u64, i32> {
    // SAFETY: takes integers and touches no memory.
    check(unsafe { syscall(libc::SYS_membarrier as u64, [command as u64, 0, 0, 0, 0, 0]) })
}

pub(super) fn getpid() -> u64 {
    // SAFETY: takes no arguments and touches no memory.
    unsafe { syscall(libc::SYS_getpid as u64, [0; 6]) }
}

/// Tells whether the process has a thread with this thread id.
pub(super) fn is_thread_of(process: u64, thread: i32) -> bool {
    const PROBE: u64 = 0;
    // SAFETY: takes integers. Signal 0 is only checked and not sent.
    check(unsafe {
        syscall(
            libc::SYS_tgkill as u64,
            [process, thread as u64, PROBE, 0, 0, 0],
        )
    })
    .is_ok()
}

/// Returns the program break. `brk` returns it when the requested break is impossible.
pub(super) fn program_break() -> u64 {
    // SAFETY: the kernel refuses a break of zero and returns the present break.
    unsafe { syscall(libc::SYS_brk as u64, [0; 6]) }
}

/// Returns the size of a SysV shared memory segment, if the segment exists and this process may
/// query it.
pub(super) fn segment_size(id: i32) -> Option<u64> {
    let mut info = std::mem::MaybeUninit::<libc::shmid_ds>::zeroed();
    let args = [
        id as u64,
        libc::IPC_STAT as u64,
        info.as_mut_ptr().expose_provenance() as u64,
        0,
        0,
        0,
    ];
    // SAFETY: the call writes one `shmid_ds` to a local. On these processors libc's layout of that
    // struct is the kernel's.
    check(unsafe { syscall(libc::SYS_shmctl as u64, args) }).ok()?;
    // SAFETY: the local was zeroed, which is a valid value, before the kernel wrote to it.
    Some(unsafe { info.assume_init() }.shm_segsz as u64)
}

/// Returns the page size of an open file, if the file is on hugetlbfs.
#[cold]
pub(super) fn huge_page_of(fd: u64) -> Option<u64> {
    let mut info = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    let args = [fd, info.as_mut_ptr().expose_provenance() as u64, 0, 0, 0, 0];
    // SAFETY: the call writes one `statfs` to a local. On these processors libc's layout of that
    // struct is the kernel's.
    check(unsafe { syscall(libc::SYS_fstatfs as u64, args) }).ok()?;
    // SAFETY: the local was zeroed, which is a valid value, before the kernel wrote to it.
    let info = unsafe { info.assume_init() };
    ranges::huge_page(info.f_type, info.f_bsize)
}

/// Reads memory of this process that may not be mapped. Returns how many words were read.
pub(super) fn read_memory(address: u64, into: &mut [u64]) -> Result<usize, i32> {
    let local = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: size_of_val(into),
    };
    let remote = libc::iovec {
        iov_base: std::ptr::without_provenance_mut(address as usize),
        iov_len: local.iov_len,
    };
    let vector = |vector: &libc::iovec| std::ptr::from_ref(vector).expose_provenance() as u64;
    let args = [getpid(), vector(&local), 1, vector(&remote), 1, 0];
    // SAFETY: the call writes to `into` at most the length in the vector. The kernel checks the
    // address that it reads from.
    check(unsafe { syscall(libc::SYS_process_vm_readv as u64, args) })
        .map(|bytes| bytes as usize / 8)
}

/// A file of `/proc`, read without the allocator.
#[derive(Debug)]
pub(super) struct File(u64);

impl File {
    /// Opens `path`, which ends in a zero byte.
    pub(super) fn open(path: &[u8]) -> Result<Self, i32> {
        debug_assert_eq!(path.last(), Some(&0), "the path of a C call");
        let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
        let args = [
            libc::AT_FDCWD as u64,
            path.as_ptr().expose_provenance() as u64,
            flags,
            0,
            0,
            0,
        ];
        // SAFETY: the call reads the path, which ends in a zero byte.
        check(unsafe { syscall(libc::SYS_openat as u64, args) }).map(File)
    }

    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<usize, i32> {
        let args = [
            self.0,
            into.as_mut_ptr().expose_provenance() as u64,
            into.len() as u64,
            0,
            0,
            0,
        ];
        // SAFETY: the call writes at most `into.len()` bytes to `into`.
        check(unsafe { syscall(libc::SYS_read as u64, args) }).map(|bytes| bytes as usize)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: this value owns the descriptor.
        unsafe { syscall(libc::SYS_close as u64, [self.0, 0, 0, 0, 0, 0]) };
    }
}
