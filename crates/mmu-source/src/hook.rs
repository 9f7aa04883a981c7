//! The memory calls that this process makes through libc, seen by patching libc.
//!
//! While a [`Hook`] is installed, every `munmap`, `mmap` over live memory, `mremap`, `madvise`,
//! `posix_madvise`, `process_madvise` on this process, `brk`, `sbrk`, `shmat` with `SHM_REMAP`,
//! `shmdt`, `mprotect`, `pkey_mprotect` and `remap_file_pages` that goes through libc, and every
//! `syscall(2)` with one of those numbers, has a bracket around it on [`current`](crate::current):
//! start callbacks run in the calling thread before the call, end callbacks after it. libc's own
//! calls count: `free` of a large block, `malloc_trim`, stacks of threads, `dlclose` in the dynamic
//! loader. A call made by an instruction outside of libc does not, nor do changes that are no call
//! of this process. `docs/sources.md` has the table.
//!
//! # How
//! ```text
//!  munmap in libc           trampoline            handler
//!  mov $11, %eax   ──1──>   mov $11, %eax
//!  syscall                  call  ───────2──────> 3  which range does the call change?
//!                                                 4  start callbacks
//!                                                 5  the system call
//!                                                 6  end callbacks
//!  cmp $-4095, %rax <──7──  jmp   <────────────── result
//! ```
//! 1. glibc makes a system call by `mov $number, %eax; syscall`. That `mov` is one instruction as
//!    long as a near jump, so a jump to a trampoline takes its place. On aarch64 a branch takes the
//!    place of `svc #0` itself. No thread can stand inside one instruction. The page of the
//!    instruction is replaced as a whole (`mremap` of a changed copy over it), so patching is safe
//!    while other threads run the code.
//! 2. The trampoline runs the replaced instruction and calls the handler. All registers that a
//!    system call keeps are kept.
//! 3. The handler reads the arguments of the call. If the call changes no translation, steps 4 and
//!    6 are left out.
//! 4. The start callbacks run, in the calling thread.
//! 5. The handler makes the system call itself.
//! 6. The end callbacks run, and `errno` is put back.
//! 7. The code behind the `syscall` instruction sees the kernel's result.
//!
//! Another library that has patched a *function's entry* stays in place and runs first.
//!
//! # What a callback may do
//! It runs in whatever thread made the call, perhaps in the middle of `malloc` or `free` with the
//! allocator's lock held, in `dlclose` with the loader's, or in a thread that is all but gone. So
//! it must not allocate, free, load libraries, or wait for a lock whose holder may be
//! allocating ([`CheckedAlloc`](mmu_notifier::lockdep::CheckedAlloc) finds that at the first call,
//! `examples/own_process.rs` shows how it is done). It may subscribe to a subscription that exists,
//! put it, map, unmap, and make any other system call; those have brackets of their own inside this
//! one. `errno` is put back after it.
//!
//! # Limits
//! x86-64 or aarch64, with glibc. Signal handlers must not make memory calls while a hook is
//! installed.
//!
//! The library with this code may be loaded by `dlopen`, and stays loaded then: `dlclose` does not
//! unload it. Its thread-local words come from the space that glibc sets aside for such libraries
//! (1,664 bytes for all of a process, of which `libmmun.so` takes 352 and `libmmun_dropin.so` 184);
//! if that is used up, `dlopen` fails with "cannot allocate memory in static TLS block", and
//! `LD_PRELOAD`, linking, or `GLIBC_TUNABLES=glibc.rtld.optional_static_tls=4096` helps. A
//! *callback* of such a library must not use the standard library's thread-locals, because the
//! first use in a thread may allocate. In builds with `debug_assertions`,
//! [`lockdep`](mmu_notifier::lockdep) does: load those when the program starts.
//!
//! # Examples
//! ```
//! # #[global_allocator]
//! # static ALLOC: mmu_notifier::lockdep::CheckedAlloc = mmu_notifier::lockdep::CheckedAlloc::new();
//! use mmu_notifier::{InvalidateRange, Notifier, Registration};
//! use mmu_source::hook::Hook;
//! use std::sync::atomic::{AtomicU64, Ordering};
//!
//! #[derive(Default)]
//! struct Last(AtomicU64);
//! impl Notifier for Last {
//!     fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
//!         self.0.store(range.range().start().get(), Ordering::Relaxed);
//!     }
//! }
//!
//! let watch = Registration::new(&mmu_source::current(), Last::default()).map_err(|_| "refused")?;
//! let hook = Hook::install()?;
//! // SAFETY: maps a page and unmaps it.
//! let page = unsafe {
//!     let page = libc::mmap(std::ptr::null_mut(), 4096, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
//!     libc::munmap(page, 4096);
//!     page
//! };
//! assert_eq!(watch.0.load(Ordering::Relaxed), page as u64);
//! drop(hook);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[cfg_attr(
    not(all(
        any(target_arch = "x86_64", target_arch = "aarch64"),
        target_os = "linux",
        target_env = "gnu"
    )),
    path = "hook/unsupported.rs"
)]
mod glibc;

