//! The primitives that models replace: from `loom` under `cfg(mmun_loom)`, from `std` otherwise;
//! and the switch for mutants.

#[cfg(mmun_loom)]
pub(crate) use loom::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering},
};
#[cfg(not(mmun_loom))]
pub(crate) use std::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};

/// A fence at which models may switch threads. `loom`'s own is glued to the operation before it: no
/// thread ever runs between a store and the fence behind it. A relaxed read-modify-write that all
/// fences share is a place to switch and adds no order.
#[cfg(mmun_loom)]
pub(crate) fn fence(order: Ordering) {
    loom::lazy_static! { static ref POINT: AtomicUsize = AtomicUsize::new(0); }
    POINT.fetch_add(1, Ordering::Relaxed);
    loom::sync::atomic::fence(order);
}

/// Whether this run is to do without the named fence, scan or check, to show that its model would
/// notice.
///
/// Chosen by the environment variable `MMUN_MUTANT`, in models and under `--cfg
/// 'mmun_mutant="env"'` only. Chosen at run time, so that trying all of them takes one build.
#[cfg(not(any(mmun_loom, mmun_mutant = "env")))]
#[inline(always)]
pub const fn mutant(_name: &str) -> bool {
    false
}

#[cfg(any(mmun_loom, mmun_mutant = "env"))]
pub fn mutant(name: &str) -> bool {
    use std::sync::OnceLock;
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    CHOSEN
        .get_or_init(|| std::env::var("MMUN_MUTANT").ok())
        .as_deref()
        == Some(name)
}
