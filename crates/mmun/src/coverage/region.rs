//! Memory for the operations, and the system calls that change it, made as a program would make
//! them.
//!
//! # Safety
//! A [`Region`] is mapped here, and no Rust reference to its bytes ever exists: they are read and
//! written only by volatile accesses and system calls of this module. A change of the region's
//! translations therefore touches no Rust object, and the functions that change them are safe. A
//! function that takes memory away takes the `Region` by value. `advise` takes a reference, because
//! most advice leaves pages that read as zeros; after any other advice no code reads the region.
#![expect(
    unsafe_code,
    reason = "maps, changes and unmaps raw memory; see the Safety section"
)]

use std::ffi::{CStr, c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{null_mut, with_exposed_provenance_mut};

use io_uring::{IoUring, opcode};

/// Bytes of a page.
pub(crate) use rustix::param::page_size;
/// The content of touched pages, which tells them from discarded pages.
const MARK: u8 = 0xa5;

/// Pages of a mapping. A clone or a part names the same pages; no drop unmaps them.
///
/// # Invariants
/// `start..start + len` was mapped by this module; no reference into it exists.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    start: usize,
    len: usize,
}

fn pointer(address: usize) -> *mut c_void {
    with_exposed_provenance_mut(address)
}

fn check(result: c_int) -> io::Result<()> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn check_address(result: *mut c_void) -> io::Result<usize> {
    if result == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(result.expose_provenance())
    }
}