use crate::Error;
use crate::fork::{mark, marks};
use std::sync::atomic::Ordering;

/// The patches in libc, for as long as one of these is alive.
///
/// Several share them; the last one that is dropped takes them out. A call that another thread has
/// begun meanwhile may still have its bracket a little later. The trampolines stay mapped for good,
/// since a thread may be in one.
#[derive(Debug)]
#[must_use = "the patches are taken out when it is dropped"]
pub struct Hook {
    /// The number of the address space that installed the hook.
    id: u64,
}

impl Hook {
    /// Patches libc and the dynamic loader, or takes part if that was done already.
    ///
    /// # Blocking
    /// The first time it searches libc's code, some milliseconds; then it replaces a few pages. It
    /// waits for an installation or removal by another thread.
    /// # Errors
    /// [`Error::Unavailable`] if this is not x86-64 or aarch64 with glibc, or if libc has no place
    /// that can be patched (it says what was found). [`Error::Kernel`] if the kernel refuses to
    /// replace a page of code (`EACCES` or `EPERM` under a security module or where code is
    /// sealed); then nothing is patched.
    pub fn install() -> Result<Self, Error> {
        glibc::install().map(|()| Self { id: mark() })
    }

    /// Returns what every patched place looks like now.
    ///
    /// # Blocking
    /// No. It allocates.
    #[must_use]
    pub fn status(&self) -> Vec<Patch> {
        glibc::status()
    }

    /// Tells whether this is the child of a fork and the hook its parent's. Such a hook works all
    /// the same: the child has a copy of the patches, and the brackets of its calls are on its own
    /// [`current`](crate::current). The subscriptions of the parent are not there.
    #[must_use]
    pub fn is_inherited(&self) -> bool {
        marks().alive.load(Ordering::Relaxed) != self.id
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        glibc::remove();
    }
}

/// One place in libc that makes memory calls.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Patch {
    /// The call: `munmap`, `brk`, ... For the function that makes any call, `syscall`.
    pub name: &'static str,
    /// The function it is in, if its name is known: `posix_madvise`.
    pub function: Option<String>,
    /// The file name of the module: `libc.so.6`.
    pub module: String,
    /// Where the instruction stands.
    pub address: u64,
    /// Whether it is patched, and by which program.
    pub state: State,
}

/// Whether a place in libc is patched, and by which program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// No [`Hook`] is installed.
    Free,
    /// Our patch is in place.
    Ours,
    /// Our patch is in place, and another library has one at the function's entry. It runs first; a
    /// call that it makes by itself, without going on into libc, is not seen.
    Chained,
    /// Something else stands where our patch was, or has to be: calls are not seen.
    Overwritten,
}

/// Says what a [`Hook`] would patch here, without patching anything.
///
/// # Blocking
/// The first time it searches libc's code, some milliseconds.
/// # Errors
/// [`Error::Unavailable`], as [`Hook::install`].
pub fn probe() -> Result<Vec<Patch>, Error> {
    glibc::probe()
}
