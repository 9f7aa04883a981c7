//! The asymmetric fence: next to nothing for a hit and for the end of a lease, a system call for whoever takes regions out.
//!
//! [`light`] and [`heavy`] act on each other as two `fence(SeqCst)` do. `light` stops only the compiler; `heavy` is
//! `membarrier(PRIVATE_EXPEDITED)`, which makes every running thread of the process execute a full fence, wherever it
//! stands. Where the call is missing or refused both are real fences; that is decided once and never changes.

#[cfg(not(mmun_loom))]
use crate::sync::atomic::AtomicUsize;
use crate::sync::atomic::{Ordering, fence};
#[cfg(not(mmun_loom))]
use rustix::thread::{MembarrierCommand, MembarrierQuery, membarrier, membarrier_query};

/// Which half the readers of a cache have to execute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Light {
    /// The compiler is told, the other side does the rest.
    Compiler,
    /// A full fence of their own.
    Fence,
}

/// The reader's half.
#[inline(always)]
pub(crate) fn light(kind: Light) {
    if kind == Light::Fence {
        full();
    }
    compiler_barrier();
}

/// Out of line, so that the quick way is straight.
#[cfg_attr(not(mmun_loom), cold, inline(never))]
fn full() {
    // ORDER(cache-lease, cache-unlease): The fall-back's side of the pairs named at the callers.
    fence(Ordering::SeqCst);
}

/// Rust's `compiler_fence` is a promise about signal handlers only; an empty `asm!` that may touch memory is an opaque call to the
/// compiler, which moves no access across it.
#[cfg(all(not(mmun_loom), not(miri)))]
#[inline(always)]
fn compiler_barrier() {
    // SAFETY: No instruction, no register, no stack: nothing that could be violated.
    unsafe { std::arch::asm!("", options(nostack, preserves_flags)) };
}

#[cfg(any(mmun_loom, miri))]
fn compiler_barrier() {}

#[cfg(not(mmun_loom))]
static MODE: AtomicUsize = AtomicUsize::new(UNKNOWN);
#[cfg(not(mmun_loom))]
const UNKNOWN: usize = 0;
#[cfg(not(mmun_loom))]
const MEMBARRIER: usize = 1;
#[cfg(not(mmun_loom))]
const FENCES: usize = 2;

/// Decides what readers do, and prepares the process for it.
#[cfg(not(mmun_loom))]
pub(crate) fn prepare() -> Light {
    let mut mode = MODE.load(Ordering::Relaxed);
    if mode == UNKNOWN {
        let supported = !cfg!(miri)
            && membarrier_query().contains(MembarrierQuery::PRIVATE_EXPEDITED)
            && membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok();
        let found = if supported { MEMBARRIER } else { FENCES };
        // The first answer stays, so that all caches and both sides agree.
        mode = match MODE.compare_exchange(UNKNOWN, found, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => found,
            Err(first) => first,
        };
    }
    if mode == MEMBARRIER { Light::Compiler } else { Light::Fence }
}

#[cfg(mmun_loom)]
pub(crate) fn prepare() -> Light {
    Light::Fence
}

/// The half of whoever takes regions out. False if the kernel could not do it now: then nothing may be concluded.
#[cfg(not(mmun_loom))]
pub(crate) fn heavy() -> bool {
    if MODE.load(Ordering::Relaxed) == MEMBARRIER {
        // ENOMEM, the only error of a registered process, is a passing state: the kernel could not allocate a CPU mask.
        return (0..100).any(|_| membarrier(MembarrierCommand::PrivateExpedited).is_ok());
    }
    // ORDER(cache-lease, cache-unlease): The fall-back's side of the pairs named at the callers.
    fence(Ordering::SeqCst);
    true
}

#[cfg(mmun_loom)]
pub(crate) fn heavy() -> bool {
    // ORDER(cache-lease, cache-unlease): As above.
    fence(Ordering::SeqCst);
    true
}
