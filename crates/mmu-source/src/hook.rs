//! Reports the memory calls that this process makes through libc, by patching libc.
//!
//! While a [`Hook`] is installed, each memory call through libc that may change a translation has a
//! bracket around it on [`current`](crate::current). Start callbacks run in the calling thread
//! before the call, end callbacks after it. The memory calls are `munmap`, `mmap` over live memory,
//! `mremap`, `madvise`, `posix_madvise`, `process_madvise` on this process, `brk`, `sbrk`, `shmat`
//! with `SHM_REMAP`, `shmdt`, `mprotect`, `pkey_mprotect`, `remap_file_pages`, `mbind`,
//! `move_pages` and `migrate_pages` of this process, and `syscall(2)` with the number of one of
//! these calls.
//!
//! The hook also sees the calls that libc makes for itself: `free` of a large block, `malloc_trim`,
//! thread stacks, `dlclose` in the dynamic loader. The hook does not see a system call instruction
//! outside of libc, or a change that no call of this process makes. `docs/sources.md` has the
//! table.
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
//! 1. glibc makes a system call by `mov $number, %eax; syscall`. On x86-64 a jump to the trampoline
//!    replaces that `mov`, which is as long as a near jump. On aarch64 a branch replaces `svc #0`
//!    itself. Exactly one instruction is replaced, so no thread can be in the middle of the
//!    replaced code. The hook patches a copy of the page and moves that copy over the original with
//!    `mremap`. So other threads see either the old page or the new one, and patching is safe while
//!    they run the code.
//! 2. The trampoline runs the replaced instruction and calls the handler. The trampoline preserves
//!    all registers that a system call preserves and that the code after the call may still read.
//! 3. The handler reads the arguments of the call. If the call changes no translation, the handler
//!    skips steps 4 and 6.
//! 4. The start callbacks run, in the calling thread.
//! 5. The handler makes the system call itself.
//! 6. The end callbacks run, and the handler restores `errno`.
//! 7. The code behind the `syscall` instruction sees the kernel's result.
//!
//! Another library may have patched the *entry of a function* before. If the function still has an
//! instruction that the hook can patch, the other patch stays in place and runs first. If the other
//! patch covers that instruction, the hook redirects the other patch's jump: a trampoline opens the
//! bracket and calls the jump's target.
//!
//! # What a callback may do
//! A callback runs in the thread that made the call. That thread may be in `malloc` or `free` with
//! the allocator's lock held, in `dlclose` with the loader's lock held, or at the end of its life.
//! So a callback must not allocate, free or load libraries, and must not wait for a lock whose
//! holder may be allocating. [`CheckedAlloc`](mmu_notifier::lockdep::CheckedAlloc) detects a
//! violation at the first call, and `examples/own_process.rs` shows a callback that follows the
//! rule. A callback may get a subscription that exists, put it, map, unmap, and make any other
//! system call. Memory calls of a callback have brackets of their own, nested in the bracket for
//! which the callback runs. The handler restores `errno` after the callback.
//!
//! # Limits
//! x86-64 or aarch64, with glibc. Signal handlers must not make memory calls while a hook is
//! installed.
//!
//! The library with this code may be loaded by `dlopen`. From then on `dlclose` does not unload it.
//! The library's thread-local variables come from the surplus that glibc reserves for such
//! libraries: 1,664 bytes a process, of which `libmmun.so` takes 352 and `libmmun_dropin.so` 184.
//! If the surplus is used up, `dlopen` fails with "cannot allocate memory in static TLS block".
//! Then `LD_PRELOAD`, linking, or `GLIBC_TUNABLES=glibc.rtld.optional_static_tls=4096` helps.
//!
//! A *callback* in a library loaded by `dlopen` must not use the standard library's thread-locals,
//! because their first use in a thread may allocate. [`lockdep`](mmu_notifier::lockdep) uses them
//! in builds with `debug_assertions`, so load such a build when the program starts.
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
//! let watch = Registration::new(&mmu_source::current(), Last::default())?;
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
use crate::fork::{mark, marks, try_marks};
use std::sync::atomic::Ordering;

/// The patches in libc. The patches stay installed while at least one `Hook` exists.
///
/// Dropping the last `Hook` removes the patches. A call that another thread began before the
/// removal may still have its bracket shortly afterwards. The trampolines stay mapped for ever,
/// because a thread may be executing one.
#[derive(Debug)]
#[must_use = "dropping the hook removes the patches"]
pub struct Hook {
    /// Identifies the address space that installed the hook.
    id: u64,
}

impl Hook {
    /// Patches libc and the dynamic loader. If they are already patched, shares the patches.
    ///
    /// # Blocking
    /// The first call searches libc's code, which takes some milliseconds. Then it replaces a few
    /// pages. This call waits while another thread installs or removes the patches.
    /// # Errors
    /// [`Error::Unavailable`] if this is not x86-64 or aarch64 with glibc, if one of the main calls
    /// (`munmap`, `mmap`, `mremap`, `madvise`, `brk`, `mprotect`, `syscall`) cannot be patched, or
    /// if there is no memory for the trampolines. The message says which. [`Error::Kernel`] if the
    /// kernel refuses to replace a page of code (`EACCES` or `EPERM` under a security module, or
    /// where code is sealed). Then nothing is patched.
    pub fn install() -> Result<Self, Error> {
        try_marks()?;
        glibc::install().map(|()| Self { id: mark() })
    }

    /// Returns the current state of every patched instruction.
    ///
    /// # Blocking
    /// No. It allocates.
    #[must_use]
    pub fn status(&self) -> Vec<Patch> {
        glibc::status()
    }

    /// Tells whether this is the child of a fork and the parent installed the hook. An inherited
    /// hook works: the child has a copy of the patches, and the brackets of its calls are on its
    /// own [`current`](crate::current). The parent's subscriptions do not exist there.
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

/// One instruction in libc or in the dynamic loader that a [`Hook`] replaces.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Patch {
    /// The name of the call: `munmap`, `brk`, ... The name is `syscall` for the function that makes
    /// any call.
    pub name: &'static str,
    /// The function that contains the instruction, if its name is known: `posix_madvise`.
    pub function: Option<String>,
    /// The file name of the module: `libc.so.6`.
    pub module: String,
    /// The address of the replaced instruction.
    pub address: u64,
    /// Whether the instruction is patched, and by which program.
    pub state: State,
}

/// Whether an instruction in libc is patched, and by which program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// No [`Hook`] is installed.
    Free,
    /// Our patch is in place.
    Ours,
    /// Our patch is in place, and another library has patched the function's entry. If our patch
    /// replaces the other patch's jump, the other patch runs inside of the hook's bracket.
    /// Otherwise the other patch runs first: if it makes the call itself instead of continuing into
    /// libc, the hook does not see the call.
    Chained,
    /// Other bytes are at the place of our patch, so a hook does not see these calls.
    Overwritten,
}

/// Returns the instructions that a [`Hook`] would patch in this process, without patching them.
///
/// # Blocking
/// The first call searches libc's code, which takes some milliseconds.
/// # Errors
/// [`Error::Unavailable`], for the reasons given at [`Hook::install`].
pub fn probe() -> Result<Vec<Patch>, Error> {
    glibc::probe()
}
