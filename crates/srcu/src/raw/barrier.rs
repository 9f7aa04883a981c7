//! The asymmetric fence: next to nothing for a reader, a system call for the grace period.
//!
//! [`light`] and [`heavy`] act on each other as two `fence(SeqCst)` do. `light` stops only the
//! compiler; `heavy` is `membarrier(PRIVATE_EXPEDITED)`, which makes every running thread of the
//! process execute a full fence, wherever that thread stands. Where the system call is missing or
//! refused both are real fences. Which of the two it is gets decided once, before the first reader
//! of the process, and never changes.

use crate::sync::{Ordering, fence};

/// In the word that readers load first: readers must use real fences.
pub(crate) const FULL_FENCES: usize = 1 << 1;

/// A reader's half. `word` is the domain's index word, as loaded by this reader.
#[inline(always)]
pub(crate) fn light(word: usize) {
    if ALWAYS_FULL || word & FULL_FENCES != 0 {
        full();
    }
    compiler_barrier();
}

/// Out of line, so that the quick way is straight: on some processors a jump more costs as much as
/// the section.
#[cfg_attr(not(mmun_loom), cold, inline(never))]
fn full() {
    // ORDER(srcu-enter, srcu-wake): The fall-back's side of the pairs named at the callers.
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

    /// Rust's `compiler_fence` is only a promise about signal handlers; an empty `asm!` that may
    /// touch memory is an opaque call to the compiler, which cannot move an access across it.
    #[inline(always)]
    pub(super) fn compiler_barrier() {
        // SAFETY: No instruction, no register, no stack: nothing that could be violated.
        unsafe { std::arch::asm!("", options(nostack, preserves_flags)) };
    }

    /// What every domain's index word carries besides the bank.
    pub(crate) fn mode() -> usize {
        match MODE.load(Ordering::Relaxed) {
            UNKNOWN => {
                let found = if register() { 0 } else { FULL_FENCES };
                // The first answer stays, so that all domains and both sides agree.
                match MODE.compare_exchange(UNKNOWN, found, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => found,
                    Err(first) => first,
                }
            }
            known => known,
        }
    }

    fn membarrier(command: libc::c_int) -> libc::c_long {
        // SAFETY: `membarrier` takes three integers and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }
    }

    fn register() -> bool {
        // SAFETY: `getenv` needs a C string, and that no thread changes the environment at the same
        // time: that is the duty of each caller of the unsafe `set_var`. `std::env` would allocate,
        // and this may run inside an allocator.
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

    /// The grace period's half.
    pub(crate) fn heavy() {
        if MODE.load(Ordering::Relaxed) == 0 {
            for _ in 0..1000 {
                if membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) == 0 {
                    return;
                }
                // EPERM: a fork copies the registration before it copies memory, so a child forked
                // while another thread registered can have `MODE` without it. ENOMEM is a passing
                // state: the kernel could not allocate a CPU mask.
                membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
                std::thread::yield_now();
            }
            // Readers already rely on it, so there is no way back to real fences.
            die(
                "membarrier was granted at first and is refused now (a seccomp filter installed late?); \
                 set SRCU_NO_MEMBARRIER=1",
            );
        }
        // ORDER(srcu-enter, srcu-wake): The fall-back's side of the pairs named at the callers.
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
        // ORDER(srcu-enter, srcu-wake): As above.
        fence(Ordering::SeqCst);
    }
}

use imp::{ALWAYS_FULL, compiler_barrier};
pub(crate) use imp::{heavy, mode};
