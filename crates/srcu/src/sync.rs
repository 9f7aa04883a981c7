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

/// A fence at which a model may switch threads. loom never switches between an operation and loom's
/// own fence after it, so no thread would ever run in between. A relaxed read-modify-write on a
/// location that all fences share is a point where loom may switch, and adds no ordering.
#[cfg(mmun_loom)]
pub(crate) fn fence(order: Ordering) {
    loom::lazy_static! { static ref POINT: AtomicUsize = AtomicUsize::new(0); }
    POINT.fetch_add(1, Ordering::Relaxed);
    loom::sync::atomic::fence(order);
}

/// Tells whether this run omits the named fence, scan or check, to show that the model detects its
/// absence.
///
/// The environment variable `MMUN_MUTANT` names the mutant, only in models and under `--cfg
/// 'mmun_mutant="env"'`. The variable is read at run time, so that one build can try all mutants.
#[cfg(not(any(mmun_loom, mmun_mutant = "env")))]
#[inline(always)]
pub const fn mutant(_name: &str) -> bool {
    false
}

/// Tells whether this run is that of the named mutant.
#[cfg(any(mmun_loom, mmun_mutant = "env"))]
pub fn mutant(name: &str) -> bool {
    use std::sync::OnceLock;
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    CHOSEN
        .get_or_init(|| std::env::var("MMUN_MUTANT").ok())
        .as_deref()
        == Some(name)
}
