//! The asymmetric fence: a compiler barrier for a hit and for the end of a lease, a system call for
//! an invalidation or eviction.
//!
//! A [`light`] on one thread and a [`heavy`] on another order each other as two `fence(SeqCst)` do.
//! `light` stops only the compiler. `heavy` is `membarrier(PRIVATE_EXPEDITED)`, which makes every
//! running thread of the process execute a full fence at whatever point it has reached. If the call
//! is missing or refused, leases are not written into slots but counted in their regions, with full
//! fences on both sides. That decision is made once and never changes.
//!
//! `srcu` has a similar fence. `srcu` aborts if the kernel refuses the call later, because its
//! readers rely on the fence. Here a refusal only delays a deregistration, and a library must not
//! abort the program that loads it. So the two do not share code.

#[cfg(not(mmun_loom))]
use crate::sync::atomic::AtomicUsize;
use crate::sync::atomic::Ordering;
use crate::sync::fence;
#[cfg(not(mmun_loom))]
use rustix::thread::{MembarrierCommand, MembarrierQuery, membarrier, membarrier_query};

/// The reader's side.
#[inline(always)]
pub(crate) fn light() {
    if cfg!(mmun_loom) {
        // ORDER(cache-lease, cache-unlease): in models this fence is the light side of the pairs
        // that the callers name.
        fence(Ordering::SeqCst);
    }
    compiler_barrier();
}

/// The side of a reader that does not rely on `membarrier`. This fence also pairs with `heavy`,
/// which is a full fence on its own thread.
pub(crate) fn full() {
    // ORDER(cache-lease, cache-unlease): for counted leases, this fence is the reader's side of the
    // pairs that the callers name.
    if !crate::sync::mutant("no_fence_when_counted") {
        fence(Ordering::SeqCst);
    }
}

/// Rust's `compiler_fence` makes a promise about signal handlers only. An empty `asm!` that may
/// touch memory is opaque to the compiler, which moves no access across it.
#[cfg(all(not(mmun_loom), not(miri)))]
#[inline(always)]
fn compiler_barrier() {
    // SAFETY: the block contains no instruction and uses no register and no stack.
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

/// Registers the process for `membarrier`, and tells whether `light` is enough for readers.
#[cfg(not(mmun_loom))]
pub(crate) fn prepare() -> bool {
    let mut mode = MODE.load(Ordering::Relaxed);
    if mode == UNKNOWN {
        let supported = !cfg!(miri)
            && std::env::var_os("REGCACHE_NO_MEMBARRIER").is_none()
            && membarrier_query().contains(MembarrierQuery::PRIVATE_EXPEDITED)
            && membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok();
        let found = if supported { MEMBARRIER } else { FENCES };
        // The first answer stays, so that all caches and both sides of the fence agree.
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

/// The side of an invalidation or eviction. If the result is false, the kernel could not execute
/// the fence now, and the caller must not conclude that a region has no lease.
#[cfg(not(mmun_loom))]
pub(crate) fn heavy() -> bool {
    if MODE.load(Ordering::Relaxed) == MEMBARRIER {
        // `ENOMEM` is temporary: the kernel could not allocate a CPU mask. `EPERM`: a fork copies
        // the registration before it copies memory. So if another thread registered during the
        // fork, the child can have `MODE` without the registration.
        return (0..100).any(|_| {
            let done = membarrier(MembarrierCommand::PrivateExpedited).is_ok();
            if !done {
                let _ = membarrier(MembarrierCommand::RegisterPrivateExpedited);
            }
            done
        });
    }
    // ORDER(cache-lease, cache-unlease): without `membarrier`, this pairs with `full`.
    fence(Ordering::SeqCst);
    true
}

#[cfg(mmun_loom)]
pub(crate) fn heavy() -> bool {
    // ORDER(cache-lease, cache-unlease): in models this fence pairs with `light` and `full`.
    fence(Ordering::SeqCst);
    true
}
