//! The asymmetric fence: nearly free for a reader, a system call for the grace period.
//!
//! A [`light`] on one thread and a [`heavy`] on another order each other as two `fence(SeqCst)` do.
//! `light` is only a compiler barrier. `heavy` is `membarrier(PRIVATE_EXPEDITED)`, which makes
//! every running thread of the process execute a full fence wherever it runs. If the system call is
//! missing or refused, both are real fences. That decision is made once, before the first reader of
//! the process, and never changes.

use crate::sync::{Ordering, fence};

/// A bit of the index word. A reader loads that word first. If the bit is set, readers must use
/// real fences.
pub(crate) const FULL_FENCES: usize = 1 << 1;

/// The reader's side. `word` is the domain's index word as loaded by this reader.
#[inline(always)]
pub(crate) fn light(word: usize) {
    if ALWAYS_FULL || word & FULL_FENCES != 0 {
        full();
    }
    compiler_barrier();
}

/// Out of line, so that the fast path takes no jump: on some processors one more jump costs as much
/// as the whole section.
#[cfg_attr(not(mmun_loom), cold, inline(never))]
fn full() {
    // ORDER(srcu-enter, srcu-wake): the fallback's side of the pairs named at the callers.
    fence(Ordering::SeqCst);
}

#[cfg(all(
    not(mmun_loom),
    not(miri),
    any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64"
    )
))]
mod imp {
    use super::{FULL_FENCES, Ordering, fence};
    use crate::raw::die;
    use std::sync::atomic::AtomicUsize;

    pub(super) const ALWAYS_FULL: bool = false;

    const UNKNOWN: usize = usize::MAX;
    static MODE: AtomicUsize = AtomicUsize::new(UNKNOWN);

    /// Rust's `compiler_fence` makes a promise about signal handlers only. An empty `asm!` that may
    /// touch memory is opaque to the compiler, which moves no memory access across the block.
    #[inline(always)]
    pub(super) fn compiler_barrier() {
        // SAFETY: the block contains no instruction and uses no register and no stack.
        unsafe { std::arch::asm!("", options(nostack, preserves_flags)) };
    }

    /// Returns the flag that every domain's index word contains beside the bank: zero or
    /// [`FULL_FENCES`].
    pub(crate) fn mode() -> usize {
        match MODE.load(Ordering::Relaxed) {
            UNKNOWN => {
                let found = if register() { 0 } else { FULL_FENCES };
                // The first answer stays, so that all domains and both sides of the fence agree.
                match MODE.compare_exchange(UNKNOWN, found, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => found,
                    Err(first) => first,
                }
            }
            known => known,
        }
    }

    fn membarrier(command: libc::c_int) -> libc::c_long {
        // SAFETY: `membarrier` takes three integers and touches no memory of this program.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }
    }

    fn register() -> bool {
        // SAFETY: `getenv` needs a C string, and no thread may change the environment at the same
        // time, which every caller of the unsafe `set_var` promises. `std::env` would allocate, and
        // the caller may be inside an allocator.
        let refused = unsafe { !libc::getenv(c"SRCU_NO_MEMBARRIER".as_ptr()).is_null() };
        let supported = libc::c_long::from(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
        let answer = if refused {
            0
        } else {
            membarrier(libc::MEMBARRIER_CMD_QUERY)
        };
        answer > 0
            && answer & supported != 0
            && membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) == 0
    }

    /// The grace period's side.
    pub(crate) fn heavy() {
        if MODE.load(Ordering::Relaxed) == 0 {
            for _ in 0..1000 {
                if membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) == 0 {
                    return;
                }
                // `EPERM`: a fork copies the registration before it copies memory. So if another
                // thread registered during the fork, the child can have `MODE` without the
                // registration. `ENOMEM` is temporary: the kernel could not allocate a CPU mask.
                membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
                std::thread::yield_now();
            }
            // Readers already rely on `membarrier`, so it is too late to switch to real fences.
            die(
                "membarrier was granted at first and is refused now (a seccomp filter installed late?); \
                 set SRCU_NO_MEMBARRIER=1",
            );
        }
        // ORDER(srcu-enter, srcu-wake): the fallback's side of the pairs named at the callers.
        fence(Ordering::SeqCst);
    }
}

#[cfg(not(all(
    not(mmun_loom),
    not(miri),
    any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64"
    )
)))]
mod imp {
    use super::{FULL_FENCES, Ordering, fence};

    pub(super) const ALWAYS_FULL: bool = true;

    #[inline(always)]
    pub(super) fn compiler_barrier() {}

    pub(crate) fn mode() -> usize {
        FULL_FENCES
    }

    pub(crate) fn heavy() {
        // ORDER(srcu-enter, srcu-wake): the fallback's side of the pairs named at the callers.
        fence(Ordering::SeqCst);
    }
}

use imp::{ALWAYS_FULL, compiler_barrier};
pub(crate) use imp::{heavy, mode};
