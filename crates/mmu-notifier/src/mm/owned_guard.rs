//! A read section of an address space's domain that keeps the address space's object alive.
//!
//! # Safety
//! `guard` really borrows from the heap object behind `mm`. That object does not move when the
//! handle does, and `guard` is dropped before `mm`.

use crate::Mm;
use srcu::Guard;
use std::mem::ManuallyDrop;

/// # Invariants
/// `guard` is of the domain of `mm`.
#[derive(Debug)]
pub(crate) struct OwnedGuard {
    guard: ManuallyDrop<Guard<'static>>,
    mm: Mm,
}

impl OwnedGuard {
    pub(crate) fn new(mm: Mm) -> Self {
        let guard = mm.subscriptions().srcu().read_lock();
        // SAFETY: The domain must outlive the guard. It lives in the shared object that `mm` keeps
        // alive, at a fixed address, and `drop` below ends the guard before `mm`. The longer
        // lifetime never leaves this type: no method returns the guard.
        let guard = unsafe { std::mem::transmute::<Guard<'_>, Guard<'static>>(guard) };
        Self {
            guard: ManuallyDrop::new(guard),
            mm,
        }
    }

    pub(crate) fn mm(&self) -> &Mm {
        &self.mm
    }
}

impl Drop for OwnedGuard {
    fn drop(&mut self) {
        // SAFETY: It must not be dropped or used again: this is its owner's drop.
        unsafe { ManuallyDrop::drop(&mut self.guard) };
    }
}