impl Region {
    /// New memory, private and zero, each page touched.
    pub(crate) fn anonymous(pages: usize) -> io::Result<Region> {
        let region = Region::map(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
        region.touch();
        Ok(region)
    }

    /// New memory, private and zero, not touched.
    pub(crate) fn untouched(pages: usize) -> io::Result<Region> {
        Region::map(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// The first pages of a file, shared, each page touched by a write.
    pub(crate) fn shared(file: &File, pages: usize) -> io::Result<Region> {
        let region = Region::map(pages, libc::MAP_SHARED, file.as_raw_fd())?;
        region.touch();
        Ok(region)
    }

    /// The first pages of a file, private, each page touched by a read.
    pub(crate) fn private(file: &File, pages: usize) -> io::Result<Region> {
        let region = Region::map(pages, libc::MAP_PRIVATE, file.as_raw_fd())?;
        region.look();
        Ok(region)
    }

    fn map(pages: usize, flags: c_int, fd: RawFd) -> io::Result<Region> {
        let len = pages * page_size();
        // SAFETY: without MAP_FIXED the kernel chooses an unused address.
        let start = unsafe {
            libc::mmap(
                null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                fd,
                0,
            )
        };
        // INVARIANT: just mapped, and only its address is kept.
        Ok(Region {
            start: check_address(start)?,
            len,
        })
    }

    /// A segment of System V shared memory, touched. It is marked for removal at the last detach.
    pub(crate) fn segment(pages: usize) -> io::Result<Region> {
        let id = new_segment(pages)?;
        // SAFETY: with a null address the kernel chooses an unused address.
        let start = check_address(unsafe { libc::shmat(id, null_mut(), 0) });
        discard_segment(id);
        let region = Region {
            start: start?,
            len: pages * page_size(),
        };
        region.touch();
        Ok(region)
    }

    /// A part: `pages` pages from page `first` on.
    pub(crate) fn part(&self, first: usize, pages: usize) -> Region {
        assert!(
            (first + pages) * page_size() <= self.len,
            "a part lies within its whole"
        );
        Region {
            start: self.start + first * page_size(),
            len: pages * page_size(),
        }
    }

    /// The first part of `pages` pages that begins at a multiple of `align` bytes.
    pub(crate) fn aligned(&self, align: usize, pages: usize) -> Region {
        let skipped = self.start.next_multiple_of(align) - self.start;
        self.part(skipped / page_size(), pages)
    }

    pub(crate) fn start(&self) -> usize {
        self.start
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn page(&self, index: usize) -> usize {
        self.part(index, 1).start
    }

    /// Writes a byte to every page.
    pub(crate) fn touch(&self) {
        for address in (self.start..self.start + self.len).step_by(page_size()) {
            // SAFETY: the invariant: mapped and writable, and no Rust object lies there.
            unsafe { pointer(address).cast::<u8>().write_volatile(MARK) };
        }
    }

    /// Reads a byte of every page.
    pub(crate) fn look(&self) {
        for address in (self.start..self.start + self.len).step_by(page_size()) {
            // SAFETY: the invariant: mapped and readable, and no other code of this process writes
            // to it.
            unsafe { pointer(address).cast::<u8>().read_volatile() };
        }
    }

    /// `munmap` of libc.
    pub(crate) fn unmap(self) -> io::Result<()> {
        // SAFETY: no Rust object lies in the pages, and they are given up with `self`.
        check(unsafe { libc::munmap(pointer(self.start), self.len) })
    }

    /// `munmap` through `syscall(2)`.
    pub(crate) fn unmap_by_number(self) -> io::Result<()> {
        // SAFETY: as in `unmap`.
        check(unsafe { libc::syscall(libc::SYS_munmap, self.start, self.len) } as c_int)
    }

    /// `munmap` by the instruction itself, past libc.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn unmap_by_instruction(self) -> io::Result<()> {
        let result: i64;
        // SAFETY: as in `unmap`; the kernel keeps all registers but rax, rcx and r11.
        unsafe {
            std::arch::asm!("syscall", inlateout("rax") libc::SYS_munmap => result, in("rdi") self.start, in("rsi") self.len,
                out("rcx") _, out("r11") _, options(nostack));
        }
        if result < 0 {
            Err(io::Error::from_raw_os_error(-result as i32))
        } else {
            Ok(())
        }
    }

    /// `munmap` by the instruction itself, past libc.
    #[cfg(target_arch = "aarch64")]
    pub(crate) fn unmap_by_instruction(self) -> io::Result<()> {
        let result: i64;
        // SAFETY: as in `unmap`; the kernel keeps all registers but x0.
        unsafe {
            std::arch::asm!("svc #0", in("x8") libc::SYS_munmap, inlateout("x0") self.start => result, in("x1") self.len,
                options(nostack));
        }
        if result < 0 {
            Err(io::Error::from_raw_os_error(-result as i32))
        } else {
            Ok(())
        }
    }

    /// `munmap` by the instruction itself, past libc.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub(crate) fn unmap_by_instruction(self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// `mremap` with these flags: in place, to an unused address, or to `target`, whose pages are
    /// replaced.
    pub(crate) fn remap(self, len: usize, flags: c_int, target: Option<Region>) -> io::Result<()> {
        let target = target.map_or(0, |target| target.start);
        // SAFETY: no Rust object lies in the old pages, which are given up with `self`; with
        // MREMAP_FIXED the same holds for the target's.
        let moved =
            unsafe { libc::mremap(pointer(self.start), self.len, len, flags, pointer(target)) };
        check_address(moved).map(drop)
    }

    /// `mmap` with `MAP_FIXED` over the region.
    pub(crate) fn map_over(self) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: no Rust object lies in the pages that are replaced.
        check_address(unsafe {
            libc::mmap(pointer(self.start), self.len, libc::PROT_READ, flags, -1, 0)
        })
        .map(drop)
    }

    /// `madvise` of libc.
    pub(crate) fn advise(&self, advice: c_int) -> io::Result<()> {
        // SAFETY: no Rust object lies in the pages; the advices used here leave them mapped, or
        // `self` is not touched afterwards.
        check(unsafe { libc::madvise(pointer(self.start), self.len, advice) })
    }

    /// `IORING_OP_MADVISE`.
    pub(crate) fn advise_by_ring(&self, ring: &mut IoUring, advice: c_int) -> io::Result<()> {
        let entry =
            opcode::Madvise::new(pointer(self.start).cast_const(), self.len as i64, advice).build();
        // SAFETY: the entry points to no buffer; no Rust object lies in the pages.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        let result = ring
            .completion()
            .next()
            .map_or(-libc::EIO, |entry| entry.result());
        if result < 0 {
            Err(io::Error::from_raw_os_error(-result))
        } else {
            Ok(())
        }
    }

    /// `mprotect` of libc to read only; no code writes there afterwards.
    pub(crate) fn protect(&self) -> io::Result<()> {
        // SAFETY: no Rust object lies in the pages.
        check(unsafe { libc::mprotect(pointer(self.start), self.len, libc::PROT_READ) })
    }

    /// `pkey_mprotect` of libc to read only, with the default key.
    pub(crate) fn protect_with_key(&self) -> io::Result<()> {
        type PkeyMprotect = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int) -> c_int;
        let function = symbol(c"pkey_mprotect")
            .ok_or_else(|| io::Error::other("libc has no pkey_mprotect"))?;
        // SAFETY: this is the type that pkey_mprotect(2) documents for that name.
        let function = unsafe { std::mem::transmute::<*mut c_void, PkeyMprotect>(function) };
        // SAFETY: no Rust object lies in the pages.
        check(unsafe { function(pointer(self.start), self.len, libc::PROT_READ, -1) })
    }

    /// `mlock` of libc.
    pub(crate) fn lock(&self) -> io::Result<()> {
        // SAFETY: `mlock` changes no byte.
        check(unsafe { libc::mlock(pointer(self.start), self.len) })
    }

    /// `shmdt` of libc: the region is a segment.
    pub(crate) fn detach(self) -> io::Result<()> {
        // SAFETY: no Rust object lies in the pages, and they are given up with `self`.
        check(unsafe { libc::shmdt(pointer(self.start)) })
    }

    /// `shmat` with `SHM_REMAP` over the region.
    pub(crate) fn attach_over(self) -> io::Result<()> {
        let id = new_segment(self.len / page_size())?;
        // SAFETY: no Rust object lies in the pages that are replaced.
        let attached = unsafe { libc::shmat(id, pointer(self.start), libc::SHM_REMAP) };
        let attached = check_address(attached).map(drop);
        discard_segment(id);
        attached
    }

    /// Moves the region's first page to `node`, by `move_pages`.
    pub(crate) fn move_to(&self, node: c_int) -> io::Result<()> {
        const MPOL_MF_MOVE: c_int = 2;
        let (page, mut status) = (pointer(self.start), 0);
        // SAFETY: the arrays have one live element each; moving changes no byte.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                1,
                &page,
                &node,
                &mut status,
                MPOL_MF_MOVE,
            )
        };
        check(result as c_int)?;
        if status < 0 {
            Err(io::Error::from_raw_os_error(-status))
        } else {
            Ok(())
        }
    }
}

