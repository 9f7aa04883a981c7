//! A read section of an address space's domain that keeps the address space's object alive.
//!
//! # Safety
//! The `'static` of `guard` is not true: `guard` borrows from the heap object behind `mm`. That
//! object does not move when the handle does, and `drop` ends `guard` before `mm`.

use crate::Mm;
use srcu::Guard;
use std::mem::ManuallyDrop;

/// # Invariants
/// `guard` is a guard of the domain of `mm`.
#[derive(Debug)]
pub(crate) struct OwnedGuard {
    guard: ManuallyDrop<Guard<'static>>,
    mm: Mm,
}

impl OwnedGuard {
    pub(crate) fn new(mm: Mm) -> Self {
        let guard = mm.subscriptions().srcu().read_lock();
        // SAFETY: The domain must outlive the guard. The domain is in the shared object that `mm`
        // keeps alive, at a fixed address, and `drop` below ends the guard before `mm`. No method
        // returns the guard, so the longer lifetime never leaves this type.
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
        // SAFETY: The guard must not be dropped or used again. This is the drop of its owner.
        unsafe { ManuallyDrop::drop(&mut self.guard) };
    }
}
