//! The asymmetric fence: a compiler barrier for a hit and for the end of a lease, a system call for
//! an invalidation or eviction.
//!
//! [`light`] and [`heavy`] act on each other as two `fence(SeqCst)` do. `light` stops only the
//! compiler; `heavy` is `membarrier(PRIVATE_EXPEDITED)`, which makes every running thread of the
//! process execute a full fence, wherever it stands. Where the call is missing or refused, leases
//! are not written into slots but counted in their regions, with full fences on both sides; that is
//! decided once and never changes.
//!
//! `srcu` has such a fence, too, which aborts if the kernel refuses it later, since its readers
//! rely on it. Here a refusal only puts off a deregistration, and a library that a buffer's owner
//! loads must not abort: so it is not shared.

#[cfg(not(mmun_loom))]
use crate::sync::atomic::AtomicUsize;
use crate::sync::atomic::Ordering;
use crate::sync::fence;
#[cfg(not(mmun_loom))]
use rustix::thread::{MembarrierCommand, MembarrierQuery, membarrier, membarrier_query};

/// The reader's half.
#[inline(always)]
pub(crate) fn light() {
    if cfg!(mmun_loom) {
        // ORDER(cache-lease, cache-unlease): What models use for the pairs named at the callers.
        fence(Ordering::SeqCst);
    }
    compiler_barrier();
}

/// The half of a reader that does not rely on `membarrier`. Pairs with `heavy`, too, which is a
/// full fence where it is called.
pub(crate) fn full() {
    // ORDER(cache-lease, cache-unlease): The side of counted leases, of the pairs named at the
    // callers.
    if !crate::sync::mutant("no_fence_when_counted") {
        fence(Ordering::SeqCst);
    }
}

/// Rust's `compiler_fence` is a promise about signal handlers only; an empty `asm!` that may touch
/// memory is an opaque call to the compiler, which moves no access across it.
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

/// Prepares the process; tells whether `light` will do.
#[cfg(not(mmun_loom))]
pub(crate) fn prepare() -> bool {
    let mut mode = MODE.load(Ordering::Relaxed);
    if mode == UNKNOWN {
        let supported = !cfg!(miri)
            && std::env::var_os("REGCACHE_NO_MEMBARRIER").is_none()
            && membarrier_query().contains(MembarrierQuery::PRIVATE_EXPEDITED)
            && membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok();
        let found = if supported { MEMBARRIER } else { FENCES };
        // The first answer stays, so that all caches and both sides agree.
        mode = match MODE.compare_exchange(UNKNOWN, found, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => found,
            Err(first) => first,
        };
    }
    mode == MEMBARRIER
}

#[cfg(mmun_loom)]
pub(crate) fn prepare() -> bool {
    true
}

/// The half of an invalidation or eviction. False if the kernel could not do it now: then nothing
/// may be concluded.
#[cfg(not(mmun_loom))]
pub(crate) fn heavy() -> bool {
    if MODE.load(Ordering::Relaxed) == MEMBARRIER {
        // ENOMEM is a passing state: the kernel could not allocate a CPU mask. EPERM: a fork copies
        // the registration before it copies memory, so a child that was forked while another thread
        // registered can have `MODE` without it.
        return (0..100).any(|_| {
            let done = membarrier(MembarrierCommand::PrivateExpedited).is_ok();
            if !done {
                let _ = membarrier(MembarrierCommand::RegisterPrivateExpedited);
            }
            done
        });
    }
    // ORDER(cache-lease, cache-unlease): Without membarrier, against `full`.
    fence(Ordering::SeqCst);
    true
}

#[cfg(mmun_loom)]
pub(crate) fn heavy() -> bool {
    // ORDER(cache-lease, cache-unlease): As above.
    fence(Ordering::SeqCst);
    true
}