/// `process_madvise` on memory of the process behind `pidfd`: libc's function, or the bare system
/// call if libc has no such function.
///
/// The pages must be a region's, because their content may be lost.
pub(crate) fn advise_in(pidfd: RawFd, start: usize, len: usize, advice: c_int) -> io::Result<()> {
    type ProcessMadvise =
        unsafe extern "C" fn(c_int, *const libc::iovec, usize, c_int, u32) -> isize;
    let part = libc::iovec {
        iov_base: pointer(start),
        iov_len: len,
    };
    let result = match symbol(c"process_madvise") {
        Some(function) => {
            // SAFETY: this is the type that process_madvise(2) documents for that name.
            let function = unsafe { std::mem::transmute::<*mut c_void, ProcessMadvise>(function) };
            // SAFETY: one live vector; the pages it names are a region's.
            unsafe { function(pidfd, &part, 1, advice, 0) }
        }
        // SAFETY: the system call gets the same arguments as the function above.
        None => unsafe {
            libc::syscall(libc::SYS_process_madvise, pidfd, &part, 1, advice, 0) as isize
        },
    };
    match result {
        -1 => Err(io::Error::last_os_error()),
        done if done as usize == len => Ok(()),
        _ => Err(io::Error::other("only a part was done")),
    }
}

fn new_segment(pages: usize) -> io::Result<i32> {
    // SAFETY: `shmget` takes integers only.
    let id = unsafe {
        libc::shmget(
            libc::IPC_PRIVATE,
            pages * page_size(),
            libc::IPC_CREAT | 0o600,
        )
    };
    check(id).map(|()| id)
}

/// The kernel removes the segment at the last detach.
fn discard_segment(id: i32) {
    // SAFETY: IPC_RMID reads no buffer.
    unsafe { libc::shmctl(id, libc::IPC_RMID, null_mut()) };
}

/// A function of libc; `None` if this libc is too old to have the function.
pub(crate) fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is a live string that ends in a zero byte.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// Whether a page of process `pid` can be written: writes the byte that a touched page holds
/// already.
pub(crate) fn takes_a_write(pid: i32, address: usize) -> bool {
    let mut mark = MARK;
    let local = libc::iovec {
        iov_base: (&raw mut mark).cast(),
        iov_len: 1,
    };
    let remote = libc::iovec {
        iov_base: pointer(address),
        iov_len: 1,
    };
    // SAFETY: the kernel reads one byte of a local variable. The byte that it writes belongs to a
    // region, and has the value `MARK` already.
    unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) == 1 }
}

/// Maps a page at `address` if nothing is mapped there.
pub(crate) fn map_if_free(address: usize) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: with MAP_FIXED_NOREPLACE the kernel replaces no mapping.
    let result = unsafe {
        libc::mmap(
            pointer(address),
            page_size(),
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    match check_address(result) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

/// Writes to memory of this process, if the memory is writable; `false` if not. For the page that
/// an operation has changed.
pub(crate) fn put(address: usize, bytes: &[u8]) -> bool {
    let local = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let remote = libc::iovec {
        iov_base: pointer(address),
        iov_len: bytes.len(),
    };
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the bytes are only read; no Rust object lies in the page.
    unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) == bytes.len() as isize }
}

/// Reads memory of this process, if the memory is readable; `false` if not.
pub(crate) fn get(address: usize, bytes: &mut [u8]) -> bool {
    let local = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let remote = libc::iovec {
        iov_base: pointer(address),
        iov_len: bytes.len(),
    };
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the kernel writes only to `bytes`, which this function borrows exclusively.
    unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) == bytes.len() as isize }
}
